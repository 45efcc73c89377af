"""One call takes the places of activations and gated MLPs only where it does what they do."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import GemmaConfig, LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.llama.modeling_llama import LlamaMLP

from timbre_server.engine.fused_activation import Activation, GatedMLP, fuse_activations
from timbre_server.engine.layer_kernels import in_cpp
from timbre_server.native import library as native

SIZES = {"hidden_size": 24, "intermediate_size": 44, "num_attention_heads": 1}
pytestmark = pytest.mark.cpp


def fused(module: nn.Module) -> nn.Module:
    """Of a copy, within a model."""
    model = nn.ModuleDict({"part": copy.deepcopy(module)})
    fuse_activations(model, in_cpp())
    return model["part"]


def random_rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def assert_same(got: Tensor, want: Tensor) -> None:
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    "name", ["silu", "swish", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "quick_gelu"]
)
@torch.inference_mode()
def test_an_activation_s_numbers_are_the_module_s(name: str) -> None:
    module = ACT2FN[name]
    activation = fused(module)
    assert type(activation) is Activation
    for size in (0, 1, 7, 8, 9, 63):
        x = 4 * random_rows(1, 3, size)
        before = x.clone()
        assert_same(activation(x), module(x))
        assert_same(activation(x.transpose(1, 2)), module(x.transpose(1, 2)))
        assert_same(activation.times(x.clone(), 1 - x), module(x) * (1 - x))
        assert torch.equal(x, before), "the activation alone writes to no input"
    extremes = torch.tensor([0.0, -0.0, 1e4, -1e4, 90.0, -90.0, 1e30, -1e30, -3e38, torch.inf, torch.nan])
    torch.testing.assert_close(activation(extremes), module(extremes), equal_nan=True)


@torch.inference_mode()
def test_several_threads_give_the_numbers_of_one(two_threads: None) -> None:
    activation = fused(nn.SiLU())
    x, factor = random_rows(3, 40_003), random_rows(3, 40_003)
    assert x.numel() > native.least_work().value
    want = torch.cat([activation.times(a.clone(), b) for a, b in zip(x, factor, strict=True)])
    assert torch.equal(activation.times(x, factor).flatten(), want)


@pytest.mark.parametrize("name", ["gelu", "gelu_10", "relu", "relu2", "mish", "linear", "sigmoid", "xielu"])
def test_other_activations_go_on_themselves(name: str) -> None:
    assert type(fused(ACT2FN[name])) is type(ACT2FN[name])


def llama_mlp(activation: str = "silu", **more: bool) -> LlamaMLP:
    torch.manual_seed(1)
    return LlamaMLP(LlamaConfig(**SIZES, hidden_act=activation, **more))


def gemma_mlp() -> GemmaMLP:
    torch.manual_seed(1)
    return GemmaMLP(GemmaConfig(**SIZES, head_dim=8))


@pytest.mark.parametrize("mlp", [llama_mlp(), llama_mlp(mlp_bias=True), llama_mlp("gelu_new"), gemma_mlp()])
@torch.inference_mode()
def test_a_gated_mlp_is_one_pass_between_its_own_layers(mlp: nn.Module) -> None:
    state = torch.get_rng_state()
    part = fused(mlp)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(part) is GatedMLP
    assert {n: p.shape for n, p in part.named_parameters()} == {n: p.shape for n, p in mlp.named_parameters()}
    for num_rows in (0, 1, 5):
        x_1TD = random_rows(1, num_rows, 24)
        assert_same(part(x_1TD), mlp(x_1TD))


@torch.inference_mode()
def test_rows_in_16_bits_get_what_the_mlp_gives() -> None:
    mlp, x_1TD = llama_mlp(), random_rows(1, 5, 24).bfloat16()
    got, want = fused(mlp).bfloat16()(x_1TD), mlp.bfloat16()(x_1TD)
    torch.testing.assert_close(got, want, atol=3e-3, rtol=2e-2)


class Scaled(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.99


class Limited(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=20) * self.up_proj(x))


class Swapped(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class OfTwo(LlamaMLP):
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + super().forward(x)


class WithDropout(LlamaMLP):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.dropout = nn.Dropout()


@pytest.mark.parametrize("kind", [Scaled, Limited, Swapped, OfTwo, WithDropout])
@torch.inference_mode()
def test_of_an_mlp_that_does_something_else_only_the_activation_is_replaced(kind: type[LlamaMLP]) -> None:
    mlp = kind(LlamaConfig(**SIZES)).eval()
    part = fused(mlp)
    assert type(part) is kind
    assert type(part.act_fn) is Activation
    inputs = (random_rows(1, 5, 24),) * (2 if kind is OfTwo else 1)
    assert_same(part(*inputs), mlp(*inputs))
