"""One call takes the place of rotary positions only in attention layers that do what it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CohereConfig, PreTrainedConfig, PreTrainedModel, StableLmConfig
from transformers.models.llama.modeling_llama import LlamaAttention

from timbre_server.engine.attention import install_attention
from timbre_server.engine.batch import run_model
from timbre_server.engine.fused_rotary import RotaryAttention, fuse_rotary
from timbre_server.engine.layer_kernels import LayerKernels, in_cpp
from timbre_server.engine.probe import Recording, probe
from timbre_server.native import library as native

TinyModel = Callable[[str], PreTrainedModel]
SIZES = {
    "vocab_size": 31,
    "hidden_size": 32,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
pytestmark = pytest.mark.cpp


def fused(model: PreTrainedModel, kernels: LayerKernels | None = None) -> list[type[nn.Module]]:
    """The types of its attention layers afterwards."""
    install_attention(model)
    layers = probe(model).layers
    fuse_rotary(model, layers, kernels or in_cpp())
    return [type(model.get_submodule(layer.path)) for layer in layers]


@torch.inference_mode()
def logits(model: PreTrainedModel) -> Tensor:
    return run_model(model, Recording(), (7, 3, 9, 4, 1, 1, 8), (0, 1, 2, 3, 90, 91, 255), range(7))


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "qwen3_moe", "mixtral"]
)
def test_a_rotary_layer_is_replaced_and_gives_the_same(family: str, tiny_model: TinyModel) -> None:
    model = tiny_model(family)
    install_attention(model)
    want_TV, names = logits(model), [name for name, _ in model.named_parameters()]
    calls = probe(model).layers
    assert fused(model) == [RotaryAttention] * len(calls)
    assert probe(model).layers == calls, "windows, scales and caps are what they were"
    assert sorted(name for name, _ in model.named_parameters()) == sorted(names)
    torch.testing.assert_close(logits(model), want_TV, rtol=1e-4, atol=1e-4 * float(want_TV.abs().max()))


@pytest.mark.parametrize("family", ["phi3", "gpt2", "gpt_oss"])
def test_layers_of_another_make_or_with_sinks_go_on(family: str, tiny_model: TinyModel) -> None:
    assert RotaryAttention not in fused(tiny_model(family))


@pytest.mark.parametrize("config", [CohereConfig(**SIZES, **HEADS), StableLmConfig(**SIZES, **HEADS)])
def test_pairs_side_by_side_and_heads_rotated_in_part_go_on(config: PreTrainedConfig) -> None:
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    assert {f"{name}_proj" for name in "qkvo"} <= dict(
        model.model.layers[0].self_attn.named_children()
    ).keys()
    assert RotaryAttention not in fused(model)


class FarScaled(LlamaAttention):
    """Attends less from afar, as a few families do."""

    def forward(self, hidden_states: Tensor, *, position_ids: Tensor, **others: Any) -> Any:
        output, weights = super().forward(hidden_states, position_ids=position_ids, **others)
        return output / (1 + position_ids // 8192)[..., None], weights


def test_what_a_layer_does_only_far_from_the_first_token_is_seen(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    model.model.layers[1].self_attn.__class__ = FarScaled
    assert fused(model) == [RotaryAttention, FarScaled, RotaryAttention]


def test_several_threads_turn_each_row_once(tiny_model: TinyModel, two_threads: None) -> None:
    model = tiny_model("llama")
    fused(model)
    rotate = model.model.layers[0].self_attn._rotate
    generator = torch.Generator().manual_seed(3)
    q_THD, k_TGD, cos_TD, sin_TD = (torch.randn(901, n, 32, generator=generator) for n in (4, 2, 1, 1))
    assert q_THD.numel() > native.least_work().value
    want = [u * cos_TD + torch.cat((-u[..., 16:], u[..., :16]), -1) * sin_TD for u in (q_THD, k_TGD)]
    rotate(q_THD, k_TGD, cos_TD.transpose(0, 1), sin_TD.transpose(0, 1))
    torch.testing.assert_close([q_THD, k_TGD], want)
