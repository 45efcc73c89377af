"""`Spectral`: ``y += Q (S (P x))`` in a transform pair that all adapters share.

The input is transformed once for the whole batch and for every member of the group, the small cores run in
the frequency domain (a mix adds there), and each member's sums are transformed back once.

For ``dft`` the spectra of real rows are half redundant. A coefficient c at (u, v) acts on real input as
its mirror image at (−u, −v) with the conjugate input, so each one is folded to ``v ≤ I/2``, ``u ≤ O/2``:

    y = Re ifft_O(S · ifft_I(x))  =  irfft_O(H),   H[u'] += f · c · z*,   z = rfft_I(x)[v']

with z* = z or its conjugate and f = 1/(2I), or 1/I where u' is its own mirror (0 and O/2, whose imaginary
part the real inverse transform drops). Interleaving real and imaginary parts makes S a real sparse
matrix with two entries for each coefficient. Only its values are an adapter's own.

Legend: T rows of the batch, U rows that use any spectral part, P pooled (row, adapter) pairs, N coefficients,
I in, O out, F = 2 (I/2 + 1) or 2 (O/2 + 1) reals of a half spectrum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from timbre_methods.program import Places, Spectral
from timbre_server.operators.block_diagonal import BlockDiagonal, csr
from timbre_server.operators.contract import Bound, Change, Meaning, Operator, Uses
from timbre_server.operators.row_table import RowTable, Segment

MIN_ROWS_ALONE = 8


class SpectralOperator(Operator[Spectral]):
    part = Spectral

    def __init__(self) -> None:
        self._folded: WeakKeyDictionary[Places, _FoldedPlaces] = WeakKeyDictionary()

    def meaning(self, part: Spectral, x_TI: Tensor, y_TO: Tensor) -> Meaning:
        places = part.places
        z_TI = torch.fft.ifft(x_TI)
        h_TO = torch.zeros(y_TO.shape, dtype=z_TI.dtype, device=x_TI.device)
        h_TO.index_add_(1, places.rows_N, z_TI[:, places.columns_N] * part.c_N)
        return Meaning(change_TO=torch.fft.ifft(h_TO).real)

    def bind(self, uses: Uses[Spectral], table: RowTable) -> Bound:
        segments = [s for s in table.segments if any(s.slot in parts for parts in uses)]
        rows_U = table.rows_using({segment.slot for segment in segments})
        position_T = torch.arange(table.num_rows, device=table.device)
        if rows_U is not None:
            position_T[rows_U] = torch.arange(len(rows_U), device=table.device)
        placed = [_moved(segment, position_T) for segment in segments]
        num_rows = table.num_rows if rows_U is None else len(rows_U)
        return _BoundSpectral(rows_U, [self._bind_member(parts, placed, num_rows) for parts in uses])

    def _bind_member(
        self, parts_by_slot: Mapping[int, Sequence[Spectral]], segments: Sequence[Segment], num_rows: int
    ) -> _Member | None:
        """``segments`` count rows among the ``num_rows`` that use a spectral part."""
        cores: list[_Alone | _Pool] = []
        pooled: dict[_FoldedPlaces, list[tuple[Segment, Tensor]]] = {}
        out_features = 0
        for segment in segments:
            for part in parts_by_slot.get(segment.slot, ()):
                folded = self._fold(part.places, part.c_N.device)
                out_features = part.places.out_features
                if len(segment.rows_N) >= MIN_ROWS_ALONE:
                    cores.append(_Alone.of(folded, segment, part.c_N))
                else:
                    pooled.setdefault(folded, []).append((segment, part.c_N))
        cores += (_Pool.of(folded, pairs, num_rows) for folded, pairs in pooled.items())
        return _Member(out_features, cores) if cores else None

    def _fold(self, places: Places, device: torch.device) -> _FoldedPlaces:
        """Folded once for each shared basis, and kept as long as it, on the device of those who use it."""
        folded = self._folded.get(places)
        if folded is None:
            folded = self._folded[places] = _FoldedPlaces.of(places, device)
        return folded


def _moved(segment: Segment, position_T: Tensor) -> Segment:
    """The segment in rows of which some were left out; what was consecutive stays so."""
    first = None if segment.first is None else int(position_T[segment.first])
    return Segment(segment.slot, position_T[segment.rows_N], segment.weights_N, first)


@dataclass(slots=True, eq=False)
class _FoldedPlaces:
    """The pattern of S as a real matrix [F_out, F_in], and how its values follow from c."""

    row_ends: Tensor
    columns: Tensor
    source: Tensor
    factor: Tensor
    shape: tuple[int, int]
    laid_out: tuple[int, Tensor, Tensor] | None = None
    """The pattern laid along a diagonal, so many times; fewer times is a prefix of it."""

    @staticmethod
    def of(places: Places, device: torch.device) -> _FoldedPlaces:
        out_features, in_features = places.out_features, places.in_features
        u, v = places.rows_N, places.columns_N
        mirrored = u > out_features // 2
        # ifft_I(x)[v] is conj(rfft(x)[v]) / I, and for the upper half rfft(x)[I - v] / I.
        conjugate = (v <= in_features // 2) ^ mirrored
        u = torch.where(mirrored, out_features - u, u)
        v = torch.where(v > in_features // 2, in_features - v, v)
        own_mirror = (u == 0) | (2 * u == out_features)
        factor = torch.where(own_mirror, 1.0, 0.5) / in_features
        rows = torch.stack([2 * u, 2 * u + 1], 1).flatten()
        columns = torch.stack([2 * v, 2 * v + 1], 1).flatten()
        factors = torch.stack([factor, torch.where(conjugate, -factor, factor)], 1).flatten()
        order = torch.argsort(rows, stable=True)
        shape = (2 * (out_features // 2 + 1), 2 * (in_features // 2 + 1))
        row_ends = torch.searchsorted(rows[order], torch.arange(shape[0] + 1, device=rows.device))
        return _FoldedPlaces(
            row_ends.to(device, torch.int32),
            columns[order].to(device, torch.int32),
            (order // 2).to(device),
            factors[order].to(device, torch.float32),
            shape,
        )

    def values(self, c_N: Tensor) -> Tensor:
        """The matrix's values, of one adapter or, with leading dimensions, of several."""
        return c_N.index_select(-1, self.source) * self.factor

    def repeated(self, pairs: int) -> tuple[Tensor, Tensor]:
        """Row ends and columns of the pattern once for each pair."""
        if self.laid_out is None or self.laid_out[0] < pairs:
            laid_out = BlockDiagonal.repeated(self.row_ends, self.columns, pairs, self.shape)
            self.laid_out = pairs, *laid_out
        _, row_ends, columns = self.laid_out
        return row_ends[: pairs * self.shape[0] + 1], columns[: pairs * len(self.columns)]


@dataclass(frozen=True, slots=True, eq=False)
class _Alone:
    """One adapter with many rows: its core, applied to all of them at once."""

    segment: Segment
    matrix: Tensor

    @staticmethod
    def of(folded: _FoldedPlaces, segment: Segment, c_N: Tensor) -> _Alone:
        matrix = csr(folded.row_ends, folded.columns, folded.values(c_N), folded.shape)
        return _Alone(segment, matrix)

    def add(self, z_UF: Tensor, h_UF: Tensor) -> None:
        index = self.segment.index
        h_FN = self.matrix @ z_UF[index].T.contiguous()
        h_UF[index] += h_FN.T * self.segment.weights_N.unsqueeze(1)


@dataclass(frozen=True, slots=True, eq=False)
class _Pool:
    """Adapters with few rows: one core for each (row, adapter) pair, applied together."""

    rows_P: Tensor
    is_every_row: bool
    cores: BlockDiagonal

    @staticmethod
    def of(folded: _FoldedPlaces, uses: Sequence[tuple[Segment, Tensor]], num_rows: int) -> _Pool:
        rows_P = torch.cat([segment.rows_N for segment, _ in uses])
        weights_P = torch.cat([segment.weights_N for segment, _ in uses])
        repeats = torch.tensor([len(segment.rows_N) for segment, _ in uses], device=rows_P.device)
        c_PN = torch.stack([c_N for _, c_N in uses]).repeat_interleave(repeats, 0) * weights_P.unsqueeze(1)
        pairs = len(rows_P)
        values = folded.values(c_PN).flatten()
        cores = BlockDiagonal(*folded.repeated(pairs), values, pairs=pairs, shape=folded.shape)
        is_every_row = torch.equal(rows_P, torch.arange(num_rows, device=rows_P.device))
        return _Pool(rows_P, is_every_row, cores)

    def add(self, z_UF: Tensor, h_UF: Tensor) -> None:
        h_UF.index_add_(0, self.rows_P, self.cores(z_UF[self.rows_P]))


@dataclass(frozen=True, slots=True, eq=False)
class _Member:
    out_features: int
    cores: Sequence[_Alone | _Pool]

    def change(self, z_UF: Tensor) -> Tensor:
        """[U, O]: back from the summed spectra."""
        half = self.out_features // 2 + 1
        spectrum = torch.view_as_complex(self._summed(z_UF, 2 * half).view(-1, half, 2))
        y_UO: Tensor = torch.fft.irfft(spectrum, n=self.out_features)
        return y_UO

    def _summed(self, z_UF: Tensor, size: int) -> Tensor:
        only = self.cores[0] if len(self.cores) == 1 else None
        if isinstance(only, _Pool) and only.is_every_row:
            return only.cores(z_UF)
        h_UF = z_UF.new_zeros(z_UF.shape[0], size)
        for core in self.cores:
            core.add(z_UF, h_UF)
        return h_UF


class _BoundSpectral(Bound):
    def __init__(self, rows_U: Tensor | None, members: Sequence[_Member | None]) -> None:
        self._rows_U = rows_U
        self._members = members

    def sums(self, x_TI: Tensor) -> Sequence[Sequence[Change]]:
        x_UI = x_TI if self._rows_U is None else x_TI[self._rows_U]
        z_UF = torch.view_as_real(torch.fft.rfft(x_UI)).flatten(1)
        return [
            () if member is None else (Change(member.change(z_UF), self._rows_U),) for member in self._members
        ]
