"""Cartridges, as PEFT saves them: a long text's KV cache, trained down to v entries a layer.

They are served as a prefix (`prefix_tuning`): the same layout, the same places. Which of the entries training
held fixed is inert.

Paper: arXiv 2506.06266.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from timbre_methods.config import read_config
from timbre_methods.contract import Sites, Tensors
from timbre_methods.program import AdapterProgram
from timbre_methods.prompt.prefix_tuning import EntriesConfig, entries_example, entries_program
from timbre_methods.prompt_contract import Frame, PromptMethod


class CartridgeConfig(EntriesConfig):
    inert = frozenset({"num_frozen_tokens"})


class Cartridge(PromptMethod[CartridgeConfig]):
    name = "cartridge"
    paper = "arXiv 2506.06266"
    stored = "keys and values [v, 2 layers kv_width], once a model"
    checked_against = "PEFT"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "CARTRIDGE"

    def parse(self, raw_config: Mapping[str, Any]) -> CartridgeConfig:
        return read_config(CartridgeConfig, raw_config)

    def compile(
        self, config: CartridgeConfig, tensors: Tensors, sites: Sites, frame: Frame
    ) -> AdapterProgram:
        return entries_program(config, tensors, frame)

    def example(
        self, sites: Sites, frame: Frame, generator: torch.Generator
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return entries_example("CARTRIDGE", {"num_frozen_tokens": 1}, frame, generator)
