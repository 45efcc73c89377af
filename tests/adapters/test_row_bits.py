"""In C++ a row's bits are its own, by whatever means other adapters of the batch are added."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from timbre_methods.packed_parts import PackedDense
from timbre_methods.program import (
    AdapterProgram,
    Basis,
    Block,
    Circulant,
    Dense,
    Diagonal,
    Kronecker,
    LowRank,
    Part,
    Projected,
    Rotation,
    Sparse,
)
from timbre_methods.routing import Routed, Router, Rule
from timbre_server.adapters.adapted_model import AdaptedModel, Arithmetic
from timbre_server.adapters.groups import LinearGroup
from timbre_server.adapters.packed_parts import in_packed_basis
from timbre_server.engine.native_linear import NativeProduct
from timbre_server.engine.packed_linear import PackedLinear
from timbre_server.native.panels import in_panels
from timbre_server.operators.row_table import Pairs, RowTable, Span

IN, OUT = 70, 60
PATH = "layer"


@pytest.mark.cpp
@pytest.mark.usefixtures("threads")
@torch.inference_mode()
def test_kinds_of_parts_are_added_in_one_order_whoever_is_beside_them() -> None:
    torch.manual_seed(3)
    layer = nn.Linear(IN, OUT)
    model = nn.ModuleDict({PATH: layer})
    adapted = AdaptedModel(model, [LinearGroup((PATH,))], Arithmetic(kernels="native"))
    kinds = [
        part for part in parts(torch.float32) if isinstance(part, LowRank | Diagonal | Dense | Kronecker)
    ]
    for slot, own in enumerate((kinds, kinds[::-1])):
        adapted.put(slot, AdapterProgram({PATH: tuple(own)}))
    x_1TI = torch.randn(1, 1, IN).expand(1, 2, IN).contiguous()
    found = []
    for slots in ((0,), (1, 0), (0, 1)):
        table = RowTable([Span(1, ((slot, 1.0),)) for slot in slots])
        adapted.set_rows(table, table)
        found.append(model[PATH](x_1TI[:, : len(slots)])[0, slots.index(0)])
        adapted.clear_rows()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def parts(dtype: torch.dtype) -> list[Part]:
    """Of one adapter each; the last is the only one whose operator does not add by itself."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    low_rank = [LowRank(normal(8, IN).to(kind), normal(OUT, 8).to(kind)) for kind in (dtype, torch.float16)]
    rotation = Rotation("input", normal(1, 5, 14, 14) / 4, (14,))
    scaled = Rotation("input", normal(1, 5, 14, 14) / 4, (14,), normal(OUT))
    circulant = Circulant(normal(OUT // 10, IN // 10, 10 // 2 + 1, 2), 10)
    basis = Basis(normal(1, 9, IN), normal(1, OUT, 9))
    projected = [Projected("diagonal", normal(1, 9), basis, outer_NO=normal(1, OUT)) for _ in range(5)]
    square = Basis(normal(1, 9, IN), normal(1, OUT, 9))
    projected += [Projected("dense", normal(9, 9), square) for _ in range(2)]
    every = torch.arange(9)
    projected.append(Projected("sparse", normal(9), square, every, every * 2 % 9))
    packed = [in_packed_basis(part) for part in projected[-4:]]
    kronecker = Kronecker(normal(3, 7), normal(OUT // 3, IN // 7))
    block = Block("input", torch.randperm(IN, generator=generator)[:20], normal(OUT, 20), OUT)
    sparse = Sparse(torch.arange(OUT + 1), torch.arange(OUT, dtype=torch.int32), normal(OUT), IN)
    gain = Diagonal("output", normal(OUT), None)
    experts = tuple((LowRank(normal(3, IN).to(dtype), normal(OUT, 3).to(dtype)),) for _ in range(5))
    mixture = Routed(experts, Router(normal(5, IN), Rule(keep="top_k", top_k=2, gate="renormalised")))
    gains = tuple((Diagonal("output", normal(OUT), normal(OUT)),) for _ in range(3))
    scaled_by_gates = Routed(gains, Router(normal(3, IN), Rule()))
    dense = [Dense(normal(OUT, IN)), PackedDense(in_panels(normal(OUT, IN), is_rounded=True), (OUT, IN))]
    changes = circulant, kronecker, block, *dense, mixture, mixture, scaled_by_gates
    return [*low_rank, gain, rotation, scaled, *projected, *packed, *changes, sparse]


@pytest.mark.cpp
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_row_has_the_same_bits_whatever_adapters_are_beside_it(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    layer = nn.Linear(IN, OUT).to(dtype)
    model = nn.ModuleDict({PATH: layer})
    packed = PackedLinear(layer, NativeProduct(layer.weight), layer.bias, plain_rows=0)
    adapted = AdaptedModel(model, [LinearGroup((PATH,))], Arithmetic(lambda _: packed, "native"))
    given = parts(dtype)
    for slot, part in enumerate(given):
        adapted.put(slot, AdapterProgram({PATH: (part,)}))
    of_both_sides = [slot for slot, part in enumerate(given) if isinstance(part, Diagonal | Rotation)]
    mix = tuple((slot, 0.5) for slot in of_both_sides)
    uses: list[Pairs] = [mix, *(((slot, 1.0),) for slot in range(len(given))), ()]
    x_1TI = torch.randn(1, len(uses), IN).to(dtype)

    def outputs(rows: list[int]) -> Tensor:
        table = RowTable([Span(1, uses[row]) for row in rows])
        adapted.set_rows(table, table)
        found: Tensor = model[PATH](x_1TI[:, rows])[0]
        adapted.clear_rows()
        return found

    everything = list(range(len(uses)))
    *adding, sparse, base = everything
    whole, some = outputs(everything), outputs(adding)
    assert whole.dtype is dtype
    assert torch.equal(some, whole[:sparse])
    assert torch.equal(outputs(adding[1:]), some[1:])
    for row in (*adding, base):
        assert torch.equal(outputs([row])[0], whole[row])


@pytest.mark.cpp
@torch.inference_mode()
def test_a_mixture_keeps_its_bits_beside_one_that_is_left_to_pytorch() -> None:
    torch.manual_seed(0)
    inner, out, num_rows = 514, 514, 500
    layer = nn.Linear(inner, out, bias=False).bfloat16()
    model = nn.ModuleDict({PATH: layer})
    packed = PackedLinear(layer, NativeProduct(layer.weight), None, plain_rows=0)
    adapted = AdaptedModel(model, [LinearGroup((PATH,))], Arithmetic(lambda _: packed, "native"))
    experts = [
        (LowRank(torch.randn(rank, inner).bfloat16() / 5, torch.randn(out, rank).bfloat16()),)
        for rank in (4, 6)
    ]
    top_1 = Rule(keep="top_k", top_k=1)
    adapted.put(0, AdapterProgram({PATH: (Routed(tuple(experts), Router(torch.randn(2, inner), top_1)),)}))
    unlike = (Dense(torch.randn(out, inner)),), (Diagonal("output", torch.randn(out)),)
    adapted.put(1, AdapterProgram({PATH: (Routed(unlike, Router(torch.randn(2, inner), Rule())),)}))
    x_1TI = torch.randn(1, num_rows + 1, inner).bfloat16()

    def outputs(*spans: Span) -> Tensor:
        table = RowTable(spans)
        adapted.set_rows(table, table)
        found: Tensor = model[PATH](x_1TI[:, : table.num_rows])[0, :num_rows]
        adapted.clear_rows()
        return found

    own = Span(num_rows, ((0, 1.0),))
    assert torch.equal(outputs(own), outputs(own, Span(1, ((1, 1.0),))))
