"""An engine's process from its parent: until it is ready, and until it is gone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from timbre_server.engine.messages import Failed, FromEngine, Progress, Ready, StepOutput
from timbre_server.engine.wire import AsyncChannel
from timbre_server.errors import EngineDied, UnsupportedModel


async def until_ready(channel: AsyncChannel[FromEngine], on_progress: Callable[[str], None]) -> Ready:
    """What an engine is, once it is ready. Raises UnsupportedModel, EngineDied."""
    while (message := await channel.receive()) is not None:
        match message:
            case Ready():
                return message
            case Progress():
                on_progress(message.text)
            case Failed():
                kind = UnsupportedModel if message.code == "unsupported_model" else EngineDied
                raise kind(message.text)
            case StepOutput():
                raise EngineDied("the engine process served before it was ready")
    raise EngineDied("the engine process ended before it was ready; its own output says why")


async def end(child: asyncio.subprocess.Process, *, grace_s: float) -> None:
    """Wait until a child has ended, killing it after ``grace_s``."""
    try:
        await asyncio.wait_for(child.wait(), grace_s)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):  # It may have ended at the last moment.
            child.kill()
        await child.wait()
