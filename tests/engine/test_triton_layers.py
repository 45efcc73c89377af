"""Rotary positions and activations as Triton launches, under the interpreter or on a GPU.

Against plain PyTorch, and in whole models of every type that they serve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CohereConfig, PreTrainedModel, StableLmConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaAttention

pytest.importorskip("triton")

from triton.errors import TritonError

from timbre_server.engine.attention import install_attention
from timbre_server.engine.batch import run_model
from timbre_server.engine.fused_activation import Activation, GatedMLP, fuse_activations
from timbre_server.engine.fused_rotary import RotaryAttention, fuse_rotary
from timbre_server.engine.layer_kernels import LayerKernels
from timbre_server.engine.probe import Recording, probe
from timbre_server.engine.triton_layers import WIDTH, activate, in_triton, rotate

TinyModel = Callable[[str], PreTrainedModel]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNELS = in_triton(DEVICE)
DTYPES = KERNELS.dtypes
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Of one number."""
SIZES = {"vocab_size": 31, "hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 2}


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def between_nans(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same numbers within a row of NaN, and that row."""
    row = torch.full((x.numel() + 256,), torch.nan, dtype=x.dtype, device=DEVICE)
    inner = row[128:-128].view(x.shape).copy_(x)
    return inner, row


def assert_alone_is_written(row: Tensor) -> None:
    is_nan = row.isnan()
    assert bool(is_nan[:128].all())
    assert bool(is_nan[-128:].all())
    assert not is_nan[128:-128].any()


def rotated(u_THD: Tensor, cos_1TD: Tensor, sin_1TD: Tensor) -> Tensor:
    u, cos, sin = (x.float() for x in (u_THD, cos_1TD.transpose(0, 1), sin_1TD.transpose(0, 1)))
    lower, upper = u.chunk(2, dim=-1)
    return (u * cos + torch.cat((-upper, lower), dim=-1) * sin).to(u_THD.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "heads", "kv_heads", "dim"),
    [(1, 9, 3, 64), (3, 1, 1, 48), (65, 3, 1, 128), (3, 17, 9, 2), (2, 8, 8, 6)],
)
def test_heads_of_q_and_k_are_turned_in_place(
    dtype: torch.dtype, rows: int, heads: int, kv_heads: int, dim: int
) -> None:
    before = [random(rows, count, dim, dtype=dtype, seed=count) for count in (heads, kv_heads)]
    cos_1TD, sin_1TD = random(2, 1, rows, dim, dtype=dtype)
    (q_THD, row_of_q), (k_TGD, row_of_k) = map(between_nans, before)
    rotate(q_THD, k_TGD, cos_1TD, sin_1TD)
    for got, u in zip((q_THD, k_TGD), before, strict=True):
        want = rotated(u, cos_1TD, sin_1TD)
        torch.testing.assert_close(got, want, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])
    assert_alone_is_written(row_of_q)
    assert_alone_is_written(row_of_k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("curve", [(1.0, 0.0), (1.6, 0.07)])
@pytest.mark.parametrize("size", [0, 1, WIDTH - 1, WIDTH + 7])
def test_an_activation_and_its_product_are_rounded_once(
    dtype: torch.dtype, curve: tuple[float, float], size: int
) -> None:
    x, factor = 4 * random(size, dtype=dtype), random(size, dtype=dtype, seed=1)
    slope, bend = curve
    want = x.float() * torch.sigmoid(slope * x.float() + bend * x.float() ** 3)
    tolerances = {"rtol": ROUNDING[dtype], "atol": ROUNDING[dtype] * 1e-2}
    (y, row), (own, own_row) = between_nans(torch.zeros_like(x)), between_nans(x)
    activate(x, None, curve, y)
    torch.testing.assert_close(y, want.to(dtype), **tolerances)
    activate(own, factor, curve, own)
    torch.testing.assert_close(own, (want * factor.float()).to(dtype), **tolerances)
    assert_alone_is_written(row)
    assert_alone_is_written(own_row)


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize("name", ["silu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "quick_gelu"])
@torch.inference_mode()
def test_an_activation_s_place_is_taken_in_every_type(name: str) -> None:
    model = nn.ModuleDict({"act": ACT2FN[name]})
    fuse_activations(model, KERNELS)
    activation, module = model["act"], ACT2FN[name]
    assert type(activation) is Activation
    for dtype in (*DTYPES, torch.float64):
        x = random(1, 3, 7, dtype=dtype)
        rounding = 4 * ROUNDING.get(dtype, 0)
        for rows in (x, x.transpose(1, 2)):
            torch.testing.assert_close(activation(rows), module(rows), rtol=rounding, atol=rounding)
            assert not activation(rows).isnan().any()
    extremes = torch.tensor([0.0, -0.0, 1e4, -1e4, 90.0, -90.0, 1e30, torch.nan], device=DEVICE)
    torch.testing.assert_close(activation(extremes), module(extremes), equal_nan=True)


@pytest.mark.parametrize("name", ["gelu", "gelu_10", "relu", "mish", "linear", "sigmoid"])
def test_curves_that_only_look_alike_in_16_bits_go_on_themselves(name: str) -> None:
    model = nn.ModuleDict({"act": ACT2FN[name]})
    fuse_activations(model, KERNELS)
    assert type(model["act"]) is type(ACT2FN[name])


def fuse(model: PreTrainedModel, kernels: LayerKernels = KERNELS) -> list[str]:
    """The names of all types of modules that it has afterwards."""
    install_attention(model)
    fuse_activations(model, kernels)
    fuse_rotary(model, probe(model).layers, kernels)
    return [type(module).__name__ for module in model.modules()]


@torch.inference_mode()
def logits(model: PreTrainedModel) -> Tensor:
    return run_model(model, Recording(), (7, 3, 9, 4, 1, 1, 8), (0, 1, 2, 3, 90, 91, 255), range(7))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_a_model_gives_the_same_with_a_launch_each(
    family: str, dtype: torch.dtype, tiny_model: TinyModel
) -> None:
    model = tiny_model(family).to(DEVICE, dtype)
    install_attention(model)
    want_TV = logits(model)
    names = fuse(model)
    assert names.count(RotaryAttention.__name__) == names.count(GatedMLP.__name__) == 3
    tolerance = 20 * ROUNDING[dtype] * float(want_TV.abs().max())
    torch.testing.assert_close(logits(model), want_TV, rtol=0, atol=tolerance)


class FarScaled(LlamaAttention):
    """Attends less from afar, as a few families do."""

    def forward(self, hidden_states: Tensor, *, position_ids: Tensor, **others: Any) -> Any:
        output, weights = super().forward(hidden_states, position_ids=position_ids, **others)
        return output / (1 + position_ids // 8192)[..., None], weights


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_that_do_something_else_go_on_in_every_type(dtype: torch.dtype, tiny_model: TinyModel) -> None:
    far = tiny_model("llama").to(DEVICE, dtype)
    far.model.layers[1].self_attn.__class__ = FarScaled
    names = fuse(far)
    assert (names.count("FarScaled"), names.count("RotaryAttention")) == (1, 2)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    for config in (CohereConfig(**SIZES, **heads), StableLmConfig(**SIZES, **heads)):
        other = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
        assert RotaryAttention.__name__ not in fuse(other.to(DEVICE))


def test_kernels_that_fail_on_a_device_replace_nothing(tiny_model: TinyModel) -> None:
    def fails(*args: object) -> None:
        raise TritonError("no such instruction")

    model = tiny_model("llama").to(DEVICE)
    before = [type(module).__name__ for module in model.modules()]
    assert fuse(model, replace(KERNELS, rotate=fails, activate=fails)) == before
