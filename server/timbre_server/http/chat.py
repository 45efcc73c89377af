"""``POST /v1/chat/completions``: a conversation, written out by the model's own template."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from starlette.responses import Response

from timbre_server.errors import InvalidRequest
from timbre_server.http.answer import Answer, Wishes, choose_voice, deliver, gathered, prepare, streamed
from timbre_server.http.context import ServingContext
from timbre_server.http.generation import Delta
from timbre_server.http.json_bodies import JSON_ONLY, JsonRoute
from timbre_server.http.logprobs import chat_logprobs, prompt_logprobs_list
from timbre_server.http.openai_schema import ChatRequest
from timbre_server.http.planning import LogprobWishes, encode_prompts, render_prompt
from timbre_server.http.routing import routing_body
from timbre_server.http.unserved_fields import ignored_fields

OBJECT = "chat.completion"


def chat_router(context: ServingContext) -> APIRouter:
    router = APIRouter(tags=["openai"], dependencies=[JSON_ONLY], route_class=JsonRoute)

    @router.post("/v1/chat/completions", response_model=None)
    async def create_chat_completion(body: Annotated[ChatRequest, Body()], http: Request) -> Response:
        """Answers a conversation."""
        ignored_fields(body)
        voice = await choose_voice(context, body, http)
        prompts = await encode_prompts(
            context,
            await render_prompt(context, body),
            add_special_tokens=body.add_special_tokens,
            keep_last=body.truncate_prompt_tokens,
        )
        answer = prepare(context, body, voice, prompts, _wishes(context, body))
        return await deliver(
            answer,
            http,
            whole=lambda answer: _whole(answer, body),
            chunks=lambda answer: _chunks(answer, body),
        )

    return router


def _wishes(context: ServingContext, request: ChatRequest) -> Wishes:
    limits = [limit for limit in (request.max_completion_tokens, request.max_tokens) if limit is not None]
    if len(set(limits)) > 1:
        raise InvalidRequest(
            f"max_tokens is {request.max_tokens} and max_completion_tokens {request.max_completion_tokens}; "
            "send one of them",
            param="max_tokens",
        )
    return Wishes(
        id_prefix="chatcmpl",
        max_tokens=limits[0] if limits else None,
        default_max_tokens=context.engine.info.max_model_len,
        logprobs=LogprobWishes(
            (request.top_logprobs or 0) if request.logprobs else None, request.prompt_logprobs
        ),
        logprobs_field="top_logprobs",
    )


async def _whole(answer: Answer, request: ChatRequest) -> dict[str, Any]:
    """What is told of the prompt stands beside the choices."""
    parts = _Parts(answer, request)
    prompt: dict[str, Any] = {}

    def parts_of(delta: Delta) -> list[dict[str, Any]]:
        if delta.prompt_logprobs:
            prompt["prompt_logprobs"] = prompt_logprobs_list(delta.prompt_logprobs, answer.labels)
        return parts.of(delta)

    body = await gathered(answer, OBJECT, parts_of, lambda part: part.pop("delta").get("content", ""))
    for choice in body["choices"]:
        choice["message"] = {"role": "assistant", "content": choice.pop("text"), "refusal": None}
        if request.return_token_ids:
            prompt["prompt_token_ids"] = choice.pop("prompt_token_ids")
    return body | prompt


def _chunks(answer: Answer, request: ChatRequest) -> AsyncGenerator[dict[str, Any], None]:
    return streamed(answer, f"{OBJECT}.chunk", _Parts(answer, request).of)


class _Parts:
    """Turns deltas into parts of choices: the role first, then content, then an empty one with the reason."""

    def __init__(self, answer: Answer, request: ChatRequest) -> None:
        self._answer = answer
        self._request = request
        self._begun: set[int] = set()

    def of(self, delta: Delta) -> list[dict[str, Any]]:
        if not (delta.token_ids or delta.finish_reason):
            return []
        parts = []
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            parts.append(self._opening(delta))
        request = self._request
        tells_tokens = request.logprobs or request.return_token_ids or request.return_routing
        if delta.text or (delta.token_ids and tells_tokens):
            parts.append(self._content(delta))
        if delta.finish_reason is not None:
            reasons = {"finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason}
            parts.append(_part(delta.index, {}) | reasons)
        return parts

    def _opening(self, delta: Delta) -> dict[str, Any]:
        part = _part(delta.index, {"role": "assistant", "content": ""})
        if self._request.return_token_ids:
            part["prompt_token_ids"] = self._answer.prompts[delta.prompt_index].token_ids
        return part

    def _content(self, delta: Delta) -> dict[str, Any]:
        part = _part(delta.index, {"content": delta.text})
        if self._request.logprobs:
            part["logprobs"] = chat_logprobs(delta.logprobs, self._answer.labels)
        if self._request.return_token_ids:
            part["token_ids"] = list(delta.token_ids)
        if self._request.return_routing:
            part["routing"] = routing_body(delta.routing, self._answer.voice.labels)
        return part


def _part(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, "stop_reason": None}
