"""P-tuning, as PEFT saves it: virtual tokens whose embeddings an encoder (MLP or LSTM) made in training.

PEFT runs the encoder before it saves, so the file holds its result, and this is prompt tuning from here on;
the encoder's sizes in the config are inert.

Paper: arXiv 2103.10385.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from timbre_methods.config import read_config
from timbre_methods.contract import Sites, Tensors
from timbre_methods.program import AdapterProgram
from timbre_methods.prompt.prompt_tuning import embeddings_example, embeddings_program
from timbre_methods.prompt.virtual_tokens import EmbeddingsConfig
from timbre_methods.prompt_contract import Frame, PromptMethod


class PTuningConfig(EmbeddingsConfig):
    inert = EmbeddingsConfig.inert | {
        "encoder_dropout",
        "encoder_hidden_size",
        "encoder_num_layers",
        "encoder_reparameterization_type",
    }


class PTuning(PromptMethod[PTuningConfig]):
    name = "p_tuning"
    paper = "arXiv 2103.10385"
    stored = "embeddings [v, hidden], once a model"
    checked_against = "PEFT"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "P_TUNING"

    def parse(self, raw_config: Mapping[str, Any]) -> PTuningConfig:
        return read_config(PTuningConfig, raw_config)

    def compile(self, config: PTuningConfig, tensors: Tensors, sites: Sites, frame: Frame) -> AdapterProgram:
        return embeddings_program(config, tensors, frame)

    def example(
        self, sites: Sites, frame: Frame, generator: torch.Generator
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        options = {"encoder_hidden_size": 16, "encoder_reparameterization_type": "MLP"}
        return embeddings_example("P_TUNING", options, frame, generator)
