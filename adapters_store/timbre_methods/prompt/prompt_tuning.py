"""Prompt tuning, as PEFT saves it: v learned embeddings before those of a request's own tokens.

    inputs = [p_0 … p_(v−1), E[t_0], E[t_1], …]      at positions 0, 1, …

Nothing else changes. What only told training where to begin (a text, a sample of the vocabulary) is inert.

Legend: V virtual tokens, D hidden size.

Paper: arXiv 2104.08691 section 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from timbre_methods.config import read_config
from timbre_methods.contract import Sites, Tensors
from timbre_methods.examples import random_tensor, whole_number
from timbre_methods.program import AdapterProgram
from timbre_methods.prompt.virtual_tokens import EMBEDDINGS, EmbeddingsConfig, prompt_file, take_all
from timbre_methods.prompt_contract import Frame, PromptMethod
from timbre_methods.prompt_parts import PromptEmbeddings


class PromptTuningConfig(EmbeddingsConfig):
    inert = EmbeddingsConfig.inert | {
        "prompt_tuning_init",
        "prompt_tuning_init_text",
        "tokenizer_kwargs",
        "tokenizer_name_or_path",
    }


def embeddings_program(config: EmbeddingsConfig, tensors: Tensors, frame: Frame) -> AdapterProgram:
    """The program of an adapter whose file holds its virtual tokens' embeddings and nothing else."""
    shapes = {EMBEDDINGS: (config.num_virtual_tokens, frame.hidden_size)}
    rows_VD = take_all(tensors, shapes)[EMBEDDINGS].to(torch.float32, copy=True)
    return AdapterProgram({}, prompt=PromptEmbeddings(rows_VD))


def embeddings_example(
    peft_type: str, options: Mapping[str, Any], frame: Frame, generator: torch.Generator
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An adapter of the same kind, of 1 to 6 virtual tokens."""
    count = whole_number(1, 6, generator)
    config = {"num_virtual_tokens": count, "token_dim": frame.hidden_size, **options}
    rows_VD = random_tensor((count, frame.hidden_size), generator)
    return prompt_file(peft_type, config), {EMBEDDINGS: rows_VD}


class PromptTuning(PromptMethod[PromptTuningConfig]):
    name = "prompt_tuning"
    paper = "arXiv 2104.08691"
    stored = "embeddings [v, hidden], once a model"
    checked_against = "PEFT"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "PROMPT_TUNING"

    def parse(self, raw_config: Mapping[str, Any]) -> PromptTuningConfig:
        return read_config(PromptTuningConfig, raw_config)

    def compile(
        self, config: PromptTuningConfig, tensors: Tensors, sites: Sites, frame: Frame
    ) -> AdapterProgram:
        return embeddings_program(config, tensors, frame)

    def example(
        self, sites: Sites, frame: Frame, generator: torch.Generator
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        options = {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None, "tokenizer_kwargs": None}
        return embeddings_example("PROMPT_TUNING", options, frame, generator)
