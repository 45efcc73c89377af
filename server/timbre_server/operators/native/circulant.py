"""`Circulant` in C++: pieces are transformed side by side, spectra multiplied where an adapter's lie.

Blocks of a size with a prime factor above 256 run in the plain operator.

Legend: T rows of the batch, I in, O out, N pieces of the input, M of the output, K frequencies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from timbre_methods.program import Circulant
from timbre_server.native.library import ADDRESS, NUMBER, ROWS, kernel
from timbre_server.operators.circulant import CirculantOperator
from timbre_server.operators.contract import Bound, Members, Standing, StandingOperator, uses_of
from timbre_server.operators.joined_sums import JoinedSums
from timbre_server.operators.live_rows import LiveRows
from timbre_server.operators.native.bound_kernels import BoundKernels, Sources
from timbre_server.operators.native.fourier import MOST_ROWS, Plan, factors_of
from timbre_server.operators.native.prepared import MemberParts, Prepared, PreparedParts
from timbre_server.operators.native.uses import Uses
from timbre_server.operators.row_table import RowTable

_Place = tuple[int, int]
"""A member of a group, and a size of blocks."""

_Spectra = Mapping[int, Tensor]
"""By the size of blocks: those of all rows' pieces, [T, N, K, 2] and some numbers more."""


class _Prepared:
    """One adapter's parts at a group of layers: by the size of blocks, and those that are not served."""

    def __init__(self, members: Members[Circulant], plans: Mapping[int, Plan]) -> None:
        self.others = [[part for part in own if part.block_size not in plans] for own in members]
        self.sizes = {
            b: PreparedParts([[_prepared(p, plan) for p in own if p.block_size == b] for own in members])
            for b, plan in plans.items()
        }


class NativeCirculant(StandingOperator[Circulant, _Prepared], CirculantOperator):
    """`CirculantOperator` by ``circulant.cpp``."""

    def __init__(self) -> None:
        self._plans: dict[int, Plan] = {}
        self.sources = Sources()

    def prepared(self, members: Members[Circulant]) -> _Prepared:
        sizes = {part.block_size for own in members for part in own}
        return _Prepared(members, {b: self.plan(b) for b in sorted(sizes) if factors_of(b) is not None})

    def standing(self, rows: LiveRows) -> Standing[_Prepared]:
        return _StandingCirculants(self, rows)

    def plan(self, length: int) -> Plan:
        """The same one for whoever asks, on any thread."""
        return self._plans.get(length) or self._plans.setdefault(length, Plan(length))


def _prepared(part: Circulant, plan: Plan) -> Prepared:
    """As ``Circulant`` of ``circulant.cpp``."""
    b, spectrum_MNK2 = part.block_size, part.spectrum_MNK2.contiguous()
    num_out, num_in, _, _ = spectrum_MNK2.shape
    work = 2 * spectrum_MNK2.numel() + 8 * b * (num_in + num_out)
    fields = plan.address, num_in, spectrum_MNK2.data_ptr()
    return Prepared(fields, (num_out * b, num_in * b), work, (plan, spectrum_MNK2))


class _SpectraKernel:
    """What transforms the input in pieces of one size, for all members."""

    def __init__(self, plan: Plan, in_features: int, rows: LiveRows) -> None:
        self._plan, self._in_features = plan, in_features
        self._row_size = in_features // plan.length * plan.coordinates
        self._uses = Uses(rows)
        self._run = kernel("timbre_circulant_spectra", ADDRESS, ADDRESS, NUMBER, ROWS, NUMBER, ADDRESS)

    def admit(self, slot: int) -> None:
        work = 8 * self._in_features
        parts = MemberParts((self._plan.address,), (self._in_features, self._in_features), work, self._plan)
        self._uses.admit(slot, parts)

    def dismiss(self, slot: int) -> None:
        self._uses.dismiss(slot)

    def spectra(self, x_TI: Tensor, sources: Sources) -> Tensor:
        """For the rows that use them; ``x_TI`` is of float32 or of bfloat16."""
        num_rows = x_TI.numel() // self._in_features
        # Kernels read whole registers, beyond the last row's end.
        z = sources.empty(num_rows * self._row_size + MOST_ROWS)
        x = x_TI.data_ptr(), x_TI.dtype is torch.bfloat16, num_rows, self._in_features
        self._run(self._uses.address, *x, z.data_ptr(), torch.get_num_threads())
        return z


class _SizeKernel:
    """The blocks of one size at one member."""

    def __init__(self, out_features: int, rows: LiveRows) -> None:
        self.out_features = out_features
        self.uses = Uses(rows)
        self._run = kernel("timbre_circulant", ADDRESS, ADDRESS, ROWS, ADDRESS, NUMBER)

    def add(self, z: Tensor, y_TO: Tensor) -> None:
        rows = y_TO.numel() // self.out_features
        addresses = z.data_ptr(), rows, y_TO.data_ptr()
        self._run(self.uses.address, *addresses, self.out_features, torch.get_num_threads())


class _Member:
    """The `Kernel` of one member: those of all sizes."""

    def __init__(self, sizes: Mapping[int, _SizeKernel]) -> None:
        self._sizes = sizes

    @property
    def out_features(self) -> int:
        return next(iter(self._sizes.values())).out_features

    @property
    def rows_N(self) -> Tensor:  # noqa: N802
        return torch.tensor(sorted({row for own in self._sizes.values() for row in own.uses.rows_N.tolist()}))

    def add(self, source: _Spectra, y_TO: Tensor) -> None:
        for b, own in self._sizes.items():
            own.add(source[b], y_TO)


class _StandingCirculants(Standing[_Prepared]):
    def __init__(self, operator: NativeCirculant, rows: LiveRows) -> None:
        self._operator, self._rows = operator, rows
        self._spectra: dict[int, _SpectraKernel] = {}
        self._kernels: dict[_Place, _SizeKernel] = {}
        self._places: dict[int, frozenset[_Place]] = {}
        """By slot."""
        self._others: dict[int, Members[Circulant]] = {}
        """By slot, of those that have any."""
        self._num_members = 0
        self._bounds: dict[frozenset[_Place], _BoundCirculants] = {}

    def admit(self, slot: int, prepared: _Prepared) -> None:
        self._num_members = len(prepared.others)
        sizes = prepared.sizes.items()
        parts = {(member, b): own for b, each in sizes for member, own in each.members.items()}
        self._places[slot] = frozenset(parts)
        if any(prepared.others):
            self._others[slot] = prepared.others
        for (member, b), own in parts.items():
            out_features, in_features = own.shape
            if b not in self._spectra:
                self._spectra[b] = _SpectraKernel(self._operator.plan(b), in_features, self._rows)
            if (member, b) not in self._kernels:
                self._kernels[member, b] = _SizeKernel(out_features, self._rows)
            self._kernels[member, b].uses.admit(slot, own)
        for b in prepared.sizes:
            self._spectra[b].admit(slot)

    def dismiss(self, slot: int) -> None:
        self._others.pop(slot, None)
        places = self._places.pop(slot)
        for place in places:
            self._kernels[place].uses.dismiss(slot)
        for b in {b for _, b in places}:
            self._spectra[b].dismiss(slot)

    def bound(self, table: RowTable) -> Bound:
        """Of those sizes alone that the table's adapters have."""
        self._rows.show(table)
        places = frozenset[_Place]().union(*(self._places.get(slot, ()) for slot in table.slots))
        if places not in self._bounds:
            self._bounds[places] = self._bound(places)
        found = self._bounds[places]
        others = {slot: self._others[slot] for slot in table.slots if slot in self._others}
        if not others:
            return found
        return JoinedSums([found, CirculantOperator.bind(self._operator, uses_of(others), table)])

    def _bound(self, places: Iterable[_Place]) -> _BoundCirculants:
        members: list[dict[int, _SizeKernel]] = [{} for _ in range(self._num_members)]
        for member, b in sorted(places):
            members[member][b] = self._kernels[member, b]
        spectra = {b: self._spectra[b] for b in sorted({b for _, b in places})}
        return _BoundCirculants(members, spectra, self._operator.sources)


class _BoundCirculants(BoundKernels):
    def __init__(
        self,
        members: Sequence[Mapping[int, _SizeKernel]],
        spectra: Mapping[int, _SpectraKernel],
        sources: Sources,
    ) -> None:
        super().__init__([_Member(own) if own else None for own in members])
        self._spectra, self._sources = spectra, sources

    def source(self, x_TI: Tensor) -> _Spectra:
        x_TI = x_TI if x_TI.dtype is torch.bfloat16 else x_TI.float()
        return {b: own.spectra(x_TI, self._sources) for b, own in self._spectra.items()}
