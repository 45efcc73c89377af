"""`Projected` on a GPU: all cores of a basis in one launch, and one for what comes after Q.

P is one product for all rows, by the platform's library, as in the twin. Then a program has one row and a
tile of the core's outputs; it reads z once and sums the row's pairs, so that a mix goes through Q once::

    diagonal    h[j] = z[j] Σ w d[j]            dense    h[q] = Σ w Σ_p S[q, p] z[p]

Cores are read where they lie. Where an outer vector comes after Q, pairs stay apart until there, and a tile
of the product with Q is scaled before it leaves the chip: ``y = outer ∘ (Q h)``, with pairs by `PAIRS` and
outputs by `OUTPUTS`. Inner vectors, several outer ones and sparse cores (RandLoRA, some of SVFT's) are the
twin's, and dense cores of an adapter with many rows, for which one product of its own reads the core once.

All in float32. Checked under Triton's interpreter and on an H200.

Legend: as in `timbre_server.operators.projected`; R rows of a launch, A uses, P pairs of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

from timbre_methods.program import Projected
from timbre_server.operators.contract import Bound, Change, Uses
from timbre_server.operators.joined_sums import JoinedSums
from timbre_server.operators.projected import ProjectedOperator
from timbre_server.operators.row_table import RowTable
from timbre_server.operators.triton.launch import addresses
from timbre_server.operators.triton.row_uses import RowUses, apart, by_row, divided

MAX_ROWS = 16
"""Of one adapter, for which a launch reads its dense core once a row."""

LANES = tl.constexpr(256)
"""Of a diagonal, in one program."""

CORE_ROWS = tl.constexpr(16)
CORE_COLUMNS = tl.constexpr(64)
PAIRS = tl.constexpr(16)
OUTPUTS = tl.constexpr(64)
INNER = tl.constexpr(32)


@triton.jit
def _diagonals(z, places, uses, core_A, h, size):
    """``h[r, j] = z[places[r], j] · Σ w core[j]``."""
    row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * LANES + tl.arange(0, LANES)
    is_in = j < size
    total = tl.zeros((LANES,), tl.float32)
    for pair in range(tl.load(uses.starts + row), tl.load(uses.starts + row + 1)):
        core = tl.load(core_A + tl.load(uses.use_P + pair)).to(tl.pointer_type(tl.float32))
        total += tl.load(uses.weights_P + pair) * tl.load(core + j, is_in, 0.0)
    place = row if places is None else tl.load(places + row)
    tl.store(h + row * size + j, total * tl.load(z + place * size + j, is_in, 0.0), is_in)


@triton.jit
def _dense_cores(z, places, uses, core_A, h, num_outputs, num_inputs):
    """``h[r, q] = Σ w Σ_p core[q, p] z[places[r], p]``."""
    row = tl.program_id(0).to(tl.int64)
    q = tl.program_id(1) * CORE_ROWS + tl.arange(0, CORE_ROWS)
    place = row if places is None else tl.load(places + row)
    total = tl.zeros((CORE_ROWS,), tl.float32)
    for pair in range(tl.load(uses.starts + row), tl.load(uses.starts + row + 1)):
        core = tl.load(core_A + tl.load(uses.use_P + pair)).to(tl.pointer_type(tl.float32))
        products = tl.zeros((CORE_ROWS, CORE_COLUMNS), tl.float32)
        for first in range(0, num_inputs, CORE_COLUMNS):
            p = first + tl.arange(0, CORE_COLUMNS)
            is_in = (q[:, None] < num_outputs) & (p[None, :] < num_inputs)
            values = tl.load(core + q[:, None] * num_inputs + p[None, :], is_in, 0.0)
            products += values * tl.load(z + place * num_inputs + p, p < num_inputs, 0.0)[None, :]
        total += tl.load(uses.weights_P + pair) * tl.sum(products, 1)
    tl.store(h + row * num_outputs + q, total, q < num_outputs)


@triton.jit
def _scaled_products(h, q, outer_A, use_P, y, num_rows, num_outputs, size):
    """``y[r, o] = outer[o] · Σ_j q[o, j] h[r, j]`` with the outer vector of row r's use."""
    row = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)[:, None]
    o = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)[None, :]
    total = tl.zeros((PAIRS, OUTPUTS), tl.float32)
    for first in range(0, size, INNER):
        j = first + tl.arange(0, INNER)
        h_rj = tl.load(h + row * size + j[None, :], (row < num_rows) & (j[None, :] < size), 0.0)
        q_jo = tl.load(q + o.to(tl.int64) * size + j[:, None], (o < num_outputs) & (j[:, None] < size), 0.0)
        total = tl.dot(h_rj, q_jo, total, input_precision="ieee")
    is_out = (row < num_rows) & (o < num_outputs)
    use = tl.load(use_P + row, row < num_rows, 0)
    outer = tl.load(outer_A + use).to(tl.pointer_type(tl.float32))
    tl.store(y + row * num_outputs + o, total * tl.load(outer + o, is_out, 0.0), is_out)


class TritonProjected(ProjectedOperator):
    def bind(self, uses: Uses[Projected], table: RowTable) -> Bound:
        own, others = divided(uses, table, _has_kernel)
        if not any(own):
            return super().bind(others, table)
        bound = BoundCores.of(own, table)
        return JoinedSums([bound, super().bind(others, table)]) if any(others) else bound


def _has_kernel(part: Projected, num_rows: int) -> bool:
    if part.form == "sparse" or part.inner_NI is not None:
        return False
    if part.outer_NO is not None and len(part.outer_NO) > 1:
        return False
    return part.form == "diagonal" or num_rows <= MAX_ROWS


def _alike(part: Projected) -> tuple[object, ...]:
    """What parts of one launch have in common."""
    return id(part.basis.p_NPI), id(part.basis.q_NOQ), part.form, part.core.shape, part.outer_NO is None


@dataclass(frozen=True, slots=True, eq=False)
class _Shrink:
    """One P with the rows that use it, and where each row of the batch is among them."""

    p_XI: Tensor
    rows_N: Tensor | None
    place_T: Tensor | None

    @staticmethod
    def of(p_NPI: Tensor, slots: Collection[int], table: RowTable) -> _Shrink:
        rows_N = table.rows_using(slots)
        place_T = None
        if rows_N is not None:
            place_T = torch.zeros(table.num_rows, dtype=torch.int64, device=table.device)
            place_T[rows_N] = torch.arange(len(rows_N), device=table.device)
        return _Shrink(p_NPI.flatten(0, 1), rows_N, place_T)

    def places(self, rows_R: Tensor | None) -> Tensor | None:
        """Of rows of the batch; None where they are all rows in order."""
        if rows_R is None or self.place_T is None:
            return rows_R
        return self.place_T[rows_R]

    def __call__(self, x_TI: Tensor) -> Tensor:
        return linear(x_TI if self.rows_N is None else x_TI[self.rows_N], self.p_XI)


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """Parts of one kind at one member that have the same basis."""

    parts: Sequence[Projected]
    rows_R: Tensor | None
    places_R: Tensor | None
    num_rows: int
    uses: RowUses
    cores: Sequence[Tensor]
    core_A: Tensor
    outers: Sequence[Tensor]
    outer_A: Tensor | None

    @staticmethod
    def of(
        parts_by_slot: Mapping[int, Sequence[Projected]], shrinks: Mapping[int, _Shrink], table: RowTable
    ) -> _Batch:
        own = [(segment, part) for segment in table.segments for part in parts_by_slot.get(segment.slot, ())]
        parts = [part for _, part in own]
        first = parts[0]
        segments = [segment for segment, _ in own]
        rows_R, uses = by_row(segments, table) if first.outer_NO is None else apart(segments)
        cores = [part.core.contiguous() for part in parts]
        outers = [part.outer_NO[0].contiguous() for part in parts if part.outer_NO is not None]
        return _Batch(
            parts,
            rows_R,
            shrinks[id(first.basis.p_NPI)].places(rows_R),
            len(uses.starts) - 1,
            uses,
            cores,
            addresses(cores, table.device),
            outers,
            addresses(outers, table.device) if outers else None,
        )

    def change(self, z_UX: Tensor) -> Change:
        q_NOQ, h_RX = self.parts[0].basis.q_NOQ, self._cored(z_UX)
        if self.outer_A is None:
            h = h_RX if h_RX.shape[1] == q_NOQ[:, 0].numel() else _summed_blocks(h_RX, q_NOQ.shape[2])
            # A view where Q is laid out as [O, N, Q], which methods with many blocks see to.
            return Change(linear(h, q_NOQ.transpose(0, 1).flatten(1)), self.rows_R)
        q_OQ = q_NOQ[0].contiguous()
        y_RO = h_RX.new_empty(self.num_rows, len(q_OQ))
        grid = (triton.cdiv(self.num_rows, PAIRS.value), triton.cdiv(len(q_OQ), OUTPUTS.value))
        _scaled_products[grid](h_RX, q_OQ, self.outer_A, self.uses.use_P, y_RO, *y_RO.shape, q_OQ.shape[1])
        return Change(y_RO, self.rows_R)

    def _cored(self, z_UX: Tensor) -> Tensor:
        part, inputs = self.parts[0], z_UX.shape[1]
        if part.form == "diagonal":
            h_RX = z_UX.new_empty(self.num_rows, inputs)
            grid = (self.num_rows, triton.cdiv(inputs, LANES.value))
            _diagonals[grid](z_UX, self.places_R, self.uses, self.core_A, h_RX, inputs)
            return h_RX
        outputs = len(part.core)
        h_RX = z_UX.new_empty(self.num_rows, outputs)
        grid = (self.num_rows, triton.cdiv(outputs, CORE_ROWS.value))
        _dense_cores[grid](z_UX, self.places_R, self.uses, self.core_A, h_RX, outputs, inputs)
        return h_RX


def _summed_blocks(h_RX: Tensor, size: int) -> Tensor:
    """All blocks have one Q."""
    return h_RX.view(len(h_RX), -1, size).sum(1)


class BoundCores(Bound):
    def __init__(self, shrinks: Mapping[int, _Shrink], members: Sequence[Sequence[_Batch]]) -> None:
        self._shrinks = shrinks
        self._members = members

    @staticmethod
    def of(uses: Uses[Projected], table: RowTable) -> BoundCores:
        matrices: dict[int, Tensor] = {}
        slots: dict[int, set[int]] = {}
        members: list[dict[tuple[object, ...], dict[int, list[Projected]]]] = [{} for _ in uses]
        for member, parts_by_slot in zip(members, uses, strict=True):
            for slot, parts in parts_by_slot.items():
                for part in parts:
                    member.setdefault(_alike(part), {}).setdefault(slot, []).append(part)
                    matrices[id(part.basis.p_NPI)] = part.basis.p_NPI
                    slots.setdefault(id(part.basis.p_NPI), set()).add(slot)
        shrinks = {key: _Shrink.of(p_NPI, slots[key], table) for key, p_NPI in matrices.items()}
        return BoundCores(
            shrinks, [[_Batch.of(own, shrinks, table) for own in member.values()] for member in members]
        )

    def sums(self, x_TI: Tensor) -> Sequence[Sequence[Change]]:
        shrunk = {key: shrink(x_TI) for key, shrink in self._shrinks.items()}
        return [
            [batch.change(shrunk[id(batch.parts[0].basis.p_NPI)]) for batch in batches]
            for batches in self._members
        ]
