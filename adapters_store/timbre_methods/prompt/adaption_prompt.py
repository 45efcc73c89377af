"""LLaMA-Adapter (adaption prompt), as PEFT saves it: a gated second attention in the last layers.

    attn_out += W_o (gate · softmax(q k_p^T / sqrt(D)) v_p) + b_o      k_p = W_k p + b_k, v_p = W_v p + b_v

``q`` is the layer's own, rotated; ``k_p`` is not. ``k_p`` and ``v_p`` depend on no request, so they are
computed here, from the base's weights. PEFT sends the addition through the whole output projection, and so
adds its bias a second time: a shift at that layer. Models whose attention is one fused layer are refused.

Legend: L prompt tokens of a layer, I hidden size, G KV heads, D key dim, E value dim.

Paper: arXiv 2303.16199 section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from timbre_methods.config import Count, PeftConfig, read_config
from timbre_methods.contract import Site, Sites, Tensors
from timbre_methods.errors import AdapterMismatch
from timbre_methods.examples import peft_file, random_tensor, whole_number
from timbre_methods.program import AdapterProgram, Diagonal
from timbre_methods.prompt.virtual_tokens import take_all
from timbre_methods.prompt_contract import AttentionLayer, Frame, PromptMethod
from timbre_methods.prompt_parts import AttentionPrompt
from timbre_methods.site_tensors import PREFIX

GATE, PROMPT = "adaption_gate", "adaption_prompt"


class AdaptionPromptConfig(PeftConfig):
    takes_beside = False

    adapter_len: Count
    adapter_layers: Count
    """So many, the last of the model."""


class AdaptionPrompt(PromptMethod[AdaptionPromptConfig]):
    name = "adaption_prompt"
    paper = "arXiv 2303.16199"
    stored = "prompt [1, L, hidden] and gate [1], for each of the last layers"
    regenerated = "the prompts' keys and values, from the base"
    checked_against = "PEFT"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "ADAPTION_PROMPT"

    def parse(self, raw_config: Mapping[str, Any]) -> AdaptionPromptConfig:
        return read_config(AdaptionPromptConfig, raw_config)

    def compile(
        self, config: AdaptionPromptConfig, tensors: Tensors, sites: Sites, frame: Frame
    ) -> AdapterProgram:
        first = len(frame.attention) - config.adapter_layers
        if first < 0:
            raise AdapterMismatch(
                f"adapter_config.json: adapter_layers: found {config.adapter_layers}, "
                f"this base lacks so many: it has {len(frame.attention)}"
            )
        layers = {at: frame.attention[at] for at in range(first, len(frame.attention))}
        shapes: dict[str, tuple[int | str, ...]] = {}
        for layer in layers.values():
            width = _projection(layer, "k_proj", sites).in_features
            shapes[f"{PREFIX}{layer.path}.{GATE}"] = (1,)
            shapes[f"{PREFIX}{layer.path}.{PROMPT}"] = (1, config.adapter_len, width)
        found = take_all(tensors, shapes)
        outputs = [_projection(layer, "o_proj", sites) for layer in layers.values()]
        return AdapterProgram(
            {site.path: (_again(site.bias_O),) for site in outputs if site.bias_O is not None},
            attention={at: _attention(layer, found, sites) for at, layer in layers.items()},
        )

    def example(
        self, sites: Sites, frame: Frame, generator: torch.Generator
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        count, length = whole_number(1, len(frame.attention), generator), whole_number(1, 5, generator)
        tensors = {}
        for layer in frame.attention[-count:]:
            stem, width = PREFIX + layer.path, _projection(layer, "k_proj", sites).in_features
            tensors[f"{stem}.{GATE}"] = random_tensor((1,), generator)
            tensors[f"{stem}.{PROMPT}"] = random_tensor((1, length, width), generator)
        options = {"adapter_layers": count, "adapter_len": length, "target_modules": "self_attn"}
        return {**peft_file("ADAPTION_PROMPT", [], {}), **options}, tensors


def _projection(layer: AttentionLayer, name: str, sites: Sites) -> Site:
    site = sites.get(f"{layer.path}.{name}")
    if site is None:
        raise AdapterMismatch(
            f"this base lacks {layer.path}.{name}: an adaption prompt needs keys, values and output of "
            "attention as linear layers of their own"
        )
    expected = {"k_proj": layer.num_kv_heads * layer.key_dim, "v_proj": layer.num_kv_heads * layer.value_dim}
    if name in expected and site.out_features != expected[name]:
        raise AdapterMismatch(
            f"{site.path}: found {site.out_features} outputs, expected {expected[name]} as in attention"
        )
    return site


def _attention(layer: AttentionLayer, found: Mapping[str, Tensor], sites: Sites) -> AttentionPrompt:
    prompt_LI = found[f"{PREFIX}{layer.path}.{PROMPT}"][0].to(torch.float32)
    gate = found[f"{PREFIX}{layer.path}.{GATE}"].to(torch.float32)
    heads = layer.num_kv_heads
    keys, values = (_projected(_projection(layer, name, sites), prompt_LI) for name in ("k_proj", "v_proj"))
    return AttentionPrompt(
        keys_GLD=keys.view(-1, heads, layer.key_dim).transpose(0, 1).contiguous(),
        values_GLE=gate * values.view(-1, heads, layer.value_dim).transpose(0, 1),
    )


def _projected(site: Site, x_LI: Tensor) -> Tensor:
    bias_O = None if site.bias_O is None else site.bias_O.to(torch.float32)
    return linear(x_LI, site.weight_OI.to(torch.float32), bias_O)


def _again(bias_O: Tensor) -> Diagonal:
    """A layer's bias, once more."""
    shift_O = bias_O.to(torch.float32, copy=True)
    return Diagonal(side="output", gain=torch.ones_like(shift_O), shift=shift_O)
