"""One answer in the making: what both OpenAI routes do alike, from admission to the response.

Knows no answer formats: the routes hand in how the whole body, or the stream's chunks, are made.
"""

from __future__ import annotations

import time
import uuid
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from timbre_server.errors import InvalidRequest
from timbre_server.http.context import ServingContext
from timbre_server.http.generation import Asked, Delta, run_choices
from timbre_server.http.logprobs import TokenLabels
from timbre_server.http.mixes import wanted_mix
from timbre_server.http.openai_schema import GenerationRequest
from timbre_server.http.planning import (
    Choice,
    EncodedPrompt,
    LogprobWishes,
    check_logprobs,
    plan_choices,
    room_for_output,
    sampling_params,
)
from timbre_server.http.sse import CLIENT_CLOSED, EventStreamResponse, encoded, unless_disconnected
from timbre_server.http.text_stream import StopMatcher, TextStream
from timbre_server.http.unserved_fields import ignored_fields, ignored_header
from timbre_server.http.voice import Voice, resolve_voice

Body = dict[str, Any]

NOMINAL_OUTPUT_TOKENS = 1024
"""Counted at admission for a choice whose client named no limit: it may run to the context's end, but seldom
does. If many do, the engine preempts; the gate need not keep room for it."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the two routes ask for in different words."""

    id_prefix: str
    max_tokens: int | None
    default_max_tokens: int
    logprobs: LogprobWishes
    logprobs_field: str


@dataclass(frozen=True, slots=True)
class Answer:
    """Everything about one request that its answer is made from."""

    context: ServingContext
    request: GenerationRequest
    voice: Voice
    prompts: Sequence[EncodedPrompt]
    choices: Sequence[Choice]
    id: str
    created: int
    labels: TokenLabels
    num_expected_tokens: int
    """Prompts and output of all choices, as admission counts them."""

    def deltas(self) -> AsyncGenerator[Delta, None]:
        """Starts the engine's work at the first step; closing it aborts what still runs."""
        asked = Asked(
            adapters=self.voice.names,
            n=self.request.n,
            client_stop_ids=frozenset(self.request.stop_token_ids),
            show_stop_token=self.request.include_stop_str_in_output,
            new_text_stream=self._new_text_stream,
            on_submitted=self.context.on_submitted,
            on_finished=self.context.on_finished,
        )
        return run_choices(self.context.engine, self.choices, asked)

    def _new_text_stream(self, choice: Choice) -> TextStream:
        codec, request = self.context.text, self.request
        decode = (
            partial(codec.decode, skip_special_tokens=request.skip_special_tokens)
            if codec is not None
            else None
        )
        matcher = StopMatcher(request.stop, include_in_output=request.include_stop_str_in_output)
        return TextStream(decode, choice.submit.prompt_token_ids, matcher, min_tokens=request.min_tokens)

    def head(self, kind: str) -> Body:
        """The keys that every body and every chunk begins with."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.voice.model,
            "system_fingerprint": "timbre-" + self.context.engine.info.model_digest[-12:],
        }

    @property
    def include_usage(self) -> bool:
        options = self.request.stream_options
        return options is not None and options.include_usage

    @property
    def continuous_usage(self) -> bool:
        options = self.request.stream_options
        return options is not None and options.continuous_usage_stats


class Usage:
    """Counts of one answer so far. A prompt counts once, whatever ``n`` is."""

    def __init__(self, answer: Answer) -> None:
        self._prompt_tokens = sum(len(prompt.token_ids) for prompt in answer.prompts)
        self._n = answer.request.n
        self._completion_tokens = 0
        self._cached_tokens = 0

    def add(self, delta: Delta) -> None:
        self._completion_tokens += len(delta.token_ids)
        if delta.index == delta.prompt_index * self._n:
            self._cached_tokens += delta.cached_tokens

    def body(self) -> Body:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
        }


async def choose_voice(context: ServingContext, request: GenerationRequest, http: Request) -> Voice:
    """Resolves the adapters and leaves their label in the request's state, for the log."""
    voice = await resolve_voice(context, request.model, request.adapter_id, wanted_mix(request))
    http.state.adapter = voice.label
    return voice


def prepare(
    context: ServingContext,
    request: GenerationRequest,
    voice: Voice,
    prompts: Sequence[EncodedPrompt],
    wishes: Wishes,
) -> Answer:
    """Checks everything that is left to check, and plans the engine's work.

    Raises: InvalidRequest; ContextLengthExceeded.
    """
    info, limits = context.engine.info, context.limits
    if request.stop and context.text is None:
        raise InvalidRequest(
            "this model has no tokenizer, so stop strings cannot be found; use stop_token_ids", param="stop"
        )
    check_logprobs(wishes.logprobs.output, limits, wishes.logprobs_field)
    check_logprobs(wishes.logprobs.prompt, limits, "prompt_logprobs")
    max_tokens = room_for_output(
        info, prompts, voice.virtual_tokens, wishes.max_tokens, wishes.default_max_tokens
    )
    sampling = sampling_params(request, info, max_tokens=max_tokens, logprobs=wishes.logprobs)
    answer_id = f"{wishes.id_prefix}-{uuid.uuid4().hex}"
    choices = plan_choices(
        request,
        prompts,
        sampling,
        request_id=answer_id,
        uses=voice.uses,
        max_choices=limits.max_prompts,
    )
    labels = TokenLabels(context.text, as_ids=request.return_tokens_as_token_ids)
    output = max_tokens if wishes.max_tokens is not None else min(max_tokens, NOMINAL_OUTPUT_TOKENS)
    expected = sum(voice.virtual_tokens + len(choice.submit.prompt_token_ids) + output for choice in choices)
    return Answer(context, request, voice, prompts, choices, answer_id, int(time.time()), labels, expected)


async def deliver(
    answer: Answer,
    http: Request,
    *,
    whole: Callable[[Answer], Coroutine[Any, Any, Body]],
    chunks: Callable[[Answer], AsyncGenerator[Body, None]],
) -> Response:
    """The response, streamed or not. Holds a place in the server until the answer has ended.

    Raises: QueueFull before anything is sent; ServerError where the engine fails an unstreamed answer.
    """
    context = answer.context
    headers = answer.voice.headers() | ignored_header(ignored_fields(answer.request))
    held = ExitStack()
    held.enter_context(context.admission.hold(len(answer.choices), answer.num_expected_tokens))
    if answer.request.stream:
        return EventStreamResponse(
            encoded(chunks(answer)),
            headers=headers,
            keep_alive_s=context.limits.keep_alive_s,
            on_close=held.close,
        )
    with held:
        body = await unless_disconnected(http.receive, whole(answer))
    if body is None:
        return Response(status_code=CLIENT_CLOSED)
    return json_response(body, headers=headers)


def json_response(body: Mapping[str, Any], *, headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(body), media_type="application/json", headers=headers)


async def streamed(
    answer: Answer, kind: str, parts_of: Callable[[Delta], list[Body]]
) -> AsyncGenerator[Body, None]:
    """The chunks of a stream: each part of a choice in one, then the usage where it was asked for.

    The first says who answers. With ``include_usage`` all but the last have ``usage: null``, or with
    ``continuous_usage_stats`` the counts so far.
    """
    usage = Usage(answer)
    head = answer.head(kind)
    first: Body = {"adapter": answer.voice.body()}
    deltas = answer.deltas()
    try:
        async for delta in deltas:
            usage.add(delta)
            for part in parts_of(delta):
                chunk = {**head, "choices": [part], **first}
                if answer.continuous_usage:
                    chunk["usage"] = usage.body()
                elif answer.include_usage:
                    chunk["usage"] = None
                first = {}
                yield chunk
    finally:
        await deltas.aclose()
    if answer.include_usage:
        yield {**head, "choices": [], "usage": usage.body(), **first}


async def gathered(
    answer: Answer,
    kind: str,
    parts_of: Callable[[Delta], list[Body]],
    take_text: Callable[[Body], str],
) -> Body:
    """What `streamed` sends in parts as one body; each choice has its whole text under ``text``.

    ``take_text`` takes a part's text out of it.
    """
    usage = Usage(answer)
    choices: dict[int, Body] = {}
    texts: defaultdict[int, list[str]] = defaultdict(list)
    async with aclosing(answer.deltas()) as deltas:
        async for delta in deltas:
            usage.add(delta)
            for part in parts_of(delta):
                texts[delta.index].append(take_text(part))
                if choices.setdefault(delta.index, part) is not part:
                    _append(choices[delta.index], part)
    return {
        **answer.head(kind),
        "choices": [choices[index] | {"text": "".join(texts[index])} for index in sorted(choices)],
        "usage": usage.body(),
        "adapter": answer.voice.body(),
    }


def _append(choice: Body, part: Body) -> None:
    """Adds a choice's next part, but for its text, to what there is of it."""
    for key in part.keys() & {"token_ids", "routing"}:
        choice.setdefault(key, []).extend(part[key])
    if choice["logprobs"] is None:
        choice["logprobs"] = part["logprobs"]
    else:
        for key, values in (part["logprobs"] or {}).items():
            if values:  # A chat's refusal is null.
                choice["logprobs"][key] += values
    choice["finish_reason"], choice["stop_reason"] = part["finish_reason"], part["stop_reason"]
