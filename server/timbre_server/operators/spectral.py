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
from dataclasses import dataclass, field

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
        self._folded: dict[int, _FoldedPlaces] = {}

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
        return _BoundSpectral(rows_U, [self._bind_member(parts, segments, position_T) for parts in uses])

    def _bind_member(
        self, parts_by_slot: Mapping[int, Sequence[Spectral]], segments: Sequence[Segment], position_T: Tensor
    ) -> _Member | None:
        alone: list[_Core] = []
        pooled: dict[_FoldedPlaces, list[tuple[Segment, Tensor]]] = {}
        out_features = 0
        for segment in segments:
            for part in parts_by_slot.get(segment.slot, ()):
                folded = self._fold(part.places)
                out_features = part.places.out_features
                if len(segment.rows_N) >= MIN_ROWS_ALONE:
                    rows, weights = position_T[segment.rows_N], segment.weights_N.unsqueeze(1)
                    matrix = csr(folded.row_ends, folded.columns, folded.values(part.c_N), folded.shape)
                    alone.append(_Core(rows, weights, matrix))
                else:
                    pooled.setdefault(folded, []).append((segment, part.c_N))
        if not alone and not pooled:
            return None
        pools = [_pool(folded, uses, position_T) for folded, uses in pooled.items()]
        return _Member(out_features, [*alone, *pools])

    def _fold(self, places: Places) -> _FoldedPlaces:
        """Folded once for each shared basis; kept while the process lives, as the basis itself is."""
        folded = self._folded.get(id(places))
        if folded is None:
            folded = self._folded[id(places)] = _FoldedPlaces.of(places)
        return folded


@dataclass(frozen=True, slots=True, eq=False)
class _FoldedPlaces:
    """The pattern of S as a real matrix [F_out, F_in], and how its values follow from c."""

    places: Places
    row_ends: Tensor
    columns: Tensor
    source: Tensor
    factor: Tensor
    shape: tuple[int, int]
    repeats: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """The pattern laid along a diagonal so many times: as many entries as sizes of a decode batch."""

    @staticmethod
    def of(places: Places) -> _FoldedPlaces:
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
            places, row_ends.int(), columns[order].int(), order // 2, factors[order].float(), shape
        )

    def values(self, c_N: Tensor) -> Tensor:
        """The matrix's values, of one adapter or, with leading dimensions, of several."""
        return c_N.index_select(-1, self.source) * self.factor

    def repeated(self, pairs: int) -> tuple[Tensor, Tensor]:
        found = self.repeats.get(pairs)
        if found is None:
            found = BlockDiagonal.repeated(self.row_ends, self.columns, pairs, self.shape)
            self.repeats[pairs] = found
        return found


@dataclass(frozen=True, slots=True, eq=False)
class _Core:
    """One adapter with many rows: its core, applied to all of them at once."""

    rows_N: Tensor
    weights_N1: Tensor
    matrix: Tensor

    def add(self, z_UF: Tensor, h_UF: Tensor) -> None:
        h_NF = (self.matrix @ z_UF[self.rows_N].T.contiguous()).T
        h_UF.index_add_(0, self.rows_N, h_NF * self.weights_N1)


@dataclass(frozen=True, slots=True, eq=False)
class _Pool:
    """Adapters with few rows: one core for each (row, adapter) pair, applied together."""

    rows_P: Tensor
    cores: BlockDiagonal

    def add(self, z_UF: Tensor, h_UF: Tensor) -> None:
        h_UF.index_add_(0, self.rows_P, self.cores(z_UF[self.rows_P]))


def _pool(folded: _FoldedPlaces, uses: Sequence[tuple[Segment, Tensor]], position_T: Tensor) -> _Pool:
    repeats = torch.tensor([len(segment.rows_N) for segment, _ in uses], device=position_T.device)
    weights_P = torch.cat([segment.weights_N for segment, _ in uses])
    c_PN = torch.stack([c_N for _, c_N in uses]).repeat_interleave(repeats, 0) * weights_P.unsqueeze(1)
    pairs = len(weights_P)
    row_ends, columns = folded.repeated(pairs)
    values = folded.values(c_PN).flatten()
    rows_P = position_T[torch.cat([segment.rows_N for segment, _ in uses])]
    return _Pool(rows_P, BlockDiagonal(row_ends, columns, values, pairs=pairs, shape=folded.shape))


@dataclass(frozen=True, slots=True, eq=False)
class _Member:
    out_features: int
    cores: Sequence[_Core | _Pool]

    def change(self, z_UF: Tensor) -> Tensor:
        half = self.out_features // 2 + 1
        h_UF = z_UF.new_zeros(z_UF.shape[0], 2 * half)
        for core in self.cores:
            core.add(z_UF, h_UF)
        spectrum = torch.view_as_complex(h_UF.view(-1, half, 2))
        y_UO: Tensor = torch.fft.irfft(spectrum, n=self.out_features)
        return y_UO


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
