"""Which adapters are in memory, and which one leaves when another needs the room. No torch, no I/O.

An adapter is absent, wanted (queued or being loaded) or resident in a slot. Slots are small integers without
a fixed number: the budget is in bytes, those of an adapter's own tensors and those of the bases that it
shares with others, each tensor counted once. An adapter in use is never evicted; of the others the least
recently used goes first.

One request at a time is favoured: its adapters are loaded before others and not evicted until it has them
all. Else requests for several each could evict each other's for ever, and none have all of its own.

Adapters that are held stay for longer than any request, and bytes may be reserved beside them: what needs
more than is left then is told so, and does not wait for it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from types import MappingProxyType
from typing import Literal

EvictionReason = Literal["evicted", "unloaded", "absent"]
"""For room; on demand; on demand, while it was not in memory."""

SharedBytes = Mapping[int, int]
"""Bytes of tensors that adapters share, by a number that tells one tensor from another."""
NOTHING_SHARED: SharedBytes = MappingProxyType({})


@dataclass(slots=True)
class _Resident:
    slot: int
    prepared_bytes: int
    shared: SharedBytes
    users: int = 0
    leaving: bool = False
    """Unload when the last user has gone."""


@dataclass(frozen=True, slots=True)
class Departure:
    """An adapter that has left: its slot is free and its tensors must be dropped."""

    digest: str
    slot: int
    reason: EvictionReason


class Residency:
    """Slots, users and bytes of the adapters in memory."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        """Of adapters, of what they share, and what is reserved."""
        self._sharers: Counter[int] = Counter()
        self._resident: OrderedDict[str, _Resident] = OrderedDict()
        self._wanted: dict[str, bool] = {}
        """In order of wish, and whether it outlives the requests that wished it, too."""
        self._favoured: tuple[str, ...] = ()
        self._held: tuple[str, ...] = ()
        self._reserved_bytes = 0
        self._free_slots: list[int] = []
        self._next_slot = 0

    @property
    def resident(self) -> tuple[str, ...]:
        """Digests in memory, most recently used last."""
        return tuple(self._resident)

    @property
    def num_resident(self) -> int:
        return len(self._resident)

    def is_resident(self, digest: str) -> bool:
        return digest in self._resident

    def last_used(self, count: int) -> tuple[str, ...]:
        return tuple(islice(reversed(self._resident), count))[::-1]

    @property
    def wanted(self) -> tuple[str, ...]:
        """Digests to load, oldest wish first."""
        return tuple(self._wanted)

    @property
    def next_wish(self) -> str | None:
        """The digest to load next: a favoured one, else the oldest wish."""
        favoured = (digest for digest in self._favoured if digest in self._wanted)
        return next(chain(favoured, self._wanted), None)

    def favour(self, digests: Iterable[str]) -> None:
        """Let these, instead of those before, be loaded first and stay."""
        self._favoured = tuple(digests)

    def give_up_favoured(self) -> frozenset[str]:
        """Favour nobody, and forget what those that were favoured wished; returns them. Another request that
        wants one of them asks for it again."""
        given_up = frozenset(self._favoured)
        self._favoured = ()
        for digest in given_up:
            self.no_requests(digest)
        return given_up

    def gives_way(self, digest: str) -> bool:
        """Whether a load that finds no room keeps a favoured adapter from being loaded."""
        return digest not in self._favoured and self.next_wish in self._favoured

    def hold(self, digests: Iterable[str], reserved_bytes: int = 0) -> None:
        """Say which adapters stay in use until this says others, and what is taken beside all adapters;
        `make_room` has been asked for it."""
        self._held = tuple(digests)
        self.used_bytes += reserved_bytes - self._reserved_bytes
        self._reserved_bytes = reserved_bytes

    @property
    def holds(self) -> bool:
        """Whether any adapter is held."""
        return bool(self._held)

    def bytes_with_held(self, prepared_bytes: int, shared: SharedBytes) -> int:
        """What an adapter takes together with all that will not leave for it."""
        return self._bytes_beside(self._held, prepared_bytes, shared)

    def bytes_with_favoured(self, digest: str, prepared_bytes: int, shared: SharedBytes) -> int:
        """The same of a favoured adapter and the others that are in memory, too; 0 for any other."""
        if digest not in self._favoured:
            return 0
        return self._bytes_beside((*self._favoured, *self._held), prepared_bytes, shared)

    def _bytes_beside(self, digests: Iterable[str], prepared_bytes: int, shared: SharedBytes) -> int:
        beside = [self._resident[other] for other in dict.fromkeys(digests) if other in self._resident]
        tensors = dict(shared)
        for entry in beside:
            tensors |= entry.shared
        own = prepared_bytes + sum(entry.prepared_bytes for entry in beside)
        return own + sum(tensors.values()) + self._reserved_bytes

    def acquire(self, digest: str) -> int | None:
        """Take a use of a resident adapter and return its slot, or note the wish and return None."""
        entry = self._resident.get(digest)
        if entry is None:
            self.want(digest)
            return None
        entry.users += 1
        self._resident.move_to_end(digest)
        return entry.slot

    def is_leaving(self, digest: str) -> bool:
        """Whether it goes with its last user."""
        entry = self._resident.get(digest)
        return entry is not None and entry.leaving

    @property
    def adapter_bytes(self) -> int:
        """Those in use without what is reserved."""
        return self.used_bytes - self._reserved_bytes

    def release(self, digest: str) -> Departure | None:
        """Give a use back. The departure of an adapter that only waited for this is returned."""
        entry = self._resident[digest]
        assert entry.users > 0, f"adapter {digest} released more often than acquired"
        entry.users -= 1
        if entry.leaving and entry.users == 0:
            return self._remove(digest, "unloaded")
        return None

    def want(self, digest: str, *, lasting: bool = False) -> None:
        """Queue an adapter for loading, unless it is resident or queued. A ``lasting`` wish is not of a
        request: it outlasts `no_requests`."""
        if digest not in self._resident:
            self._wanted[digest] = lasting or self._wanted.get(digest, False)

    def drop_wish(self, digest: str) -> None:
        """Forget a wish: it is fulfilled, has failed or was withdrawn."""
        self._wanted.pop(digest, None)

    def no_requests(self, digest: str) -> None:
        """No request is left that would use the adapter: forget the wish, unless it is a lasting one."""
        if not self._wanted.get(digest, True):
            del self._wanted[digest]

    def make_room(self, prepared_bytes: int, shared: SharedBytes = NOTHING_SHARED) -> list[Departure] | None:
        """Evict idle adapters, oldest use first, until an adapter of its own bytes and what it shares fits.

        None, and nothing evicted, while adapters in use, or favoured, hold too much.
        """
        given_back: Counter[int] = Counter()
        needed = self.used_bytes + prepared_bytes + self._bytes_of_new(shared) - self.budget_bytes
        going = []
        for digest, entry in self._resident.items():
            if needed <= 0:
                break
            if entry.users or digest in self._favoured:
                continue
            going.append(digest)
            given_back.update(entry.shared.keys())
            needed -= entry.prepared_bytes + sum(
                size
                for tensor, size in entry.shared.items()
                if given_back[tensor] == self._sharers[tensor] and tensor not in shared
            )
        if needed > 0:
            return None
        return [self._remove(digest, "evicted") for digest in going]

    def _bytes_of_new(self, shared: SharedBytes) -> int:
        """Of what nobody in memory shares."""
        return sum(size for tensor, size in shared.items() if not self._sharers[tensor])

    def place(self, digest: str, prepared_bytes: int, shared: SharedBytes = NOTHING_SHARED) -> int:
        """Give a loaded adapter a slot; `make_room` has been asked for its bytes. The wish is fulfilled."""
        assert digest not in self._resident, f"adapter {digest} placed twice"
        self.drop_wish(digest)
        if self._free_slots:
            slot = self._free_slots.pop()
        else:
            slot = self._next_slot
            self._next_slot += 1
        self._resident[digest] = _Resident(slot, prepared_bytes, shared)
        self.used_bytes += prepared_bytes + self._bytes_of_new(shared)
        self._sharers.update(shared.keys())
        return slot

    def unload(self, digest: str) -> Departure | None:
        """Let an adapter go: at once if nobody uses it, else with its last user; unknown ones are gone."""
        self.drop_wish(digest)
        entry = self._resident.get(digest)
        if entry is None:
            return None
        if entry.users:
            entry.leaving = True
            return None
        return self._remove(digest, "unloaded")

    def check_integrity(self) -> None:
        """Raise AssertionError if slots, bytes or wishes contradict each other."""
        _check(self)

    def _remove(self, digest: str, reason: EvictionReason) -> Departure:
        entry = self._resident.pop(digest)
        for tensor in entry.shared:
            self._sharers[tensor] -= 1
            if not self._sharers[tensor]:
                del self._sharers[tensor]
        self.used_bytes -= entry.prepared_bytes + self._bytes_of_new(entry.shared)
        self._free_slots.append(entry.slot)
        return Departure(digest, entry.slot, reason)


def _check(books: Residency) -> None:
    slots = [entry.slot for entry in books._resident.values()]
    assert len(set(slots)) == len(slots), "two adapters share a slot"
    assert sorted(slots + books._free_slots) == list(range(books._next_slot)), "a slot was lost"
    shared = {tensor: size for entry in books._resident.values() for tensor, size in entry.shared.items()}
    total = sum(entry.prepared_bytes for entry in books._resident.values()) + sum(shared.values())
    assert total + books._reserved_bytes == books.used_bytes, "bytes do not add up"
    sharers = Counter(tensor for entry in books._resident.values() for tensor in entry.shared)
    assert sharers == books._sharers, "who shares a tensor was miscounted"
    assert books.used_bytes <= books.budget_bytes, "over budget"
    assert not set(books._wanted) & set(books._resident), "a resident adapter is wanted"
    assert all(books._resident[digest].users for digest in books._held), "a held adapter is not in use"
