"""The gates of adapters with a scout, from what the base alone has made of their rows.

Legend: S rows that were scouted, N rows of one adapter, D hidden features, L places, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from timbre_methods.program import AdapterProgram
from timbre_methods.routing import Routed, Scout, Scouted
from timbre_server.operators.router import scout_gates
from timbre_server.operators.row_table import RowTable
from timbre_server.operators.step_routing import SegmentRouters, StepRouting


def read_scouts(
    scouts: Mapping[int, tuple[Scout, Sequence[Scouted]]],
    step: StepRouting,
    table: RowTable,
    rows_S: Tensor,
    hidden_SD: Tensor,
) -> None:
    """Tell ``step`` the gates of each adapter of the table that has a scout; its rows are among ``rows_S``,
    which increase. ``scouts``: by slot, with `scouted_of` its program."""
    for segment in table.segments:
        if segment.slot not in scouts:
            continue
        scout, places = scouts[segment.slot]
        h_ND = hidden_SD.index_select(0, torch.searchsorted(rows_S, segment.rows_N))
        gates_NLE = scout_gates(scout, h_ND)
        for scouted in places:
            gates_NE = gates_NLE[:, scouted.place]
            step.scout(scouted, segment.rows_N, gates_NE)
            step.note([(SegmentRouters.of([scouted], table, segment), gates_NE)])


def scouted_of(program: AdapterProgram) -> list[Scouted]:
    """The places that its scout gives gates for, each once, in the order of their sites."""
    parts = (part for parts in program.sites.values() for part in parts if isinstance(part, Routed))
    return list(dict.fromkeys(part.router for part in parts if isinstance(part.router, Scouted)))
