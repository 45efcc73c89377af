"""Whether operators that were compiled for this machine compute what their parts mean: tried at the start.

Small parts of each kind, factors in each of their formats, on one row and on several, against
`Operator.meaning`.

Legend: T rows, I in features, O out features, N entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from timbre_methods.packed_parts import PackedBasis, PackedDense, PackedProjected
from timbre_methods.program import (
    Basis,
    Block,
    Circulant,
    Dense,
    Diagonal,
    Kronecker,
    LowRank,
    Part,
    Places,
    Projected,
    Rotation,
    Sparse,
    Spectral,
)
from timbre_methods.sliced_ellpack import SlicedEllpack
from timbre_server.native.formats import FORMATS
from timbre_server.native.panels import in_panels
from timbre_server.operators.contract import Bound, Change, Operator
from timbre_server.operators.rotation import narrowed
from timbre_server.operators.row_table import RowTable, Span
from timbre_server.operators.sliced_ellpack import slices_of

IN, OUT = 24, 20
CIRCULANT_IN, CIRCULANT_OUT = 1320, 880
"""Pieces of 4, 11, 40 and 88 fit."""
_TOLERANCE = 1e-4
_ROUNDED = 1e-2
"""Of the largest change, where what is multiplied is rounded to bfloat16."""


def wrong_operator(
    operators: Iterable[Operator[Any]], device: torch.device, counts: Sequence[int] = (1, 11)
) -> Operator[Any] | None:
    """The first whose changes are not those of its meaning, for so many rows."""
    return next((operator for operator in operators if not _agrees(operator, device, counts)), None)


def _agrees(operator: Operator[Any], device: torch.device, counts: Sequence[int]) -> bool:
    """Each example alone, for so many rows, and all side by side."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    parts = [example(normal, device) for example in _EXAMPLES[operator.part]]
    tries = [([part], [Span(count, ((0, 0.5),))]) for part, count in product(parts, counts)]
    tries.append((parts, 2 * [Span(1, ((slot, 0.5),)) for slot in range(len(parts))]))
    return all(_is_right(operator, own, RowTable(spans, device), normal) for own, spans in tries)


@torch.inference_mode()
def _is_right(operator: Operator[Any], parts: Sequence[Part], table: RowTable, normal: Normal) -> bool:
    num_in, num_out = (CIRCULANT_IN, CIRCULANT_OUT) if operator.part is Circulant else (IN, OUT)
    x_TI, y_TO = normal(table.num_rows, num_in), normal(table.num_rows, num_out)
    expected_TO, found_TO = torch.zeros_like(y_TO), torch.zeros_like(y_TO)
    for segment in table.segments:
        rows_N = segment.rows_N
        change_NO = operator.meaning(parts[segment.slot], x_TI[rows_N], y_TO[rows_N]).change_TO
        assert change_NO is not None, "the examples are changes of the output"
        expected_TO[rows_N] += segment.weights_N.unsqueeze(1) * change_NO
    bound = operator.bind([{slot: [part] for slot, part in enumerate(parts)}], table)
    for change in _changes(bound, x_TI, y_TO):
        change.add_to(found_TO)
    if operator.part in (PackedDense, PackedProjected):
        return bool((found_TO - expected_TO).abs().max() <= _ROUNDED * expected_TO.abs().max())
    return torch.allclose(found_TO, expected_TO, rtol=_TOLERANCE, atol=_TOLERANCE)


def _changes(bound: Bound, x_TI: Tensor, y_TO: Tensor) -> list[Change]:
    found = [change for member in bound.sums(x_TI) for change in member]
    from_output = bound.output_change(0, y_TO)
    return found if from_output is None else [*found, from_output]


Normal = Callable[..., Tensor]
Transform = Literal["dft", "dct", "hartley", "dwt"]


def _low_rank(normal: Normal, device: torch.device, dtype: torch.dtype) -> Part:
    return LowRank(normal(9, IN).to(dtype), normal(OUT, 9).to(dtype))


def _spectral(
    normal: Normal, device: torch.device, transform: Transform, step: int, low_pass: tuple[float, ...] = ()
) -> Part:
    order_N = torch.arange(30)
    return Spectral(normal(30), Places(transform, OUT, IN, order_N * 7 % OUT, order_N * step % IN, low_pass))


def _circulant(normal: Normal, device: torch.device, block_size: int) -> Part:
    shape = CIRCULANT_OUT // block_size, CIRCULANT_IN // block_size, block_size // 2 + 1, 2
    return Circulant(normal(*shape) / 4, block_size)


def _sparse(normal: Normal, device: torch.device) -> Sparse:
    """Rows of none, one, two and three entries in turn."""
    counts_O = torch.arange(OUT) % 4
    row_ends = torch.cat([torch.zeros(1, dtype=torch.int64), counts_O.cumsum(0)])
    columns_N = torch.cat([torch.arange(n) * 7 for n in counts_O.tolist()]).int()
    return Sparse(row_ends.to(device), columns_N.to(device), normal(len(columns_N)), IN)


def _sliced_ellpack(normal: Normal, device: torch.device, dtype: torch.dtype) -> Part:
    """Two whole slices and a half."""
    part = slices_of(_sparse(normal, device))
    return replace(part, values_KC=part.values_KC.to(dtype))


def _block(normal: Normal, device: torch.device, side: Literal["input", "output"]) -> Part:
    index_N = torch.tensor([3, 17, 4], device=device)
    return Block(side, index_N, normal(3, IN) if side == "output" else normal(OUT, 3), OUT)


def _dense(normal: Normal, device: torch.device) -> Part:
    return Dense(normal(OUT, IN))


def _packed_dense(normal: Normal, device: torch.device) -> Part:
    return PackedDense(in_panels(normal(OUT, IN), is_rounded=True), (OUT, IN))


def _projected(
    normal: Normal, device: torch.device, blocks: tuple[int, int], size: int, has: str = ""
) -> Part:
    """Of so many blocks of P and of Q, with the vectors that it has."""
    p_blocks, q_blocks = blocks
    q_NOQ = (normal(OUT, q_blocks, size) / 4).transpose(0, 1)
    basis, count = Basis(normal(p_blocks, size, IN) / 4, q_NOQ), max(blocks)
    inner_NI = normal(count, IN) if has == "inner" else None
    outer_NO = normal(count, OUT) if has == "outer" else None
    return Projected("diagonal", normal(count, size), basis, inner_NI=inner_NI, outer_NO=outer_NO)


def _core(normal: Normal, device: torch.device, form: Literal["dense", "sparse"]) -> Part:
    """From five directions to nine; some entries of a sparse one share a place."""
    basis = Basis(normal(1, 5, IN) / 4, normal(1, OUT, 9) / 4)
    if form == "dense":
        return Projected(form, normal(9, 5), basis)
    order_K = torch.arange(16, device=device)
    return Projected(form, normal(16), basis, order_K * 5 % 9, order_K % 9 % 5)


def _packed(normal: Normal, device: torch.device, example: Callable[[Normal, torch.device], Part]) -> Part:
    part = example(normal, device)
    assert isinstance(part, Projected)
    p_NPI, q_NOQ = part.basis.p_NPI, part.basis.q_NOQ
    p_panels, q_panels = (
        in_panels(side, is_rounded=True) for side in (p_NPI.flatten(0, 1), q_NOQ.transpose(0, 1).flatten(1))
    )
    (num_p, p_size, _), (num_q, _, q_size) = p_NPI.shape, q_NOQ.shape
    basis = PackedBasis(p_panels, q_panels, (num_p, p_size, IN), (num_q, OUT, q_size))
    return PackedProjected(
        part.form, part.core, basis, part.rows_K, part.columns_K, part.inner_NI, part.outer_NO
    )


def _rotation(normal: Normal, device: torch.device) -> Part:
    """Of pairs of entries that lie apart."""
    return Rotation("output", normal(2, 5, 4, 4) / 2, (OUT, 4))


def _shared_rotation(normal: Normal, device: torch.device) -> Part:
    """One block for both halves of the output."""
    return Rotation("output", normal(1, 1, OUT // 2, OUT // 2) / 4, (OUT // 2,))


def _whole_rotation(normal: Normal, device: torch.device) -> Rotation:
    return Rotation("output", normal(1, 1, OUT, OUT) / 4, (OUT,))


def _narrow_rotation(normal: Normal, device: torch.device) -> Part:
    return narrowed(_whole_rotation(normal, device))


def _kronecker(normal: Normal, device: torch.device, l_size: int, m_size: int, rank: int | None) -> Part:
    """With w2 whole or of a rank."""
    w1_LM, k_size, n_size = normal(l_size, m_size), OUT // l_size, IN // m_size
    if rank is None:
        return Kronecker(w1_LM, normal(k_size, n_size))
    return Kronecker(w1_LM, normal(k_size, rank), normal(rank, n_size))


def _diagonal(normal: Normal, device: torch.device) -> Part:
    return Diagonal("output", normal(OUT), normal(OUT))


_IN_BASES: Sequence[Callable[[Normal, torch.device], Part]] = (
    partial(_projected, blocks=(1, 1), size=5, has="outer"),
    partial(_projected, blocks=(1, 3), size=16, has="inner"),
    partial(_projected, blocks=(60, 60), size=12),
    partial(_core, form="dense"),
    partial(_core, form="sparse"),
)
_EXAMPLES: Mapping[type[Part], Sequence[Callable[[Normal, torch.device], Part]]] = MappingProxyType(
    {
        LowRank: [partial(_low_rank, dtype=dtype) for dtype in FORMATS],
        Spectral: [
            partial(_spectral, transform="dft", step=5),
            partial(_spectral, transform="dft", step=11),
            partial(_spectral, transform="dct", step=5),
            partial(_spectral, transform="hartley", step=5),
            partial(_spectral, transform="dwt", step=5, low_pass=(0.5**0.5, 0.5**0.5)),
        ],
        Circulant: [partial(_circulant, block_size=b) for b in (4, 11, 40, 88)],
        Sparse: [_sparse],
        SlicedEllpack: [partial(_sliced_ellpack, dtype=dtype) for dtype in FORMATS],
        Block: [partial(_block, side="input"), partial(_block, side="output")],
        Dense: [_dense],
        PackedDense: [_packed_dense],
        Projected: _IN_BASES,
        PackedProjected: [partial(_packed, example=example) for example in _IN_BASES],
        Diagonal: [_diagonal],
        Kronecker: [
            partial(_kronecker, l_size=l_size, m_size=m_size, rank=rank)
            for l_size, m_size in ((1, 1), (1, 3), (4, 8), (10, 2), (20, 24))
            for rank in (None, 1, 10)
        ],
        Rotation: [_rotation, _shared_rotation, _whole_rotation, _narrow_rotation],
    }
)
