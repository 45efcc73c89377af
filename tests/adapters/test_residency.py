"""Who is in memory: budgets, users and evictions, against a simple model."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from timbre_server.adapters.residency import Residency

BUDGET = 100


def resident(residency: Residency, digest: str, prepared_bytes: int) -> int:
    assert residency.make_room(prepared_bytes) is not None
    return residency.place(digest, prepared_bytes)


def test_an_absent_adapter_is_wanted_once() -> None:
    residency = Residency(BUDGET)
    assert residency.acquire("a") is None
    assert residency.acquire("a") is None
    assert residency.wanted == ("a",)


def test_the_least_recently_used_idle_adapter_leaves_first() -> None:
    residency = Residency(BUDGET)
    for digest in "abc":
        resident(residency, digest, 30)
    residency.acquire("a")
    residency.release("a")
    departures = residency.make_room(40)
    assert departures is not None
    assert [(d.digest, d.reason) for d in departures] == [("b", "evicted")]
    assert residency.resident == ("c", "a")


def test_an_adapter_in_use_is_never_evicted() -> None:
    residency = Residency(BUDGET)
    resident(residency, "a", 60)
    resident(residency, "b", 40)
    residency.acquire("a")
    assert residency.make_room(50) is None
    assert residency.resident == ("b", "a"), "a refusal must evict nobody"
    residency.release("a")
    departures = residency.make_room(50)
    assert departures is not None
    assert [d.digest for d in departures] == ["b", "a"]


def test_favoured_adapters_are_loaded_first_and_stay() -> None:
    residency = Residency(BUDGET)
    resident(residency, "a", 60)
    for digest in ("b", "c"):
        residency.acquire(digest)
    residency.favour(("c", "a"))
    assert residency.next_wish == "c"
    assert residency.make_room(50) is None, "a is favoured"
    assert residency.gives_way("b")
    assert not residency.gives_way("c")
    assert residency.bytes_with_favoured("c", 30, {7: 20}) == 110
    assert residency.bytes_with_favoured("b", 30, {7: 20}) == 0
    residency.favour(())
    assert residency.next_wish == "b"
    assert not residency.gives_way("b")
    assert [departure.digest for departure in residency.make_room(50) or ()] == ["a"]


def test_what_is_held_and_reserved_counts_for_those_who_come() -> None:
    residency = Residency(BUDGET)
    for digest in "ab":
        resident(residency, digest, 20)
    residency.acquire("a")
    assert residency.make_room(61) is not None
    residency.hold("a", 61)
    assert (residency.used_bytes, residency.adapter_bytes, residency.resident) == (81, 20, ("a",))
    assert residency.bytes_with_held(20, {7: 5}) == 106
    residency.favour("c")
    assert residency.bytes_with_favoured("c", 10, {}) == 91
    residency.check_integrity()
    residency.hold(())
    residency.release("a")
    assert (residency.used_bytes, residency.bytes_with_held(20, {})) == (20, 20)
    residency.check_integrity()


def test_a_wish_of_requests_ends_with_the_last_of_them_and_a_lasting_one_does_not() -> None:
    residency = Residency(BUDGET)
    for digest in ("left", "kept", "asked later"):
        residency.acquire(digest)
    residency.want("asked later", lasting=True)
    residency.acquire("asked later")
    residency.no_requests("left")
    residency.no_requests("asked later")
    residency.no_requests("never seen")
    assert residency.wanted == ("kept", "asked later")


def test_unloading_waits_for_the_last_user() -> None:
    residency = Residency(BUDGET)
    slot = resident(residency, "a", 10)
    residency.acquire("a")
    residency.acquire("a")
    assert residency.unload("a") is None
    assert residency.release("a") is None
    departure = residency.release("a")
    assert departure is not None
    assert (departure.digest, departure.slot, departure.reason) == ("a", slot, "unloaded")
    assert residency.resident == ()


def test_a_freed_slot_is_used_again() -> None:
    residency = Residency(BUDGET)
    slot = resident(residency, "a", 10)
    residency.unload("a")
    assert resident(residency, "b", 10) == slot


def test_what_two_share_counts_once_and_until_the_last_leaves() -> None:
    residency = Residency(BUDGET)
    for digest in "ab":
        assert residency.make_room(10, {7: 50}) == []
        residency.place(digest, 10, {7: 50})
    assert residency.used_bytes == 70
    residency.unload("a")
    assert residency.used_bytes == 60
    residency.unload("b")
    assert residency.used_bytes == 0


def test_a_newcomer_keeps_what_it_shares_with_those_that_leave_for_it() -> None:
    residency = Residency(BUDGET)
    residency.place("a", 10, {7: 50})
    residency.place("b", 20, {})
    departures = residency.make_room(45, {7: 50})
    assert departures is not None
    assert [departure.digest for departure in departures] == ["a", "b"]
    residency.place("c", 45, {7: 50})
    assert residency.used_bytes == 95


def test_the_basis_of_one_that_leaves_counts_for_the_newcomer() -> None:
    residency = Residency(BUDGET)
    residency.place("a", 10, {7: 50})
    residency.place("b", 20)
    departures = residency.make_room(80)
    assert departures is not None
    assert [departure.digest for departure in departures] == ["a"]
    assert residency.used_bytes == 20
    residency.place("c", 80)
    residency.check_integrity()


def test_favoured_adapters_that_are_given_up_may_leave_and_their_wishes_end() -> None:
    residency = Residency(BUDGET)
    resident(residency, "a", 60)
    for digest in ("b", "c", "d"):
        residency.acquire(digest)
    residency.want("c", lasting=True)
    residency.favour("abc")
    assert residency.give_up_favoured() == {"a", "b", "c"}
    assert residency.wanted == ("c", "d"), "a lasting wish is not theirs alone"
    assert [departure.digest for departure in residency.make_room(50) or ()] == ["a"]


class ResidencyMachine(RuleBasedStateMachine):
    """Random use; the model is a dictionary of users."""

    digests = st.sampled_from("abcdefgh")

    def __init__(self) -> None:
        super().__init__()
        self.residency = Residency(BUDGET)
        self.users: dict[str, int] = {}

    @rule(digest=digests)
    def acquire(self, digest: str) -> None:
        slot = self.residency.acquire(digest)
        assert (slot is not None) == (digest in self.residency.resident)
        if slot is not None:
            self.users[digest] = self.users.get(digest, 0) + 1

    @precondition(lambda self: any(self.users.values()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from([d for d, users in self.users.items() if users]))
        self.residency.release(digest)
        self.users[digest] -= 1

    @precondition(lambda self: bool(self.residency.wanted))
    @rule(prepared_bytes=st.integers(1, BUDGET), shared=st.sets(st.integers(1, 4)))
    def load(self, prepared_bytes: int, shared: set[int]) -> None:
        digest = self.residency.wanted[0]
        bytes_by_tensor = {tensor: 10 * tensor for tensor in shared}
        departures = self.residency.make_room(prepared_bytes, bytes_by_tensor)
        if departures is not None:
            assert all(not self.users.get(departure.digest) for departure in departures)
            self.residency.place(digest, prepared_bytes, bytes_by_tensor)

    @rule(digest=digests)
    def unload(self, digest: str) -> None:
        self.residency.unload(digest)

    @invariant()
    def nobody_in_use_is_missing(self) -> None:
        self.residency.check_integrity()
        used = {digest for digest, users in self.users.items() if users}
        assert used <= set(self.residency.resident)


ResidencyMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestResidencyMachine = ResidencyMachine.TestCase


def test_the_last_used_are_told_however_many_others_there_are() -> None:
    residency = Residency(100)
    for digest in "abcdef":
        residency.place(digest, 1)
    assert residency.acquire("b") is not None
    assert residency.last_used(3) == ("e", "f", "b")
    assert residency.last_used(100) == residency.resident
    assert (residency.num_resident, residency.is_resident("a"), residency.is_resident("z")) == (
        6,
        True,
        False,
    )
