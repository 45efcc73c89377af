"""Packed products equal the layers they stand for, and what cannot be packed is left alone."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from timbre_server.engine import native_linear, packed_linear
from timbre_server.engine.packed_linear import LinearPacker
from timbre_server.native.library import LibraryUnavailable
from timbre_server.operators.catalogue import why_not

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
NATIVE = [dtype for dtype in TOLERANCE if native_linear.serves(dtype) and why_not("native") is None]
IN_CPP = pytest.mark.skipif(torch.float32 not in NATIVE, reason="no C++ products on this machine")
KINDS = [(dtype, False) for dtype in TOLERANCE] + [(dtype, True) for dtype in NATIVE]
"""Types, and whether C++ may be used."""


def packer_for(dtype: torch.dtype, *, native: bool = False) -> LinearPacker:
    packer = LinearPacker(dtype, CPU, native=native)
    if not packer.works:
        pytest.skip(f"this processor packs no {dtype}")
    return packer


@pytest.mark.parametrize(("dtype", "native"), KINDS)
@pytest.mark.parametrize("rows", [(1,), (1, 0), (1, 1), (1, 3), (17,), (1, 1, 64), (300,)])
@pytest.mark.parametrize("features", [(48, 80), (37, 45)])
@pytest.mark.parametrize(
    "make", [nn.Linear, lambda i, o: nn.Linear(i, o, bias=False), lambda i, o: Conv1D(o, i)]
)
def test_a_packed_product_equals_the_layer(
    dtype: torch.dtype, native: bool, rows: tuple[int, ...], features: tuple[int, int], make: object
) -> None:
    torch.manual_seed(1)
    layer = make(*features).to(dtype)  # type: ignore[operator]
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    product = packer_for(dtype, native=native).pack(layer)
    assert product is not None
    x = torch.randn(*rows, features[0]).to(dtype)
    with torch.inference_mode():
        got, want = product(x), layer(x)
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    torch.testing.assert_close(got, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize(("dtype", "native"), KINDS)
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_weight_of_no_module_is_multiplied_and_not_kept(
    dtype: torch.dtype, native: bool, has_bias: bool
) -> None:
    torch.manual_seed(1)
    packer = packer_for(dtype, native=native)
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


@pytest.mark.parametrize(("dtype", "native"), KINDS)
def test_weights_that_begin_at_one_place_are_packed_each(dtype: torch.dtype, native: bool) -> None:
    packer, whole, first = packer_for(dtype, native=native), nn.Linear(24, 64), nn.Linear(24, 16)
    whole.to(dtype), first.to(dtype)
    first.weight = nn.Parameter(whole.weight[:16], requires_grad=False)
    x = torch.randn(3, 24).to(dtype)
    with torch.inference_mode():
        for layer in (whole, first):
            torch.testing.assert_close(
                packer.product_of(layer)(x), layer(x), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
            )


def test_one_and_two_float32_rows_are_the_layer_s_own_bits() -> None:
    torch.manual_seed(1)
    layer = nn.Linear(576, 192)
    product = packer_for(torch.float32).pack(layer)
    assert product is not None
    x_TI = torch.randn(2, 576)
    with torch.inference_mode():
        assert torch.equal(product(x_TI), layer(x_TI))


@pytest.mark.parametrize("dtype", NATIVE)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_has_the_same_bits_whatever_rows_are_beside_it(threads: int, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    product = packer_for(dtype, native=True).pack(nn.Linear(577, 200).to(dtype))
    assert product is not None
    x_TI = torch.randn(2 * 301, 577).to(dtype)[::2]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            whole_TO = product(x_TI)
            for first, last in ((0, 1), (3, 5), (7, 12), (20, 36), (40, 61), (100, 220), (250, 301)):
                assert torch.equal(product(x_TI[first:last]), whole_TO[first:last])
    finally:
        torch.set_num_threads(before)


@IN_CPP
@pytest.mark.parametrize(("num_in", "num_out"), [(64, 96), (37, 45), (1, 1), (3, 16), (66, 17)])
def test_weights_that_16_bits_hold_give_the_same_bits_from_half_the_bytes(num_in: int, num_out: int) -> None:
    torch.manual_seed(1)
    narrow_OI = torch.randn(num_out, num_in).bfloat16().float()
    wide_OI = torch.cat([narrow_OI, torch.full((1, num_in), 0.1)])
    in_half, whole = map(native_linear.NativeProduct, (narrow_OI, wide_OI))
    sizes = [product.panels.element_size() for product in (in_half, whole)]
    assert sizes == [2, 4]
    bias_O = torch.randn(num_out + 1)
    for num_rows in (1, 2, 5, 6, 41):
        x_TI = torch.randn(num_rows, num_in)
        want_TO = nn.functional.linear(x_TI, wide_OI, bias_O)
        got_TO = whole(x_TI, bias_O)
        torch.testing.assert_close(got_TO, want_TO, rtol=1e-5, atol=1e-5)
        assert torch.equal(in_half(x_TI, bias_O[:-1]), got_TO[:, :-1])


@pytest.mark.parametrize(("dtype", "native"), KINDS)
def test_sums_may_stay_in_float32(dtype: torch.dtype, native: bool) -> None:
    torch.manual_seed(1)
    product = packer_for(dtype, native=native).pack(nn.Linear(48, 80).to(dtype))
    assert product is not None
    x = torch.randn(2, 9, 48).to(dtype)
    with torch.inference_mode():
        sums = product.in_float32(x)
        assert sums.dtype is torch.float32
        assert torch.equal(sums.to(dtype), product(x))


@pytest.mark.parametrize("dtype", NATIVE)
def test_a_weight_that_is_no_number_spoils_its_own_output_alone(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    layer = nn.Linear(48, 80, bias=False).to(dtype)
    x = torch.randn(3, 48).to(dtype)
    with torch.inference_mode():
        want = layer(x)
        layer.weight[7, 5] = torch.nan
        product = packer_for(dtype, native=True).pack(layer)
        assert product is not None
        got = product(x)
        assert got[:, 7].isnan().all()
        got[:, 7] = want[:, 7]
    torch.testing.assert_close(got, want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@IN_CPP
def test_c_plus_plus_is_taken_only_where_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[torch.Tensor] = []

    class Watched(native_linear.NativeProduct):
        def __init__(self, weight_OI: torch.Tensor, place: packed_linear.Place) -> None:
            packed.append(weight_OI)
            super().__init__(weight_OI, place)

    monkeypatch.setattr(packed_linear, "NativeProduct", Watched)
    LinearPacker(torch.float32, CPU)
    LinearPacker(torch.float16, CPU, native=True)
    assert not packed
    LinearPacker(torch.float32, CPU, native=True)
    assert packed


def test_without_a_compiler_the_next_layout_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_product(weight_OI: torch.Tensor, place: packed_linear.Place) -> packed_linear.BiasedProduct:
        raise LibraryUnavailable("no C++ compiler was found")

    monkeypatch.setattr(packed_linear, "NativeProduct", no_product)
    for dtype in (torch.float32, torch.bfloat16):
        assert LinearPacker(dtype, CPU, native=True).works == LinearPacker(dtype, CPU).works


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
