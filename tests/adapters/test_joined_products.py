"""Adapters of low rank that join the base product give the bits that they give when they are added to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from timbre_methods.program import AdapterProgram, LowRank
from timbre_server.adapters.adapted_model import AdaptedModel, Arithmetic
from timbre_server.adapters.groups import LinearGroup
from timbre_server.engine.native_linear import NativeProduct
from timbre_server.engine.packed_linear import PackedLinear
from timbre_server.native.joining import Joining
from timbre_server.operators.row_table import RowTable, Span

IN, OUT = 70, 77
PATH = "layer"


class Apart:
    """A product that nobody may join."""

    def __init__(self, product: PackedLinear) -> None:
        self.product = product

    def __call__(self, x: Tensor) -> Tensor:
        return self.product(x)

    def in_float32(self, x: Tensor) -> Tensor:
        return self.product.in_float32(x)


def low_rank(rank: int, dtype: torch.dtype) -> LowRank:
    return LowRank(torch.randn(rank, IN).to(dtype), torch.randn(OUT, rank).to(dtype))


SPANS = [
    Span(1, ((0, 1.0),)),
    Span(2),
    Span(2, ((1, -0.5),)),
    Span(45, ((2, 1.0),)),
    Span(3, ((3, 2.0),)),
    Span(7, ((3, 1.0), (1, 0.25), (0, 3.0))),
    Span(5, ((2, 1.0),)),
]


@pytest.mark.cpp
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [True, False])
@torch.inference_mode()
def test_joined_products_have_the_bits_of_added_ones(
    has_bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    layer = nn.Linear(IN, OUT, bias=has_bias).to(dtype)
    packed = PackedLinear(layer, NativeProduct(layer.weight), layer.bias, plain_rows=0)
    adapters = [low_rank(1, dtype), low_rank(8, torch.float16), low_rank(8, torch.bfloat16)]
    adapters.append(low_rank(19, torch.float32))
    num_joined = 0
    join = PackedLinear.joined

    def counted(self: PackedLinear, x: Tensor, joining: Joining, y: Tensor | None = None) -> Tensor | None:
        nonlocal num_joined
        num_joined += 1
        return join(self, x, joining, y)

    monkeypatch.setattr(PackedLinear, "joined", counted)

    def outputs(product: Callable[[Tensor], Tensor], spans: list[Span], x_1TI: Tensor) -> Tensor:
        model = nn.ModuleDict({PATH: layer})
        adapted = AdaptedModel(model, [LinearGroup((PATH,))], Arithmetic(lambda _: product, "native"))
        for slot, part in enumerate(adapters):
            adapted.put(slot, AdapterProgram({PATH: (part,)}))
        table = RowTable(spans)
        adapted.set_rows(table, table)
        found: Tensor = model[PATH](x_1TI)
        adapted.clear_rows()
        return found

    of_chunks = [replace(span, in_chunk=span.num_rows > 2) for span in SPANS]
    for spans in (SPANS, SPANS[::-1], SPANS[:1], SPANS[3:4], of_chunks, of_chunks[::-1], of_chunks[3:4]):
        x_1TI = torch.randn(1, sum(span.num_rows for span in spans), IN).to(dtype)
        got, want = (outputs(product, spans, x_1TI) for product in (packed, Apart(packed)))
        assert got.dtype is want.dtype is dtype
        assert torch.equal(got, want)
    assert num_joined == 7


class AsItIs(Apart):
    """A product whose sums nobody may ask for."""

    def in_float32(self, x: Tensor) -> Tensor:
        raise AssertionError("nothing is added to these")


@pytest.mark.cpp
@torch.inference_mode()
def test_a_layer_that_no_adapter_of_the_batch_changes_runs_its_product_as_it_is() -> None:
    torch.manual_seed(1)
    model = nn.ModuleDict({path: nn.Linear(IN, OUT).bfloat16() for path in ("changed", "left")})
    products = {
        layer: PackedLinear(layer, NativeProduct(layer.weight), layer.bias, plain_rows=0)
        for layer in model.values()
    }
    left = products[model["left"]]
    products[model["left"]] = AsItIs(left)
    adapted = AdaptedModel(model, [LinearGroup(("changed", "left"))], Arithmetic(products.get, "native"))
    adapted.put(0, AdapterProgram({"changed": (low_rank(8, torch.bfloat16),)}))
    table = RowTable([Span(2, ((0, 1.0),)), Span(1)])
    x_1TI = torch.randn(1, 3, IN).bfloat16()
    adapted.set_rows(table, table)
    changed, same = model["changed"](x_1TI), model["left"](x_1TI)
    adapted.clear_rows()
    assert torch.equal(same, left(x_1TI))
    assert not torch.equal(changed[0, :2], model["changed"].base(x_1TI)[0, :2])
