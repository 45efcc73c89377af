"""Which parts kernels are called for, and for whose rows."""

from __future__ import annotations

from array import array
from bisect import bisect, bisect_left
from collections.abc import Collection

from torch import Tensor

from timbre_server.native.library import least_count
from timbre_server.operators.live_rows import LiveRows
from timbre_server.operators.native.prepared import MemberParts
from timbre_server.operators.native.structures import address_of


class Uses:
    """Who uses which parts of one member, in the order of slots: ``Uses`` of ``lanes.h``, with the addresses
    of each part and of its adapter's rows."""

    def __init__(self, rows: LiveRows) -> None:
        self._rows = rows
        self._slots: list[int] = []
        self._held: dict[int, MemberParts] = {}
        self._uses = array("q")
        self._work = 0
        self._fields = array("q", [0, 0, 0, rows.in_chunks_address])
        self.address = address_of(self._fields)
        """Where it stays."""

    def admit(self, slot: int, parts: MemberParts) -> None:
        self._held[slot], self._work = parts, max(self._work, parts.work)
        place, rows = bisect(self._slots, slot), self._rows.address(slot)
        self._slots[place:place] = [slot] * len(parts.addresses)
        self._uses[2 * place : 2 * place] = array("q", [n for part in parts.addresses for n in (part, rows)])
        self._tell()

    def dismiss(self, slot: int) -> None:
        """Nothing where it has no parts here."""
        self._held.pop(slot, None)
        first, end = bisect_left(self._slots, slot), bisect(self._slots, slot)
        del self._slots[first:end], self._uses[2 * first : 2 * end]
        self._tell()

    def _tell(self) -> None:
        self._fields[:3] = array("q", [address_of(self._uses), len(self._slots), least_count(self._work)])

    @property
    def slots(self) -> Collection[int]:
        """Whose parts these are, as they come and go."""
        return self._held.keys()

    @property
    def rows_N(self) -> Tensor:  # noqa: N802
        """As `Kernel.rows_N`."""
        return self._rows.rows_of(self._slots)
