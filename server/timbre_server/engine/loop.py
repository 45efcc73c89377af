"""The engine's loop on a socket: commands between steps, output after each, sleep when nothing can run.

It sleeps on the socket and on a wake-up that ends with an adapter's load. While requests wait and nothing
can run, it says so once a `HEARTBEAT_S`: silence with work waiting means that the loop hangs.
"""

from __future__ import annotations

import select
import socket

import msgspec

from timbre_server.engine.core import EngineCore
from timbre_server.engine.messages import Shutdown, StepOutput, StepStats, ToEngine, TokenEvent
from timbre_server.engine.wire import Channel, FrameTooLarge

HEARTBEAT_S = 1.0


class WakeUp:
    """Ends a sleeping loop's sleep, from any thread."""

    def __init__(self) -> None:
        self._sleeper, self._waker = socket.socketpair()
        self._sleeper.setblocking(False)
        self._waker.setblocking(False)

    def fileno(self) -> int:
        return self._sleeper.fileno()

    def ring(self) -> None:
        try:
            self._waker.send(b"\0")
        except BlockingIOError:
            return  # It has been rung so often that it cannot be overheard.

    def clear(self) -> None:
        try:
            while self._sleeper.recv(4096):
                pass
        except BlockingIOError:
            return

    def close(self) -> None:
        self._sleeper.close()
        self._waker.close()


def run_loop(core: EngineCore, channel: Channel[ToEngine], wake_up: WakeUp) -> None:
    """Serve until the peer says `Shutdown` or goes. Raises what `EngineCore.step` raises."""
    while True:
        wake_up.clear()
        for message in channel.poll():
            if isinstance(message, Shutdown):
                return
            core.take(message)
        if channel.closed:
            return
        output = core.step()
        said = output.events or output.loaded or output.unloaded or output.derived or output.pins
        is_still = not (output.stats.batch_tokens or said)
        if core.has_work or not is_still:
            send_output(core, channel, output)
        if is_still:
            select.select(
                [channel.fileno(), wake_up.fileno()], [], [], HEARTBEAT_S if core.has_work else None
            )


def send_output(core: EngineCore, channel: Channel[ToEngine], output: StepOutput) -> None:
    """Send what a step said. An answer too large for any frame ends its own request with an error."""
    try:
        channel.send(output)
    except FrameTooLarge:
        channel.send(msgspec.structs.replace(output, events=()))
        for event in output.events:
            _send_event(core, channel, output.stats, event)


def _send_event(core: EngineCore, channel: Channel[ToEngine], stats: StepStats, event: TokenEvent) -> None:
    gauges = StepStats(
        timestamp=stats.timestamp,
        num_running=stats.num_running,
        num_waiting=stats.num_waiting,
        num_waiting_for_adapter=stats.num_waiting_for_adapter,
        num_kv_blocks_used=stats.num_kv_blocks_used,
        num_resident_adapters=stats.num_resident_adapters,
        resident_adapters=stats.resident_adapters,
        waiting_adapters=stats.waiting_adapters,
        resident_adapter_bytes=stats.resident_adapter_bytes,
        pinned=stats.pinned,
    )
    try:
        channel.send(StepOutput(gauges, (event,)))
    except FrameTooLarge as error:
        core.abort(event.request_id)
        text = f"the log-probabilities asked for are too many to be sent: {error}; ask for fewer"
        failed = TokenEvent(
            event.request_id, finish_reason="error", error_code="invalid_request", error_message=text
        )
        channel.send(StepOutput(gauges, (failed,)))
