"""The loop on a socket, run in this process: it sleeps, wakes, leaves, and never sends what does not fit."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Iterator
from types import ModuleType

import msgspec
import pytest

from timbre_server.adapters.derivation import Derivations
from timbre_server.engine import loop
from timbre_server.engine.core import EngineCore
from timbre_server.engine.loop import WakeUp, run_loop, send_output
from timbre_server.engine.messages import (
    FromEngine,
    Shutdown,
    StepOutput,
    TensorsDerived,
    ToEngine,
    TokenEvent,
)
from timbre_server.engine.wire import Channel, Framing

Pair = tuple[Channel[ToEngine], Channel[FromEngine]]


@pytest.fixture
def ends() -> Iterator[Pair]:
    """The engine's end, with frames of 2000 bytes, and the server's."""
    ours, theirs = socket.socketpair()
    engine: Channel[ToEngine] = Channel(ours, msgspec.msgpack.Decoder(ToEngine), Framing(2000))
    server: Channel[FromEngine] = Channel(theirs, msgspec.msgpack.Decoder(FromEngine))
    yield engine, server
    engine.close()
    server.close()


@pytest.fixture
def wake_up() -> Iterator[WakeUp]:
    bell = WakeUp()
    yield bell
    bell.close()


def received(server: Channel[FromEngine]) -> StepOutput:
    payload = server.receive_payload()
    assert payload is not None
    return msgspec.msgpack.decode(payload, type=StepOutput)


def told_to_leave(thread: threading.Thread, server: Channel[FromEngine]) -> None:
    """Say `Shutdown`, and go on reading until the loop has left: a full socket would hold it up."""
    server.send(Shutdown())
    while thread.is_alive():
        server.poll()
        thread.join(0.01)


def a_core(stand_ins: ModuleType) -> EngineCore:
    bench = stand_ins.a_bench(adapters=stand_ins.AdaptersBesideTheLoop())
    return EngineCore(
        bench.runner, bench.scheduler, bench.adapters, Derivations({}), stand_ins.a_pinning(bench.adapters)
    )


def test_an_answer_too_large_for_a_frame_ends_its_own_request(stand_ins: ModuleType, ends: Pair) -> None:
    engine, server = ends
    core = a_core(stand_ins)
    for request_id in ("big", "small"):
        core.submit(
            stand_ins.a_request(request_id, 3, logprobs=-1 if request_id == "big" else None, max_tokens=9)
        )
    output = core.step()
    (big,) = [event for event in output.events if event.request_id == "big"]
    swollen = msgspec.structs.replace(big, logprobs=big.logprobs * 50)
    rest = [event for event in output.events if event is not big]
    derived = (TensorsDerived("a path"),)
    send_output(core, engine, msgspec.structs.replace(output, events=(swollen, *rest), derived=derived))
    first, second, third = (received(server) for _ in range(3))
    assert first == msgspec.structs.replace(output, events=(), derived=derived)
    assert (second.events[0].finish_reason, second.events[0].error_code) == ("error", "invalid_request")
    assert "a frame holds 2000; ask for fewer" in (second.events[0].error_message or "")
    assert [event.request_id for event in third.events] == ["small"]
    assert third.stats.batch_tokens == 0
    assert core.step().stats.num_running == 1


def test_the_loop_serves_until_it_is_told_to_leave(
    stand_ins: ModuleType, ends: Pair, wake_up: WakeUp
) -> None:
    engine, server = ends
    thread = threading.Thread(target=run_loop, args=(a_core(stand_ins), engine, wake_up))
    thread.start()
    server.send(stand_ins.a_request("a", 3, max_tokens=3))
    events: list[TokenEvent] = []
    while not events or events[-1].finish_reason is None:
        events += received(server).events
    assert len(events) == 3
    told_to_leave(thread, server)


def test_the_loop_leaves_when_its_peer_has_gone(stand_ins: ModuleType, ends: Pair, wake_up: WakeUp) -> None:
    engine, server = ends
    server.send(stand_ins.a_request("a", 3, max_tokens=3))
    server.close()
    run_loop(a_core(stand_ins), engine, wake_up)
    assert engine.closed


def test_a_loop_with_nothing_to_run_still_gives_signs_of_life(
    stand_ins: ModuleType, ends: Pair, wake_up: WakeUp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "HEARTBEAT_S", 0.01)
    engine, server = ends
    adapters = stand_ins.AdaptersBesideTheLoop(capacity=0)
    bench = stand_ins.a_bench(adapters=adapters)
    core = EngineCore(
        bench.runner, bench.scheduler, bench.adapters, Derivations({}), stand_ins.a_pinning(bench.adapters)
    )
    thread = threading.Thread(target=run_loop, args=(core, engine, wake_up))
    thread.start()
    server.send(stand_ins.a_request("a", mix=(("never", 1.0),)))
    outputs = [received(server) for _ in range(5)]
    assert outputs[-1].stats.num_waiting == 1
    assert outputs[-1].stats.batch_tokens == 0
    told_to_leave(thread, server)


def test_a_bell_rung_too_often_still_wakes(wake_up: WakeUp) -> None:
    for _ in range(10_000):
        wake_up.ring()
    assert select.select([wake_up.fileno()], [], [], 0)[0]
    wake_up.clear()
    assert not select.select([wake_up.fileno()], [], [], 0)[0]
