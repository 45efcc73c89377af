"""The engine as the server sees it: `Engine`, and `EngineProcess`, which runs one beside the server.

Requests go out as messages, events come back to one queue a request. An engine that dies ends every open
request with `EngineDied`; nobody is left waiting. No tensors, no model, no adapter files on this side.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Protocol

import msgspec

from timbre_server.engine.child import end, until_ready
from timbre_server.engine.messages import (
    Abort,
    AdapterLoaded,
    DeriveTensors,
    Failed,
    FromEngine,
    LoadAdapter,
    Ready,
    Shutdown,
    StepOutput,
    StepStats,
    Submit,
    TensorsDerived,
    TokenEvent,
    UnloadAdapter,
)
from timbre_server.engine.options import EngineOptions
from timbre_server.engine.pin_messages import PinAdapter, PinAnswer, PinnedAdapter, UnpinAdapter
from timbre_server.engine.waiting import Waiting
from timbre_server.engine.wire import AsyncChannel, WireError
from timbre_server.errors import ERRORS_BY_CODE, AdapterLoadFailed, EngineDied

WORKER = (sys.executable, "-m", "timbre_server.engine.worker")
GRACE_S = 5.0
"""How long an engine may take to leave by itself before it is killed."""
SHUT_DOWN = "the server is shutting down and this request was not finished in time; send it again"


class Engine(Protocol):
    """What HTTP, metrics and probes know of the engine."""

    @property
    def info(self) -> Ready:
        """What model is served, and with what limits."""
        ...

    @property
    def latest(self) -> StepStats:
        """The gauges after the last step."""
        ...

    @property
    def alive(self) -> bool: ...

    def seconds_since_last_step(self) -> float:
        """How long the engine has been silent with a request open; 0 without any."""
        ...

    def submit(self, request: Submit) -> AsyncGenerator[TokenEvent, None]:
        """The request's events, its final one last. Submits when first asked for an event; closing the
        generator before the end aborts the request. Raises EngineDied."""
        ...

    async def load_adapter(self, digest: str) -> AdapterLoaded:
        """Return when the adapter is in memory. Raises AdapterLoadFailed, AdapterTooLarge, EngineDied."""
        ...

    async def unload_adapter(self, digest: str) -> None:
        """Return when the adapter is out of memory, once its last request has ended. Raises EngineDied."""
        ...

    async def pin_adapter(self, digest: str, mix: tuple[tuple[str, float], ...]) -> PinnedAdapter:
        """Return when the mix that ``digest`` names is merged. Raises PinNotServed, PinConflict,
        AdapterLoadFailed, AdapterTooLarge, EngineDied."""
        ...

    async def unpin_adapter(self, digest: str) -> None:
        """Return when its merged weights are gone. Raises PinConflict, EngineDied."""
        ...

    async def derive_tensors(self, message: DeriveTensors) -> TensorsDerived:
        """Return when the file is written, or with the reason why it is not. Raises EngineDied."""
        ...

    def on_output(self, callback: Callable[[StepOutput], None]) -> None:
        """Call back with everything the engine says, before the requests' readers see it."""
        ...

    async def close(self) -> None:
        """End the engine; open requests end with an abort event. Returns when it is gone."""
        ...


class EngineProcess:
    """An `Engine` in a child process. Made by `start`; all methods belong to the loop that made it."""

    def __init__(
        self, child: asyncio.subprocess.Process, channel: AsyncChannel[FromEngine], info: Ready
    ) -> None:
        self.info = info
        self.latest = StepStats()
        self._child = child
        self._channel = channel
        self._why_dead: str | None = None
        self._open: set[str] = set()
        """Requests whose final event has not come."""
        self._queues: dict[str, asyncio.Queue[TokenEvent | EngineDied]] = {}
        self._loads = Waiting[AdapterLoaded]()
        self._unloads = Waiting[None]()
        self._pins = Waiting[PinAnswer]()
        self._derivations = Waiting[TensorsDerived]()
        self._callbacks: list[Callable[[StepOutput], None]] = []
        self._heard_s = time.monotonic()
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(
        cls,
        options: EngineOptions,
        on_progress: Callable[[str], None] = lambda text: None,
        *,
        worker: Sequence[str] = WORKER,
    ) -> EngineProcess:
        """Start a child and wait until its model is loaded and checked.

        ``worker`` is a command that takes the number of an inherited socket. Raises UnsupportedModel,
        EngineDied; a failed or cancelled start leaves no child.
        """
        ours, theirs = socket.socketpair()
        channel: AsyncChannel[FromEngine] = await AsyncChannel.over(ours, msgspec.msgpack.Decoder(FromEngine))
        child = None
        try:
            with theirs:
                child = await asyncio.create_subprocess_exec(
                    *worker,
                    str(theirs.fileno()),
                    pass_fds=(theirs.fileno(),),
                    stdin=asyncio.subprocess.DEVNULL,
                )
            channel.send(options)
            info = await until_ready(channel, on_progress)
        except BaseException:
            await channel.close()
            if child is not None:
                await end(child, grace_s=0.0)
            raise
        return cls(child, channel, info)

    @property
    def alive(self) -> bool:
        return self._why_dead is None

    @property
    def pid(self) -> int:
        """The child's process id, for logs."""
        return self._child.pid

    def seconds_since_last_step(self) -> float:
        return time.monotonic() - self._heard_s if self._open else 0.0

    async def submit(self, request: Submit) -> AsyncGenerator[TokenEvent, None]:
        self._refuse_if_dead()
        name = request.request_id
        assert name not in self._queues, f"request id {name} is in use"
        queue: asyncio.Queue[TokenEvent | EngineDied] = asyncio.Queue()
        if not self._open:
            self._heard_s = time.monotonic()
        self._open.add(name)
        self._queues[name] = queue
        is_over = False
        try:
            self._channel.send(request)
            while not is_over:
                event = await queue.get()
                if isinstance(event, EngineDied):
                    is_over = True
                    raise event
                is_over = event.finish_reason is not None
                yield event
        finally:
            self._queues.pop(name)
            self._open.discard(name)
            if not is_over:
                self._channel.send(Abort(name))

    async def load_adapter(self, digest: str) -> AdapterLoaded:
        self._refuse_if_dead()
        answer = self._loads.on(digest)
        self._channel.send(LoadAdapter(digest))
        return await answer

    async def unload_adapter(self, digest: str) -> None:
        self._refuse_if_dead()
        answer = self._unloads.on(digest)
        self._channel.send(UnloadAdapter(digest))
        await answer

    async def pin_adapter(self, digest: str, mix: tuple[tuple[str, float], ...]) -> PinnedAdapter:
        pinned = (await self._ask_pin("pin", PinAdapter(digest, mix))).pinned
        assert pinned is not None, "a pin that was not refused says what is pinned"
        return pinned

    async def unpin_adapter(self, digest: str) -> None:
        await self._ask_pin("unpin", UnpinAdapter(digest))

    async def _ask_pin(self, asked: str, message: PinAdapter | UnpinAdapter) -> PinAnswer:
        self._refuse_if_dead()
        answer = self._pins.on(f"{asked} {message.digest}")
        self._channel.send(message)
        return await answer

    async def derive_tensors(self, message: DeriveTensors) -> TensorsDerived:
        self._refuse_if_dead()
        answer = self._derivations.on(message.derived_path)
        self._channel.send(message)
        return await answer

    def on_output(self, callback: Callable[[StepOutput], None]) -> None:
        self._callbacks.append(callback)

    async def close(self) -> None:
        if self._why_dead is None:
            self._channel.send(Shutdown())
            for name, queue in self._queues.items():
                queue.put_nowait(TokenEvent(name, finish_reason="abort", error_message=SHUT_DOWN))
            self._die("the engine was shut down")
        await end(self._child, grace_s=GRACE_S)
        await self._channel.close()
        await asyncio.wait([self._reading])

    async def _read(self) -> None:
        why = "the engine process ended"
        try:
            while (message := await self._channel.receive()) is not None:
                if isinstance(message, StepOutput):
                    self._take(message)
                elif isinstance(message, Failed):
                    why = f"the engine failed: {message.text}"
        except WireError as error:
            why = f"the engine process broke the protocol: {error}"
        finally:
            self._die(why)

    def _take(self, output: StepOutput) -> None:
        self._heard_s = time.monotonic()
        self.latest = output.stats
        for callback in self._callbacks:
            callback(output)
        for event in output.events:
            if event.finish_reason is not None:
                self._open.discard(event.request_id)
            queue = self._queues.get(event.request_id)
            if queue is not None:
                queue.put_nowait(event)
        for gone in output.unloaded:
            if gone.reason != "evicted":
                self._unloads.settle(gone.digest, None)
                unloaded = AdapterLoadFailed(f"adapter {gone.digest} was unloaded while it was being loaded")
                self._loads.settle(gone.digest, unloaded)
        for loaded in output.loaded:
            why = loaded.error_message or ""
            failed = ERRORS_BY_CODE[loaded.error_code](why) if loaded.error_code else None
            self._loads.settle(loaded.digest, failed or loaded)
        for derived in output.derived:
            self._derivations.settle(derived.derived_path, derived)
        for answer in output.pins:
            refused = ERRORS_BY_CODE[answer.error_code](answer.error_message) if answer.error_code else None
            self._pins.settle(f"{answer.asked} {answer.digest}", refused or answer)

    def _refuse_if_dead(self) -> None:
        if self._why_dead is not None:
            raise EngineDied(self._why_dead)

    def _die(self, why: str) -> None:
        """End everything that waits for the engine; the first reason is the one that is told."""
        if self._why_dead is None:
            self._why_dead = why
        self._open.clear()
        for queue in self._queues.values():
            queue.put_nowait(EngineDied(self._why_dead))
        for waiting in (self._loads, self._unloads, self._derivations, self._pins):
            waiting.settle_all(EngineDied(self._why_dead))
