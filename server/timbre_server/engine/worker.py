"""The engine process: ``python -m timbre_server.engine.worker FD``, with FD its end of a socket pair.

It reads `EngineOptions`, says what it does while it loads, then `Ready` or `Failed`, then serves. It lives
as long as its parent: the end of the socket is the end of the process. Signals are the parent's business;
it decides whether requests are still finished after one.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable

import msgspec

from timbre_server.engine.core import EngineCore
from timbre_server.engine.loop import WakeUp, run_loop
from timbre_server.engine.messages import Failed, Progress, Ready, ToEngine
from timbre_server.engine.options import EngineOptions
from timbre_server.engine.wire import Channel, decoded
from timbre_server.errors import ServerError, UnsupportedModel

Assemble = Callable[[EngineOptions, Callable[[str], None], Callable[[], None]], tuple[EngineCore, Ready]]
"""From options, a listener for progress and a wake-up for ended loads: an engine, and what it is."""

_log = logging.getLogger(__name__)


def main() -> int:
    """The process's exit status: 0 when the parent ended it, 1 when it failed."""
    from timbre_server.engine.assembly import assemble

    return run_worker(int(sys.argv[1]), assemble)


def run_worker(descriptor: int, assemble: Assemble) -> int:
    """Serve one parent on an inherited socket. Returns an exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="engine: %(levelname)s %(name)s: %(message)s")
    connection = socket.socket(fileno=descriptor)
    channel: Channel[ToEngine] = Channel(connection, msgspec.msgpack.Decoder(ToEngine))
    first = channel.receive_payload()
    if first is None:
        return 0
    try:
        options = decoded(msgspec.msgpack.Decoder(EngineOptions), first)
        wake_up = WakeUp()
        core, ready = assemble(options, lambda text: _say(channel, text), wake_up.ring)
        gc.collect()
        gc.freeze()
        channel.send(ready)
        run_loop(core, channel, wake_up)
    except Exception as error:  # noqa: BLE001
        _log.exception("the engine failed")
        channel.send(_failed(error))
        return 1
    return 0


def _say(channel: Channel[ToEngine], text: str) -> None:
    channel.send(Progress(text))
    if channel.closed:
        sys.exit(0)


def _failed(error: Exception) -> Failed:
    if isinstance(error, UnsupportedModel):
        return Failed("unsupported_model", str(error))
    if isinstance(error, ServerError):
        return Failed("engine_died", str(error))
    return Failed("engine_died", f"{type(error).__name__}; the engine's log says more")


if __name__ == "__main__":
    status = main()
    logging.shutdown()
    # Not sys.exit: it would wait for loads and derivations that nobody waits for any more.
    os._exit(status)
