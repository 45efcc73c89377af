"""`Projected` in C++: every matrix of a basis is read once for many uses.

Where all blocks of P read the same input they are one matrix, as are all blocks of Q that add to the same
output; blocks with vectors of their own between are as many uses of the one block that they have in common.
Matrices that are laid out in another way run in the plain operator. What a packed basis multiplies is rounded
to bfloat16: rows, and what P makes of them.

Legend: T rows of the batch, N blocks, I in, O out, P and Q sizes of the basis, K places of a sparse core.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from timbre_methods.packed_parts import PackedBasis, PackedProjected
from timbre_methods.program import Basis, Projected, Sparse
from timbre_server.native.formats import format_of
from timbre_server.native.library import ADDRESS, NUMBER, ROWS, kernel
from timbre_server.operators.contract import Bound, Members, Standing, StandingOperator, uses_of
from timbre_server.operators.joined_sums import JoinedSums
from timbre_server.operators.live_rows import LiveRows
from timbre_server.operators.native.bound_kernels import BoundKernels, Sources
from timbre_server.operators.native.prepared import Prepared, PreparedParts
from timbre_server.operators.native.sliced_ellpack import prepared_slices
from timbre_server.operators.native.structures import Fields, address_of, structures
from timbre_server.operators.native.uses import Uses
from timbre_server.operators.packed_projected import PackedProjectedOperator, has_whole_sides, unpacked
from timbre_server.operators.projected import ProjectedOperator
from timbre_server.operators.row_table import RowTable
from timbre_server.operators.sliced_ellpack import MAX_NUMBER, slices_of

InBasis = Projected | PackedProjected
_FORMS = ("diagonal", "dense", "sparse")


@dataclass(frozen=True, slots=True, eq=False)
class _Prepared:
    """One adapter's parts at a group of layers."""

    matrices: Sequence[Fields]
    """Every P that is multiplied by x itself, whichever members need it."""
    shrinks: PreparedParts
    """The same, as if they were parts of one member."""
    parts: PreparedParts
    others: Members[Projected]
    """Parts that the plain operator runs; empty if there are none."""


class NativeProjected(StandingOperator[Projected, _Prepared], ProjectedOperator):
    """`ProjectedOperator` by ``projected.cpp``."""

    def __init__(self) -> None:
        super().__init__()
        self._sources = Sources()

    def prepared(self, members: Members[Projected]) -> _Prepared:
        others = [[part for part in own if not _is_served(part)] for own in members]
        return _all_prepared([[part for part in own if _is_served(part)] for own in members], others)

    def standing(self, rows: LiveRows) -> Standing[_Prepared]:
        return _StandingProjected(rows, self._sources)


class NativePackedProjected(StandingOperator[PackedProjected, _Prepared], PackedProjectedOperator):
    """`PackedProjectedOperator` by the same."""

    def __init__(self) -> None:
        super().__init__()
        self._sources = Sources()

    def prepared(self, members: Members[PackedProjected]) -> _Prepared:
        others = [[unpacked(part) for part in own if not _is_sliced(part)] for own in members]
        return _all_prepared([[part for part in own if _is_sliced(part)] for own in members], others)

    def standing(self, rows: LiveRows) -> Standing[_Prepared]:
        return _StandingProjected(rows, self._sources)


def _all_prepared(served: Members[InBasis], others: Members[Projected]) -> _Prepared:
    bases = [part.basis for own in served for part in own if part.inner_NI is None]
    matrices = {_p_fields(basis): basis for basis in bases}
    shrinks = [Prepared(p, (p[1], p[2]), p[1] * p[2], basis) for p, basis in matrices.items()]
    parts = PreparedParts([[_prepared(part) for part in own] for own in served])
    return _Prepared(tuple(matrices), PreparedParts([shrinks]), parts, others if any(others) else ())


def _is_served(part: Projected) -> bool:
    lies = _p_lies(part.basis.p_NPI) and _q_lies(part.basis.q_NOQ)
    return lies and has_whole_sides(part) and _is_sliced(part)


def _is_sliced(part: InBasis) -> bool:
    """Whether numbers of 16 bits say all of a sparse core, if it is one; places may be equal."""
    if part.form != "sparse":
        return True
    assert part.rows_K is not None
    p_shape, q_shape = _shapes(part.basis)
    counts = [p_shape[1], q_shape[2]]
    if len(part.rows_K) > MAX_NUMBER:
        counts.append(int(torch.bincount(part.rows_K).max()))
    return max(counts) <= MAX_NUMBER


def _p_lies(p_NPI: Tensor) -> bool:
    """Whether all rows of all blocks follow one another, each of consecutive numbers."""
    return p_NPI.stride(2) == 1 and (
        p_NPI.shape[0] == 1 or p_NPI.stride(0) == p_NPI.shape[1] * p_NPI.stride(1)
    )


def _q_lies(q_NOQ: Tensor) -> bool:
    """Whether each row of all blocks is of consecutive numbers, block after block."""
    return q_NOQ.stride(2) == 1 and (q_NOQ.shape[0] == 1 or q_NOQ.stride(0) == q_NOQ.shape[2])


def _shapes(basis: Basis | PackedBasis) -> tuple[Sequence[int], Sequence[int]]:
    """Of P and of Q."""
    if isinstance(basis, PackedBasis):
        return basis.p_shape, basis.q_shape
    return basis.p_NPI.shape, basis.q_NOQ.shape


def _p_fields(basis: Basis | PackedBasis) -> Fields:
    """``Matrix`` of ``matrices.h``."""
    num_blocks, size, in_features = _shapes(basis)[0]
    shape = num_blocks * size, in_features
    if isinstance(basis, PackedBasis):
        return basis.p_panels.data_ptr(), *shape, 0
    return basis.p_NPI.data_ptr(), *shape, basis.p_NPI.stride(1)


def _q_fields(basis: Basis | PackedBasis) -> Fields:
    """``Matrix`` of ``matrices.h``."""
    num_blocks, out_features, size = _shapes(basis)[1]
    shape = out_features, num_blocks * size
    if isinstance(basis, PackedBasis):
        return basis.q_panels.data_ptr(), *shape, 0
    return basis.q_NOQ.data_ptr(), *shape, basis.q_NOQ.stride(1)


def _prepared(part: InBasis) -> Prepared:
    """As ``Projected`` of ``projected.cpp``."""
    p, q, core = _p_fields(part.basis), _q_fields(part.basis), _prepared_core(part)
    vectors = [None if own is None else own.contiguous() for own in (part.inner_NI, part.outer_NO)]
    addresses = [0 if own is None else own.data_ptr() for own in vectors]
    num_blocks, size = part.core.shape if part.form == "diagonal" else (1, p[1])
    out_features, in_features = q[1], p[2]
    reading = in_features if part.inner_NI is not None else 0
    work = core.work + num_blocks * size * reading + q[2] * out_features
    fields = *p, *q, *core.fields, *addresses, num_blocks, size, _FORMS.index(part.form)
    return Prepared(fields, (out_features, in_features), work, (part.basis, core, vectors))


def _prepared_core(part: InBasis) -> Prepared:
    """With the address of its numbers, or of ``Slices``."""
    p_shape, q_shape = _shapes(part.basis)
    shape = q_shape[2], p_shape[1]
    if part.form == "sparse":
        slices = prepared_slices(slices_of(_in_rows(part, shape)))
        own = structures([slices.fields])
        return Prepared((address_of(own),), shape, slices.work, (own, slices))
    core = part.core.contiguous()
    return Prepared((core.data_ptr(),), shape, core.numel(), core)


def _in_rows(part: InBasis, shape: tuple[int, int]) -> Sparse:
    """A sparse core [Q, P]."""
    assert part.rows_K is not None
    assert part.columns_K is not None
    order_K = part.rows_K.argsort(stable=True)
    counts_Q = torch.bincount(part.rows_K, minlength=shape[0])
    row_ends = torch.cat([counts_Q.new_zeros(1), counts_Q.cumsum(0)])
    return Sparse(row_ends, part.columns_K[order_K].to(torch.int32), part.core[order_K], shape[1])


class _StandingProjected(Standing[_Prepared]):
    def __init__(self, rows: LiveRows, sources: Sources) -> None:
        self._rows, self._sources = rows, sources
        self._adapters: dict[int, _Prepared] = {}
        self._num_users: Counter[Fields] = Counter()
        """Of each P that is multiplied by x itself."""
        self._width = 0
        """Numbers that all of these make of a row."""
        self._shrinks = Uses(rows)
        self._members: dict[int, tuple[int, Uses]] = {}
        """Of those that have parts: out features, and uses."""
        self._bound: _BoundProjected | None = None

    def admit(self, slot: int, prepared: _Prepared) -> None:
        self._adapters[slot] = prepared
        for p in prepared.matrices:
            self._width += 0 if self._num_users[p] else p[1]
            self._num_users[p] += 1
        for own in prepared.shrinks.members.values():
            self._shrinks.admit(slot, own)
        for member, own in prepared.parts.members.items():
            if member not in self._members:
                self._members[member] = own.shape[0], Uses(self._rows)
                self._bound = None
            self._members[member][1].admit(slot, own)

    def dismiss(self, slot: int) -> None:
        for p in self._adapters.pop(slot).matrices:
            self._num_users[p] -= 1
            if not self._num_users[p]:
                del self._num_users[p]
                self._width -= p[1]
        self._shrinks.dismiss(slot)
        for _, uses in self._members.values():
            uses.dismiss(slot)

    def bound(self, table: RowTable) -> Bound:
        self._rows.show(table)
        adapters = {slot: self._adapters[slot] for slot in table.slots if slot in self._adapters}
        if self._bound is None or self._bound.width < self._width:
            num_members = next(iter(adapters.values())).parts.num_members
            own = [self._members.get(member) for member in range(num_members)]
            self._bound = _BoundProjected(own, self._shrinks, self._width, self._sources)
        others = {slot: own.others for slot, own in adapters.items() if own.others}
        if not others:
            return self._bound
        plain = ProjectedOperator().bind(uses_of(others), table)
        return JoinedSums([self._bound, plain])


class _Member:
    """The `Kernel` of one member, which reads what is made of x for all of them."""

    def __init__(self, out_features: int, uses: Uses, shrinks: Uses, width: int) -> None:
        self.out_features, self._uses, self._shrinks, self._width = out_features, uses, shrinks, width
        self._run = kernel("timbre_projected", ADDRESS, ADDRESS, ADDRESS, ROWS, NUMBER, ADDRESS, NUMBER)

    @property
    def rows_N(self) -> Tensor:  # noqa: N802
        return self._uses.rows_N

    def add(self, source: Tensor, y_TO: Tensor) -> None:
        uses = self._uses.address, self._shrinks.address
        z = source.data_ptr(), len(source), source.shape[1] - self._width
        self._run(*uses, *z, y_TO.data_ptr(), self.out_features, torch.get_num_threads())


class _BoundProjected(BoundKernels):
    """For one table after another, while no more lies between P and Q than there is room for."""

    def __init__(
        self, members: Sequence[tuple[int, Uses] | None], shrinks: Uses, width: int, sources: Sources
    ) -> None:
        super().__init__([None if own is None else _Member(*own, shrinks, width) for own in members])
        self._shrinks, self.width, self._sources = shrinks, width, sources
        self._run = kernel("timbre_projected_in", ADDRESS, ADDRESS, NUMBER, ROWS, NUMBER, ADDRESS)

    def source(self, x_TI: Tensor) -> Tensor:
        """Rows of x and what P makes of them: room for both, where they lie one after the other."""
        in_features = x_TI.shape[-1]
        num_rows = x_TI.numel() // in_features
        z = self._sources.empty(num_rows, in_features + self.width)
        x = x_TI.data_ptr(), format_of(x_TI), num_rows, in_features
        self._run(self._shrinks.address, *x, z.data_ptr(), torch.get_num_threads())
        return z
