"""CPT (context-aware prompt tuning), as PEFT saves it: a context's embeddings, moved a little in training.

PEFT adds the learned and projected move to the context tokens' embeddings before it saves, so the file holds
the sum, and this is prompt tuning from here on. Token ids, masks and the loss are inert.

Paper: arXiv 2410.17222.
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


class CptConfig(EmbeddingsConfig):
    inert = EmbeddingsConfig.inert | {
        "cpt_mask",
        "cpt_token_ids",
        "cpt_tokens_type_mask",
        "opt_loss_decay_factor",
        "opt_projection_epsilon",
        "opt_projection_format_epsilon",
        "opt_weighted_loss_type",
        "tokenizer_name_or_path",
    }


class Cpt(PromptMethod[CptConfig]):
    name = "cpt"
    paper = "arXiv 2410.17222"
    stored = "embeddings [v, hidden], once a model"
    checked_against = "PEFT"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "CPT"

    def parse(self, raw_config: Mapping[str, Any]) -> CptConfig:
        return read_config(CptConfig, raw_config)

    def compile(self, config: CptConfig, tensors: Tensors, sites: Sites, frame: Frame) -> AdapterProgram:
        return embeddings_program(config, tensors, frame)

    def example(
        self, sites: Sites, frame: Frame, generator: torch.Generator
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        options = {"cpt_token_ids": [1, 2], "opt_weighted_loss_type": "decay", "opt_projection_epsilon": 0.1}
        return embeddings_example("CPT", options, frame, generator)
