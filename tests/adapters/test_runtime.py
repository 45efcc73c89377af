"""Loads beside a running batch, with a loader that waits for the test."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest
import torch
from torch import nn

from timbre_methods.program import AdapterProgram, Basis, Diagonal, Projected
from timbre_server.adapters.adapted_model import AdaptedModel, PreparedProgram
from timbre_server.adapters.loader import LoadedAdapter
from timbre_server.adapters.runtime import AdapterRuntime, Arrival
from timbre_server.errors import AdapterLoadFailed

FLOATS = 10
ADAPTER_BYTES = 4 * FLOATS


class SlowLoader:
    """Loads when the test opens the gate; digests that begin with "bad" fail."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.loads: list[str] = []
        self.basis: Basis | None = None
        """Shared by all that are loaded, where there is one."""

    def load(self, digest: str) -> LoadedAdapter:
        assert self.gate.wait(10)
        self.loads.append(digest)
        if digest.startswith("bad"):
            raise AdapterLoadFailed(f"{digest} is damaged")
        if digest.startswith("bug"):
            raise RuntimeError("shapes do not fit")
        if self.basis is None:
            part: Diagonal | Projected = Diagonal("input", torch.ones(FLOATS))
        else:
            part = Projected("diagonal", torch.ones(1, 2), self.basis)
        return LoadedAdapter(digest, "ia3", AdapterProgram({"q": (part,)}), {"verify": 0.0})


def runtime_of(budget_adapters: int, *, open_gate: bool = True) -> tuple[AdapterRuntime, SlowLoader]:
    loader = SlowLoader()
    if open_gate:
        loader.gate.set()
    return AdapterRuntime(AdaptedModel(nn.Module(), []), loader, budget_adapters * ADAPTER_BYTES), loader


def poll_until(runtime: AdapterRuntime, done: Callable[[list[Arrival]], bool]) -> list[Arrival]:
    """Polls as the step loop does; every poll keeps the books in order."""
    arrivals: list[Arrival] = []
    give_up = time.monotonic() + 10
    while not done(arrivals):
        assert time.monotonic() < give_up, "the load never ended"
        arrivals += runtime.poll()[0]
        runtime.check_integrity()
        time.sleep(0.001)
    return arrivals


def test_a_load_never_blocks_a_poll_and_ends_in_a_slot() -> None:
    runtime, loader = runtime_of(4, open_gate=False)
    assert runtime.try_acquire("a") is None
    for _ in range(3):
        assert runtime.poll() == ([], [])
    assert runtime.wanted == ("a",)
    loader.gate.set()
    [arrival] = poll_until(runtime, bool)
    assert (arrival.digest, arrival.method, arrival.prepared_bytes) == ("a", "ia3", ADAPTER_BYTES)
    assert runtime.try_acquire("a") == 0
    assert runtime.resident_bytes == ADAPTER_BYTES
    runtime.close()


@pytest.mark.usefixtures("two_threads")
def test_an_adapter_is_prepared_where_it_is_loaded_on_one_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []
    prepared = AdaptedModel.prepared

    def noted(model: AdaptedModel, program: AdapterProgram) -> PreparedProgram:
        threads.append((threading.current_thread().name.removesuffix("_0"), torch.get_num_threads()))
        return prepared(model, program)

    monkeypatch.setattr(AdaptedModel, "prepared", noted)
    runtime, _ = runtime_of(4)
    assert runtime.try_acquire("a") is None
    [arrival] = poll_until(runtime, bool)
    assert set(arrival.seconds_by_phase) == {"verify", "prepare"}
    assert threads == [("adapter-load", 1)]
    runtime.close()


def test_a_failed_load_says_why_and_is_not_tried_again_at_once() -> None:
    runtime, loader = runtime_of(4)
    assert runtime.try_acquire("bad") is None
    [arrival] = poll_until(runtime, bool)
    assert arrival.failure == runtime.failure("bad") == ("adapter_load_failed", "bad is damaged")
    for _ in range(5):
        assert runtime.try_acquire("bad") is None
        runtime.poll()
    assert loader.loads == ["bad"]
    runtime.close()


def test_an_unexpected_error_in_a_load_fails_that_adapter_only() -> None:
    runtime, _ = runtime_of(4)
    runtime.try_acquire("bug")
    runtime.try_acquire("fine")
    arrivals = poll_until(runtime, lambda arrivals: len(arrivals) == 2)
    assert arrivals[0].failure is not None
    assert "shapes do not fit" in arrivals[0].failure.message
    assert runtime.try_acquire("fine") is not None
    runtime.close()


def test_an_adapter_larger_than_the_budget_is_refused_with_both_figures() -> None:
    runtime, _ = runtime_of(0)
    runtime.try_acquire("a")
    [arrival] = poll_until(runtime, bool)
    assert arrival.failure == (
        "adapter_too_large",
        "adapter a needs 40 bytes in memory; the budget for all adapters is 0: raise --adapter-memory-mib",
    )
    runtime.close()


def test_a_full_memory_makes_a_load_wait_for_a_release_and_evicts_only_the_idle() -> None:
    runtime, _ = runtime_of(2)
    for digest in ("a", "b"):
        runtime.load(digest)
        poll_until(runtime, bool)
    a, b = runtime.try_acquire("a"), runtime.try_acquire("b")
    assert a is not None
    assert b is not None
    runtime.load("c")
    for _ in range(20):
        assert runtime.poll()[0] == []
        time.sleep(0.001)
    assert runtime.try_acquire("a") == a, "resident adapters go on being served"
    runtime.release("b")
    [arrival] = poll_until(runtime, bool)
    assert arrival.digest == "c"
    assert runtime.resident == ("a", "c")
    runtime.close()


def test_unloading_reports_the_departure_when_it_has_really_happened() -> None:
    runtime, _ = runtime_of(2)
    runtime.load("a")
    poll_until(runtime, bool)
    runtime.try_acquire("a")
    runtime.unload("a")
    assert runtime.poll()[1] == []
    runtime.release("a")
    assert [(d.digest, d.reason) for d in runtime.poll()[1]] == [("a", "unloaded")]
    assert runtime.resident_bytes == 0
    runtime.unload("never loaded")
    assert [(d.digest, d.reason) for d in runtime.poll()[1]] == [("never loaded", "absent")]
    runtime.close()


def test_the_end_of_a_load_wakes_a_sleeping_loop() -> None:
    woken = threading.Event()
    loader = SlowLoader()
    loader.gate.set()
    runtime = AdapterRuntime(AdaptedModel(nn.Module(), []), loader, 1000, woken.set)
    runtime.load("a")
    runtime.poll()
    assert woken.wait(10)
    runtime.close()


def test_a_load_that_nobody_waits_for_holds_up_no_other() -> None:
    runtime, _ = runtime_of(2)
    for digest in ("a", "b"):
        runtime.load(digest)
        poll_until(runtime, bool)
        runtime.try_acquire(digest)
    runtime.try_acquire("no room")
    runtime.poll()
    runtime.unload("b")
    runtime.try_acquire("next")
    runtime.no_requests("no room")
    runtime.release("b")
    [arrival] = poll_until(runtime, bool)
    assert arrival.digest == "next"
    assert runtime.wanted == ()
    runtime.close()


def test_failures_that_nobody_asks_about_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, _ = runtime_of(4)
    monkeypatch.setattr("timbre_server.adapters.runtime.FAILURE_LASTS_S", 0.0)
    for number in range(3):
        runtime.load(f"bad{number}")
        poll_until(runtime, bool)
    assert list(runtime._failures) == ["bad2"]
    runtime.close()


def test_a_load_without_room_is_put_off_for_a_favoured_one() -> None:
    runtime, loader = runtime_of(2)
    assert runtime.try_acquire("x") is None
    poll_until(runtime, bool)
    assert runtime.try_acquire("x") == 0
    assert runtime.try_acquire("y") is None
    poll_until(runtime, bool)
    runtime.favour(["y", "z"])
    assert runtime.try_acquire("other") is None
    poll_until(runtime, lambda _: loader.loads == ["x", "y", "other"])
    assert runtime.try_acquire("z") is None
    poll_until(runtime, lambda _: loader.loads[-1] == "z")
    runtime.release("x")
    [arrival] = poll_until(runtime, bool)
    assert (arrival.digest, runtime.resident) == ("z", ("y", "z"))
    runtime.favour([])
    [arrival] = poll_until(runtime, bool)
    assert arrival.digest == "other", "what was put off is still wanted"
    runtime.close()


def test_a_mix_that_never_fits_is_told_and_its_adapters_alone_are_not_failed() -> None:
    runtime, _ = runtime_of(2)
    runtime.favour("abc")
    for digest in "abc":
        assert runtime.try_acquire(digest) is None
    poll_until(runtime, lambda _: runtime.misfit("abc") is not None)
    assert f"need {3 * ADAPTER_BYTES} bytes or more in memory together" in (runtime.misfit("cab") or "")
    assert (runtime.misfit("ab"), runtime.misfit("abcd"), runtime.failure("c")) == (None, None, None)
    runtime.favour(())
    assert runtime.misfit("abc") is not None, "what is true stays known"
    assert runtime.try_acquire("c") is None
    [arrival] = poll_until(runtime, bool)
    assert arrival.digest == "c", "somebody may want it alone"
    runtime.close()


def test_no_load_waits_until_the_request_of_a_misfit_hears_of_it() -> None:
    runtime, loader = runtime_of(2)
    runtime.favour("abc")
    for digest in "abcd":
        assert runtime.try_acquire(digest) is None
    runtime.load("b")
    arrivals = poll_until(runtime, lambda arrivals: len(arrivals) == 3)
    assert runtime.misfit("abc") is not None
    assert [arrival.digest for arrival in arrivals] == ["a", "b", "d"]
    assert loader.loads == ["a", "b", "c", "d"], "nobody is known to want c alone"
    assert runtime.resident == ("b", "d"), "those given up may be evicted"
    assert runtime.wanted == ()
    runtime.close()


def test_an_adapter_of_a_misfit_that_is_wanted_for_itself_is_not_loaded_twice() -> None:
    runtime, loader = runtime_of(2)
    runtime.favour("abc")
    for digest in "abc":
        assert runtime.try_acquire(digest) is None
    runtime.load("c")
    arrivals = poll_until(runtime, lambda arrivals: len(arrivals) == 3)
    assert runtime.misfit("abc") is not None
    assert [arrival.digest for arrival in arrivals] == loader.loads == ["a", "b", "c"]
    runtime.close()


def test_only_so_many_misfits_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timbre_server.adapters.runtime.MAX_MISFITS", 2)
    runtime, _ = runtime_of(1)
    mixes = ("ab", "cd", "ef")
    for mix in mixes:
        runtime.favour(mix)
        for digest in mix:
            assert runtime.try_acquire(digest) is None
        poll_until(runtime, lambda _, mix=mix: runtime.misfit(mix) is not None)
    assert [runtime.misfit(mix) is not None for mix in mixes] == [False, True, True]
    runtime.close()


def test_adapters_in_one_basis_pay_for_it_once_and_until_the_last_leaves() -> None:
    runtime, loader = runtime_of(100)
    loader.basis = Basis(torch.ones(1, 2, FLOATS), torch.ones(1, FLOATS, 2))
    basis_bytes, core_bytes = 2 * 4 * 2 * FLOATS, 4 * 2
    first, second = loader.load("first").program, loader.load("second").program
    assert first.shared_bytes == second.shared_bytes
    assert sum(first.shared_bytes.values()) == basis_bytes
    for digest, expected in (("a", basis_bytes + core_bytes), ("b", basis_bytes + 2 * core_bytes)):
        runtime.load(digest)
        [arrival] = poll_until(runtime, bool)
        assert arrival.prepared_bytes == core_bytes
        assert runtime.resident_bytes == expected
    runtime.unload("a")
    assert runtime.resident_bytes == basis_bytes + core_bytes
    runtime.unload("b")
    assert runtime.resident_bytes == 0
    runtime.check_integrity()
    runtime.close()
