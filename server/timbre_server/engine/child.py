"""An engine's process from its parent: until it is ready, and until it is gone."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Mapping

from timbre_server.engine.messages import Failed, FromEngine, Progress, Ready, StepOutput
from timbre_server.engine.wire import AsyncChannel
from timbre_server.errors import EngineDied, UnsupportedModel

_AWAKE = 10_000
"""How often a thread looks, for some half a millisecond, before it sleeps until others have come as far."""


def environment(own: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Of a child: this process's, and how its threads wait for each other where nothing is said of that.

    GNU's OpenMP lets them look thirty times as long. Where something else has one of the processors, each
    of a step's hundreds of kernels would hold the other one that long for nothing."""
    is_said = own.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    return {**own} if is_said else {**own, "GOMP_SPINCOUNT": str(_AWAKE)}


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
