"""Running an answer's choices: engine events in, pieces of text with their tokens out.

One path for streams and single answers. Leaving an iterator early, for whatever reason, closes the engine's
iterator, and so aborts the request there. Knows no answer formats.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from timbre_server.engine.client import Engine
from timbre_server.engine.messages import Routing, TokenEvent, TokenLogprobs
from timbre_server.errors import ERRORS_BY_CODE, EngineDied, EngineError, RequestAborted, ServerError
from timbre_server.http.planning import Choice
from timbre_server.http.text_stream import TextStream
from timbre_server.request_record import RequestRecord


@dataclass(frozen=True, slots=True)
class Delta:
    """What one event added to one choice. The last has a ``finish_reason``."""

    index: int
    prompt_index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    """As many as token_ids where asked, else empty."""
    routing: tuple[tuple[Routing, ...], ...] = ()
    """Of as many of the tokens as it is told for."""
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    cached_tokens: int = 0
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    """The stop string, or the client's own stop token; None for the model's end token."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What all choices of an answer share, for their text and their records."""

    adapters: tuple[str, ...]
    n: int
    client_stop_ids: frozenset[int]
    show_stop_token: bool
    new_text_stream: Callable[[Choice], TextStream]
    on_submitted: Callable[[str], None]
    on_finished: Callable[[RequestRecord], None]


async def run_choices(engine: Engine, choices: Sequence[Choice], asked: Asked) -> AsyncGenerator[Delta, None]:
    """The deltas of all choices as they come. Raises: ServerError if any of them fails; the others end."""
    async with aclosing(merged([_run_choice(engine, choice, asked) for choice in choices])) as deltas:
        async for delta in deltas:
            yield delta


async def _run_choice(engine: Engine, choice: Choice, asked: Asked) -> AsyncGenerator[Delta, None]:
    progress = _Progress(choice, asked, asked.new_text_stream(choice))
    asked.on_submitted(choice.submit.request_id)
    try:
        async with aclosing(engine.submit(choice.submit)) as events:
            async for event in events:
                delta = progress.take(event)
                yield delta
                if delta.finish_reason is not None:
                    return
        raise EngineDied("the engine ended this request without a last word")
    except ServerError:
        progress.finish_reason = "error"
        raise
    finally:
        asked.on_finished(progress.record())


class _Progress:
    """One choice so far."""

    def __init__(self, choice: Choice, asked: Asked, text: TextStream) -> None:
        self._choice = choice
        self._asked = asked
        self._text = text
        self._arrived_s = time.monotonic()
        self._first_token_s: float | None = None
        self._num_tokens = 0
        self._cached_tokens = 0
        self.finish_reason = "abort"

    def take(self, event: TokenEvent) -> Delta:
        """Raises: ServerError where the event says that the request failed."""
        if event.finish_reason in ("error", "abort"):
            raise _error_of(event)
        if event.token_ids and self._first_token_s is None:
            self._first_token_s = time.monotonic()
        self._cached_tokens = max(self._cached_tokens, event.cached_tokens)
        text, taken = self._read(event)
        self._num_tokens += taken
        stopped_by_text = self._text.stop is not None
        if event.finish_reason is not None and not stopped_by_text:
            text += self._text.finish()
            stopped_by_text = self._text.stop is not None
        reason = "stop" if stopped_by_text else event.finish_reason
        if reason is not None:
            self.finish_reason = reason
        return Delta(
            index=self._choice.index,
            prompt_index=self._choice.prompt_index,
            text=text,
            token_ids=event.token_ids[:taken],
            logprobs=event.logprobs[:taken],
            routing=event.routing[:taken],
            prompt_logprobs=event.prompt_logprobs,
            cached_tokens=event.cached_tokens,
            finish_reason=reason,
            stop_reason=self._text.stop if stopped_by_text else self._stop_token(event),
        )

    def _read(self, event: TokenEvent) -> tuple[str, int]:
        """The event's text up to a stop string, and the number of tokens that it took."""
        text = ""
        for taken, token_id in enumerate(event.token_ids, start=1):
            is_end = event.stop_token_id is not None and taken == len(event.token_ids)
            if not is_end or self._asked.show_stop_token:
                text += self._text.push(token_id)
            if self._text.stop is not None:
                return text, taken
        return text, len(event.token_ids)

    def _stop_token(self, event: TokenEvent) -> int | None:
        return event.stop_token_id if event.stop_token_id in self._asked.client_stop_ids else None

    def record(self) -> RequestRecord:
        submit = self._choice.submit
        return RequestRecord(
            request_id=submit.request_id,
            adapters=self._asked.adapters,
            arrived_s=self._arrived_s,
            first_token_s=self._first_token_s,
            finished_s=time.monotonic(),
            prompt_tokens=len(submit.prompt_token_ids),
            cached_tokens=self._cached_tokens,
            generation_tokens=self._num_tokens,
            max_tokens=submit.sampling.max_tokens,
            n=self._asked.n,
            finish_reason=self.finish_reason,
        )


def _error_of(event: TokenEvent) -> ServerError:
    if event.finish_reason == "abort":
        return RequestAborted(event.error_message or "the server ended this request before it was finished")
    kind = ERRORS_BY_CODE.get(event.error_code or "", EngineError)
    return kind(event.error_message or "the engine could not finish this request")


async def merged(streams: Sequence[AsyncGenerator[Delta, None]]) -> AsyncGenerator[Delta, None]:
    """What all streams give, in order of arrival. The first error ends and closes all of them."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for delta in only:
                yield delta
        return
    arrived: asyncio.Queue[Delta | asyncio.Task[None]] = asyncio.Queue()

    async def pump(stream: AsyncGenerator[Delta, None]) -> None:
        async with aclosing(stream) as deltas:
            async for delta in deltas:
                arrived.put_nowait(delta)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    for task in tasks:
        task.add_done_callback(arrived.put_nowait)
    running = len(tasks)
    try:
        while running:
            item = await arrived.get()
            if isinstance(item, asyncio.Task):
                item.result()
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
