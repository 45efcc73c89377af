"""Which experts acted in a step: for each row that is asked after, and counted for each mixture.

Legend: N rows of one adapter, E experts, K gates of several routers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from timbre_methods.program import AdapterProgram
from timbre_methods.routing import Routed, RoutedBlock, Router, Scouted
from timbre_server.adapters.packed_sites import PackedSites
from timbre_server.operators.row_table import RowTable
from timbre_server.operators.step_routing import RouterCall

MAX_EXPERTS_SHOWN = 8
"""Of one place, those with the largest gates."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The experts that acted on one row at one place, largest gate first; none is 0, some may be negative."""

    slot: int
    place: str
    """The path of the site or block whose router chose; of several that share it, the first."""
    experts: tuple[int, ...]
    gates: tuple[float, ...]


def router_places(program: AdapterProgram) -> dict[Router | Scouted, str]:
    """The path at which each router of an adapter reads, or a scout's gates act first."""
    places: dict[Router | Scouted, str] = {}
    if isinstance(program.sites, PackedSites):
        return places  # It holds none, and to make all parts only to see that would hold up a step.
    for path, parts in program.sites.items():
        for part in parts:
            if isinstance(part, RoutedBlock) or (isinstance(part, Routed) and not part.from_block):
                places.setdefault(part.router, path)
    return places


def expert_tokens(calls: Iterable[RouterCall], counted: Mapping[int, Sequence[int]]) -> dict[int, list[int]]:
    """By slot: how often each expert acted on a row, over all places; ``counted``: on which others."""
    counts = {slot: list(own) for slot, own in counted.items()}
    gates: dict[tuple[int, tuple[int, ...]], list[Tensor]] = {}
    for asked, gates_NK in calls:
        gates.setdefault((asked.segment.slot, asked.sizes), []).append(gates_NK)
    if not gates:
        return counts
    acted = torch.cat([torch.cat(found).ne(0).sum(0) for found in gates.values()])
    numbers = iter(acted.tolist())  # All at once: a GPU is waited for a single time.
    for slot, sizes in gates:
        own = counts.setdefault(slot, [])
        own += [0] * (max(sizes) - len(own))
        for expert in (expert for size in sizes for expert in range(size)):
            own[expert] += next(numbers)
    return counts


def choices_of(
    rows: Sequence[int],
    calls: Iterable[RouterCall],
    places: Mapping[Router | Scouted, str],
    rows_of_tables: Mapping[RowTable, Tensor | None],
) -> dict[int, list[Choice]]:
    """By row of the step, in the order in which the routers were called. ``rows_of_tables``: for the tables
    that count the step's rows (None) or copies of them, the row of each; calls for others do not matter."""
    wanted: dict[int, list[Choice]] = {row: [] for row in rows}
    for asked, gates_NK in calls:
        if asked.table not in rows_of_tables:
            continue
        row_P = rows_of_tables[asked.table]
        rows_N = asked.segment.rows_N if row_P is None else row_P[asked.segment.rows_N]
        nth = {row: index for index, row in enumerate(rows_N.tolist()) if row in wanted}
        for row, index in nth.items():
            for router, gates_E in zip(
                asked.routers, gates_NK[index].split_with_sizes(asked.sizes), strict=True
            ):
                experts, gates = _largest(gates_E)
                wanted[row].append(Choice(asked.segment.slot, places[router], experts, gates))
    return wanted


def _largest(gates_E: Tensor) -> tuple[tuple[int, ...], tuple[float, ...]]:
    order = torch.sort(gates_E.abs(), descending=True, stable=True).indices[:MAX_EXPERTS_SHOWN].tolist()
    shown = [(expert, float(gates_E[expert])) for expert in order if float(gates_E[expert]) != 0]
    return tuple(expert for expert, _ in shown), tuple(gate for _, gate in shown)
