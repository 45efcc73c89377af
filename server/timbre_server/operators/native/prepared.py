"""An adapter's parts as kernels read them, which follows from it alone.

Legend: I in, O out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from timbre_server.operators.native.structures import Fields, addresses_of, structures


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """A part as a kernel reads it, without the rows that use it."""

    fields: Fields
    shape: tuple[int, int]
    """[O, I], or where it reads some inputs only, O and their number."""
    work: int
    """Multiplications for one row."""
    held: object
    """What ``fields`` has the addresses of."""


class PreparedParts:
    """Those of one adapter at a group of layers."""

    def __init__(self, members: Sequence[Sequence[Prepared]]) -> None:
        self.num_members = len(members)
        each = [part for own in members for part in own]
        own_structures = structures([part.fields for part in each])
        addresses = iter(addresses_of(own_structures, len(each)))
        held = own_structures, tuple(part.held for part in each)
        self.members = {
            member: MemberParts(
                tuple(next(addresses) for _ in own), own[0].shape, sum(part.work for part in own), held
            )
            for member, own in enumerate(members)
            if own
        }
        """Of those that have any."""


@dataclass(frozen=True, slots=True, eq=False)
class MemberParts:
    """An adapter's parts at one member."""

    addresses: Sequence[int]
    shape: tuple[int, int]
    work: int
    held: object
    """All that lies at the addresses."""
