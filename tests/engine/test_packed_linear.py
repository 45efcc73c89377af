"""Packed products equal the layers they stand for, and what cannot be packed is left alone."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from timbre_server.engine.packed_linear import LinearPacker

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def packer_for(dtype: torch.dtype) -> LinearPacker:
    packer = LinearPacker(dtype, CPU)
    if not packer.works:
        pytest.skip(f"this processor packs no {dtype}")
    return packer


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("rows", [(1,), (1, 0), (1, 1), (1, 3), (17,), (1, 1, 64)])
@pytest.mark.parametrize(
    "make", [nn.Linear, lambda i, o: nn.Linear(i, o, bias=False), lambda i, o: Conv1D(o, i)]
)
def test_a_packed_product_equals_the_layer(dtype: torch.dtype, rows: tuple[int, ...], make: object) -> None:
    torch.manual_seed(1)
    layer = make(48, 80).to(dtype)  # type: ignore[operator]
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    product = packer_for(dtype).pack(layer)
    assert product is not None
    x = torch.randn(*rows, 48).to(dtype)
    with torch.inference_mode():
        got, want = product(x), layer(x)
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    torch.testing.assert_close(got, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_weight_of_no_module_is_multiplied_and_not_kept(dtype: torch.dtype, has_bias: bool) -> None:
    torch.manual_seed(1)
    packer = packer_for(dtype)
    weight_OI = torch.randn(80, 48).to(dtype)
    bias_O = torch.randn(80).to(dtype) if has_bias else None
    product, kept = packer.product_with(weight_OI, bias_O), weakref.ref(weight_OI)
    with torch.inference_mode():
        for num_rows in (1, 3, 17):
            x = torch.randn(1, num_rows, 48).to(dtype)
            want = nn.functional.linear(x, weight_OI, bias_O)
            torch.testing.assert_close(product(x), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert packer.bytes_with(weight_OI) == 2 * weight_OI.nbytes, "as it is, and packed"
    del product, weight_OI
    assert kept() is None


def test_one_and_two_float32_rows_are_the_layer_s_own_bits() -> None:
    torch.manual_seed(1)
    layer = nn.Linear(576, 192)
    product = packer_for(torch.float32).pack(layer)
    assert product is not None
    x_TI = torch.randn(2, 576)
    with torch.inference_mode():
        assert torch.equal(product(x_TI), layer(x_TI))


def test_packing_leaves_a_tied_weight_where_and_as_it_is() -> None:
    embedding, head = nn.Embedding(64, 16), nn.Linear(16, 64, bias=False)
    head.weight = embedding.weight
    before, pointer = embedding.weight.detach().clone(), embedding.weight.data_ptr()
    product = packer_for(torch.float32).pack(head)
    assert product is not None
    with torch.inference_mode():
        product(torch.randn(8, 16))
    assert head.weight is embedding.weight
    assert embedding.weight.data_ptr() == pointer
    assert torch.equal(embedding.weight, before)


class ScaledLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_what_is_not_plainly_a_linear_of_the_dtype_is_used_as_it_is() -> None:
    packer = packer_for(torch.float32)
    subclass, other_dtype, other_kind = ScaledLinear(8, 8), nn.Linear(8, 8).half(), nn.LayerNorm(8)
    for module in (subclass, other_dtype, other_kind):
        assert not packer.takes(module)
        assert packer.pack(module) is None
        assert packer.product_of(module) is module


def test_nothing_is_packed_off_the_cpu_or_in_a_dtype_that_is_not_tried() -> None:
    assert not LinearPacker(torch.float32, torch.device("meta")).works
    assert not LinearPacker(torch.float64, CPU).works
    assert LinearPacker(torch.float64, CPU).pack(nn.Linear(4, 4).double()) is None
