"""The engine process from the server's side: real processes, ended in every way that a process can end."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from types import ModuleType

import pytest
import pytest_asyncio

from timbre_server.engine import client
from timbre_server.engine.child import end
from timbre_server.engine.client import EngineProcess
from timbre_server.engine.messages import StepOutput, Submit, TokenEvent
from timbre_server.engine.options import EngineOptions
from timbre_server.errors import AdapterLoadFailed, EngineDied, PinConflict, UnsupportedModel

WORKER = (sys.executable, str(Path(__file__).with_name("scripted_worker.py")))
ENDLESS = 100_000
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(autouse=True, scope="module")
def importable_packages() -> Iterator[None]:
    """Children import what this process imports, also where the packages are not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        yield


async def started(
    model: str = "scripted", on_progress: Callable[[str], None] = lambda text: None
) -> EngineProcess:
    options = EngineOptions(model=model, adapters_dir="", max_model_len=ENDLESS)
    return await EngineProcess.start(options, on_progress, worker=WORKER)


@asynccontextmanager
async def an_engine(model: str = "scripted") -> AsyncIterator[EngineProcess]:
    engine = await started(model)
    try:
        yield engine
    finally:
        await engine.close()
    assert is_gone(engine.pid)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(importable_packages: None) -> AsyncIterator[EngineProcess]:
    """One engine for all tests that leave it as they found it."""
    async with an_engine() as shared:
        yield shared


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}


async def collected(engine: EngineProcess, request: Submit) -> list[TokenEvent]:
    return [event async for event in engine.submit(request)]


async def until(engine: EngineProcess, condition: Callable[[StepOutput], bool]) -> None:
    reached = asyncio.Event()
    engine.on_output(lambda output: reached.set() if condition(output) else None)
    await asyncio.wait_for(reached.wait(), 30)


async def test_many_requests_are_answered_each_with_its_own_events(
    engine: EngineProcess, stand_ins: ModuleType
) -> None:
    assert (engine.info.model_name, engine.alive) == ("scripted", True)
    requests = [
        stand_ins.a_request(f"r{index}", 3 + index, max_tokens=index + 1, seed=index) for index in range(12)
    ]
    answers = await asyncio.gather(*(collected(engine, request) for request in requests))
    for request, events in zip(requests, answers, strict=True):
        assert [token for event in events for token in event.token_ids] == stand_ins.tokens_alone(request)
        assert [event.finish_reason for event in events] == [None] * (len(events) - 1) + ["length"]
    assert (engine.latest.num_running, engine.latest.num_kv_blocks_used) == (0, 0)
    assert engine.seconds_since_last_step() == 0.0


async def test_closing_a_stream_aborts_its_request(engine: EngineProcess, stand_ins: ModuleType) -> None:
    async with aclosing(engine.submit(stand_ins.a_request("a", max_tokens=ENDLESS))) as events:
        async for _ in events:
            break
        assert engine.seconds_since_last_step() < 30
    await until(engine, lambda output: output.stats.num_running == 0)
    assert engine.latest.num_kv_blocks_used == 0


async def test_cancelling_a_reader_aborts_its_request_and_no_other(
    engine: EngineProcess, stand_ins: ModuleType
) -> None:
    first = asyncio.create_task(collected(engine, stand_ins.a_request("a", max_tokens=ENDLESS)))
    second = asyncio.create_task(collected(engine, stand_ins.a_request("b", max_tokens=60)))
    await until(engine, lambda output: output.stats.num_running == 2)
    first.cancel()
    assert len(await second) == 60


async def test_a_failed_request_ends_with_its_error_and_the_engine_lives(
    engine: EngineProcess, stand_ins: ModuleType
) -> None:
    events = await collected(engine, stand_ins.a_request("a", mix=(("bad", 1.0),)))
    assert [event.error_code for event in events] == ["adapter_load_failed"]
    assert engine.alive


async def test_adapters_are_loaded_and_unloaded_on_demand(engine: EngineProcess) -> None:
    loaded = await engine.load_adapter("x")
    assert (loaded.method, loaded.seconds_by_phase) == ("scripted", {"verify": 0.25})
    both = await asyncio.gather(engine.load_adapter("x"), engine.load_adapter("y"))
    assert [each.digest for each in both] == ["x", "y"]
    await engine.unload_adapter("x")
    await engine.unload_adapter("never seen")
    with pytest.raises(AdapterLoadFailed, match="bad is broken"):
        await engine.load_adapter("bad")


async def test_a_pin_that_is_refused_says_why(engine: EngineProcess) -> None:
    with pytest.raises(AdapterLoadFailed, match="bad is broken"):
        await engine.pin_adapter("bad", (("bad", 1.0),))
    with pytest.raises(PinConflict, match="x is not pinned; nothing is"):
        await engine.unpin_adapter("x")
    assert engine.latest.pinned is None


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        ("refused", UnsupportedModel, "refused: no such family"),
        ("broken", EngineDied, "RuntimeError; the engine's log says more"),
        ("gone", EngineDied, "ended before it was ready"),
    ],
)
async def test_an_engine_that_cannot_start_says_why(model: str, error: type[Exception], words: str) -> None:
    told: list[str] = []
    with pytest.raises(error, match=words):
        await started(model, told.append)
    assert told == [f"Pretending to load {model}"]


async def test_a_child_that_ends_at_the_last_moment_is_not_missed() -> None:
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", "")
    await child.wait()
    await end(child, grace_s=0)
    assert child.returncode == 0


async def test_a_cancelled_start_leaves_no_process() -> None:
    told, before = asyncio.Event(), children()
    starting = asyncio.create_task(started("slow", lambda text: told.set()))
    await asyncio.wait_for(told.wait(), 60)
    (child,) = children() - before
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert is_gone(child)


@pytest.mark.parametrize("how", [signal.SIGKILL, None])
async def test_a_dead_engine_ends_every_request(stand_ins: ModuleType, how: signal.Signals | None) -> None:
    async with an_engine("scripted" if how else "dies") as engine:
        waiting = [
            asyncio.create_task(collected(engine, stand_ins.a_request(name, max_tokens=ENDLESS)))
            for name in "ab"
        ]
        if how:
            await until(engine, lambda output: output.stats.num_running == 2)
            os.kill(engine.pid, how)
        for answer in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(answer, EngineDied)
        assert not engine.alive
        with pytest.raises(EngineDied, match="the engine process ended"):
            await collected(engine, stand_ins.a_request("late"))
        with pytest.raises(EngineDied, match="the engine process ended"):
            await engine.load_adapter("x")


async def test_closing_ends_open_requests_and_the_process(stand_ins: ModuleType) -> None:
    async with an_engine() as engine:
        waiting = asyncio.create_task(collected(engine, stand_ins.a_request("a", max_tokens=ENDLESS)))
        await until(engine, lambda output: output.stats.num_running == 1)
        await engine.close()
        assert not engine.alive
        last = (await waiting)[-1]
        assert last.finish_reason == "abort"
        assert "shutting down" in (last.error_message or "")
        with pytest.raises(EngineDied, match="was shut down"):
            await collected(engine, stand_ins.a_request("late"))
        await engine.close()


async def test_a_hanging_engine_is_noticed_and_killed_at_the_close(
    stand_ins: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "GRACE_S", 0.1)
    async with an_engine() as engine:
        waiting = asyncio.create_task(collected(engine, stand_ins.a_request("a", max_tokens=ENDLESS)))
        await until(engine, lambda output: output.stats.num_running == 1)
        os.kill(engine.pid, signal.SIGSTOP)
        await asyncio.sleep(0.3)
        before = engine.seconds_since_last_step()
        await asyncio.sleep(0.1)
        assert engine.seconds_since_last_step() > before > 0
        await engine.close()
        assert (await waiting)[-1].finish_reason == "abort"


async def test_signals_for_the_whole_group_do_not_stop_the_engine(
    engine: EngineProcess, stand_ins: ModuleType
) -> None:
    os.kill(engine.pid, signal.SIGTERM)
    os.kill(engine.pid, signal.SIGINT)
    events = await collected(engine, stand_ins.a_request("a", max_tokens=3))
    assert events[-1].finish_reason == "length"


async def test_the_engine_ends_with_its_parent() -> None:
    orphan = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "import os, socket, subprocess, sys, msgspec\n"
        "from timbre_server.engine.options import EngineOptions\n"
        "ours, theirs = socket.socketpair()\n"
        "command = [*sys.argv[1:], str(theirs.fileno())]\n"
        "child = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)\n"
        "payload = msgspec.msgpack.encode(EngineOptions(model='scripted', adapters_dir=''))\n"
        "ours.sendall(len(payload).to_bytes(4, 'big') + payload)\n"
        "ours.recv(4)\n"
        "print(child.pid, flush=True)\n"
        "os._exit(0)\n",
        *WORKER,
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await asyncio.wait_for(orphan.communicate(), 60)
    pid = int(output)
    for _ in range(600):
        if is_gone(pid) or "Z" in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1]:
            return
        await asyncio.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    raise AssertionError("the engine outlived its parent")
