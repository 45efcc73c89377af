"""The start-up check passes for what we serve rightly and names what we do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from timbre_server.engine.attention import install_attention
from timbre_server.engine.probe import probe
from timbre_server.engine.self_check import check_against, plain_logits
from timbre_server.errors import UnsupportedModel

TinyModel = Callable[[str], PreTrainedModel]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_model_that_we_serve_rightly_passes(family: str, dtype: torch.dtype, tiny_model: TinyModel) -> None:
    model = tiny_model(family)
    nn.Module.to(model, dtype)
    expected = plain_logits(model)
    install_attention(model)
    check_against(expected, model, probe(model).kv_shapes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_computes_something_else_under_our_attention_is_refused(
    dtype: torch.dtype, tiny_model: TinyModel
) -> None:
    model = tiny_model("llama")
    nn.Module.to(model, dtype)
    expected = plain_logits(model)
    install_attention(model)
    shapes = probe(model).kv_shapes
    for layer in model.model.layers:
        layer.self_attn.scaling *= 3
    with pytest.raises(UnsupportedModel, match=r"llama.*self-check failed.*of their spread"):
        check_against(expected, model, shapes)


def test_logits_that_are_not_numbers_do_not_pass(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    expected = plain_logits(model)
    install_attention(model)
    shapes = probe(model).kv_shapes
    model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(UnsupportedModel, match="self-check failed"):
        check_against(expected, model, shapes)
