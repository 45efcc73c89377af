"""``POST /v1/completions``: OpenAI's older form, with echo, several prompts, and vLLM's extras."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from starlette.responses import Response

from timbre_server.http.answer import Answer, Wishes, choose_voice, deliver, gathered, prepare, streamed
from timbre_server.http.context import ServingContext
from timbre_server.http.generation import Delta
from timbre_server.http.json_bodies import JSON_ONLY, JsonRoute
from timbre_server.http.logprobs import TextOffsets, completion_logprobs, prompt_logprobs_list
from timbre_server.http.openai_schema import CompletionRequest
from timbre_server.http.planning import LogprobWishes, encode_prompts
from timbre_server.http.routing import routing_body
from timbre_server.http.unserved_fields import ignored_fields

DEFAULT_MAX_TOKENS = 16
OBJECT = "text_completion"


def completions_router(context: ServingContext) -> APIRouter:
    router = APIRouter(tags=["openai"], dependencies=[JSON_ONLY], route_class=JsonRoute)

    @router.post("/v1/completions", response_model=None)
    async def create_completion(body: Annotated[CompletionRequest, Body()], http: Request) -> Response:
        """Continues one prompt or several."""
        ignored_fields(body)
        voice = await choose_voice(context, body, http)
        prompts = await encode_prompts(
            context,
            body.prompt,
            add_special_tokens=body.add_special_tokens,
            keep_last=body.truncate_prompt_tokens,
        )
        answer = prepare(context, body, voice, prompts, _wishes(body))
        return await deliver(
            answer,
            http,
            whole=lambda answer: _whole(answer, body),
            chunks=lambda answer: _chunks(answer, body),
        )

    return router


def _wishes(request: CompletionRequest) -> Wishes:
    echoed = request.logprobs if request.echo else None
    wanted = [number for number in (echoed, request.prompt_logprobs) if number is not None]
    prompt = None if not wanted else -1 if -1 in wanted else max(wanted)
    return Wishes(
        id_prefix="cmpl",
        max_tokens=request.max_tokens,
        default_max_tokens=DEFAULT_MAX_TOKENS,
        logprobs=LogprobWishes(request.logprobs, prompt),
        logprobs_field="logprobs",
    )


async def _whole(answer: Answer, request: CompletionRequest) -> dict[str, Any]:
    return await gathered(answer, OBJECT, _Parts(answer, request).of, lambda part: str(part.pop("text")))


def _chunks(answer: Answer, request: CompletionRequest) -> AsyncGenerator[dict[str, Any], None]:
    return streamed(answer, OBJECT, _Parts(answer, request).of)


class _Parts:
    """Turns deltas into parts of choices: the same for chunks and for the whole."""

    def __init__(self, answer: Answer, request: CompletionRequest) -> None:
        self._answer = answer
        self._request = request
        self._offsets: dict[int, TextOffsets] = {}
        """Of the choices that have begun."""

    def of(self, delta: Delta) -> list[dict[str, Any]]:
        """One part, or none where there is nothing to say yet."""
        begins = delta.index not in self._offsets
        if not (delta.token_ids or delta.finish_reason):
            return []
        echoed = self._echoed_text(delta) if begins else ""
        if begins:
            codec, skip = self._answer.context.text, self._request.skip_special_tokens
            self._offsets[delta.index] = TextOffsets(codec, skip_special_tokens=skip, echoed=echoed)
        request = self._request
        silent = not delta.text and delta.finish_reason is None
        tells_tokens = request.logprobs is not None or request.return_token_ids or request.return_routing
        if silent and not begins and not tells_tokens:
            return []
        part: dict[str, Any] = {
            "index": delta.index,
            "text": echoed + delta.text,
            "logprobs": self._logprobs(delta, begins=begins),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if begins and request.prompt_logprobs is not None:
            part["prompt_logprobs"] = prompt_logprobs_list(delta.prompt_logprobs, self._answer.labels)
        if request.return_routing:
            part["routing"] = routing_body(delta.routing, self._answer.voice.labels)
        if request.return_token_ids:
            part["token_ids"] = list(delta.token_ids)
            if begins:
                part["prompt_token_ids"] = self._prompt_ids(delta)
        return [part]

    def _prompt_ids(self, delta: Delta) -> list[int]:
        return self._answer.prompts[delta.prompt_index].token_ids

    def _echoed_text(self, delta: Delta) -> str:
        if not self._request.echo:
            return ""
        prompt, codec = self._answer.prompts[delta.prompt_index], self._answer.context.text
        if prompt.text is not None:
            return prompt.text
        if codec is None:
            return ""
        return codec.decode(prompt.token_ids, skip_special_tokens=self._request.skip_special_tokens)

    def _logprobs(self, delta: Delta, *, begins: bool) -> dict[str, list[Any]] | None:
        if self._request.logprobs is None:
            return None
        positions = list(zip(delta.token_ids, delta.logprobs, strict=False))
        offsets = self._offsets[delta.index]
        if begins and self._request.echo:
            prompt = zip(self._prompt_ids(delta), delta.prompt_logprobs, strict=False)
            return completion_logprobs([*prompt, *positions], self._answer.labels, offsets)
        return completion_logprobs(positions, self._answer.labels, offsets)
