"""Prefix tuning, as PEFT saves it: v learned entries before a request's own in each layer's KV cache.

    attention over [k_0 … k_(v−1), rope(W_k x_0, v), …]      a request's own tokens are at v, v + 1, …

The keys are as the cache takes them: no rotary embedding is applied to them. Where a layer attends to an
earlier one's keys and values, it does so for the prefix too, and its own part of the file is read by nobody.
A projection that made them in training is not in the file; PEFT saves what it gave.

Legend: V virtual tokens, A attention layers, G KV heads, E size of a head.

Paper: arXiv 2101.00190 section 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from timbre_methods.config import Count, read_config
from timbre_methods.contract import Sites, Tensors
from timbre_methods.errors import AdapterMismatch
from timbre_methods.examples import random_tensor, whole_number
from timbre_methods.program import AdapterProgram
from timbre_methods.prompt.virtual_tokens import EMBEDDINGS, VirtualTokensConfig, prompt_file, take_all
from timbre_methods.prompt_contract import Frame, PromptMethod
from timbre_methods.prompt_parts import PromptEntries


class EntriesConfig(VirtualTokensConfig):
    """The fields that say how one row of the file is cut."""

    num_layers: Count
    num_attention_heads: Count
    """Of keys and values."""
    token_dim: Count
    """All heads together."""


class PrefixTuningConfig(EntriesConfig):
    inert = frozenset({"encoder_hidden_size", "init_weights", "prefix_projection"})


def entries_program(config: EntriesConfig, tensors: Tensors, frame: Frame) -> AdapterProgram:
    """The program of a file whose rows hold, for one virtual token each, ``k_0 v_0 k_1 v_1 …``."""
    heads, size = _heads(frame)
    found = (config.num_layers, config.num_attention_heads, config.token_dim)
    expected = (len(frame.attention), heads, heads * size)
    if found != expected:
        raise AdapterMismatch(
            "adapter_config.json: num_layers, num_attention_heads (of keys) and token_dim: "
            f"found {found}, expected {expected} for this base"
        )
    count, layers = config.num_virtual_tokens, config.num_layers
    stored = take_all(tensors, {EMBEDDINGS: (count, layers * 2 * heads * size)})[EMBEDDINGS]
    entries_VA2GE = stored.to(torch.float32).view(count, layers, 2, heads, size)
    sources = [
        at if each.shares_with is None else each.shares_with for at, each in enumerate(frame.attention)
    ]
    keys_AVGE, values_AVGE = (entries_VA2GE[:, sources, at].transpose(0, 1).contiguous() for at in (0, 1))
    return AdapterProgram({}, prompt=PromptEntries(keys_AVGE, values_AVGE))


def _heads(frame: Frame) -> tuple[int, int]:
    """KV heads and the size of one, where all layers agree."""
    shapes = {(each.num_kv_heads, each.key_dim, each.value_dim) for each in frame.attention}
    if len(shapes) != 1:
        raise AdapterMismatch(
            "this base lacks attention layers of one shape: a prefix of equal entries for all layers "
            f"does not fit; found (KV heads, key size, value size) {sorted(shapes)}"
        )
    ((heads, key_dim, value_dim),) = shapes
    if key_dim != value_dim:
        raise AdapterMismatch(
            f"this base lacks values of its keys' size: found {value_dim}, expected {key_dim}"
        )
    return heads, key_dim


def entries_example(
    peft_type: str, options: Mapping[str, Any], frame: Frame, generator: torch.Generator
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An adapter of the same kind, of 1 to 6 virtual tokens."""
    heads, size = _heads(frame)
    count, layers = whole_number(1, 6, generator), len(frame.attention)
    sizes = {"num_layers": layers, "num_attention_heads": heads, "token_dim": heads * size}
    config = prompt_file(peft_type, {"num_virtual_tokens": count, **sizes, **options})
    return config, {EMBEDDINGS: random_tensor((count, layers * 2 * heads * size), generator)}


class PrefixTuning(PromptMethod[PrefixTuningConfig]):
    name = "prefix_tuning"
    paper = "arXiv 2101.00190"
    stored = "keys and values [v, 2 layers kv_width], once a model"
    checked_against = "PEFT"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "PREFIX_TUNING"

    def parse(self, raw_config: Mapping[str, Any]) -> PrefixTuningConfig:
        return read_config(PrefixTuningConfig, raw_config)

    def compile(
        self, config: PrefixTuningConfig, tensors: Tensors, sites: Sites, frame: Frame
    ) -> AdapterProgram:
        return entries_program(config, tensors, frame)

    def example(
        self, sites: Sites, frame: Frame, generator: torch.Generator
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        options = {"encoder_hidden_size": 8, "prefix_projection": True, "init_weights": None}
        return entries_example("PREFIX_TUNING", options, frame, generator)
