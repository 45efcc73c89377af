"""What is refused, with which words, and what is let through but named."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"

OUT_OF_BOUNDS = [
    ("temperature", -0.1), ("temperature", 2.1), ("temperature", "hot"), ("temperature", True),
    ("top_p", -1), ("top_p", 1.01), ("top_k", -2), ("top_k", 1.5), ("min_p", 2),
    ("repetition_penalty", 0), ("repetition_penalty", 101), ("presence_penalty", 3),
    ("frequency_penalty", -3), ("logit_bias", {"1": 101}), ("logit_bias", {"x": 1}),
    ("logit_bias", {"99999": 1}), ("logit_bias", [1]), ("seed", 2**63), ("seed", -(2**63) - 1),
    ("seed", 1.5), ("stop", ["a"] * 17), ("stop", ""), ("stop", "x" * 1025), ("stop", [3]),
    ("stop_token_ids", [-1]), ("stop_token_ids", [1] * 129), ("min_tokens", -1), ("min_tokens", 2**40),
    ("n", 0), ("n", 129), ("n", 2**63), ("max_tokens", -1), ("max_tokens", 2**31), ("stream", "yes"),
    ("cache_salt", ""), ("cache_salt", "x" * 1025), ("truncate_prompt_tokens", 0), ("user", "x" * 1025),
    ("model", "x" * 257), ("model", ""), ("stream_options", {"include_usage": True}),
]  # fmt: skip
COMPLETION_ONLY = [
    ("logprobs", -2), ("logprobs", 21), ("logprobs", True), ("prompt_logprobs", 21), ("echo", 1),
    ("prompt", []), ("prompt", {}), ("prompt", [[]]), ("prompt", [1, "a"]), ("prompt", [-1]),
    ("prompt", [[1], "a"]), ("prompt", [True]), ("prompt", [2**31]), ("prompt", [400]), ("prompt", ""),
    ("prompt", 3),
]  # fmt: skip
CHAT_ONLY = [
    ("logprobs", 3), ("top_logprobs", 2), ("messages", []), ("messages", "hi"),
    ("messages", [{"role": "user", "content": 3}]),
    ("messages", [{"role": "wizard", "content": "x"}]), ("max_tokens", 0), ("max_completion_tokens", 0),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
    ("chat_template_kwargs", {"tokenize": True}), ("chat_template_kwargs", {"chat_template": "x"}),
    ("chat_template_kwargs", {"x": []}), ("continue_final_message", True),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), OUT_OF_BOUNDS + COMPLETION_ONLY, ids=lambda v: str(v)[:20])
async def test_completions_refuse_what_is_out_of_bounds(rig: Any, field: str, value: object) -> None:
    status, error = await rig.refused(COMPLETIONS, **{field: value})
    assert status == 400
    assert field in error["message"] + str(error["param"])
    assert len(json.dumps(error)) < 8192
    assert rig.engine.submitted == []


@pytest.mark.parametrize(("field", "value"), OUT_OF_BOUNDS + CHAT_ONLY, ids=lambda v: str(v)[:20])
async def test_chat_refuses_what_is_out_of_bounds(rig: Any, field: str, value: object) -> None:
    status, error = await rig.refused(CHAT, **{field: value})
    assert status == 400
    assert field in error["message"] + str(error["param"])
    assert rig.engine.submitted == []


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "repetition_penalty", "min_p"])
async def test_numbers_that_are_none_are_refused(rig: Any, field: str, word: str) -> None:
    text = f'{{"model": "tiny-base", "prompt": "hi", "{field}": {word}}}'
    async with rig.client() as client:
        response = await client.post(COMPLETIONS, content=text, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert "not valid JSON" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("guided_json", {"type": "object"}), ("guided_anything", 1), ("prompt_embeds", "abc"), ("best_of", 2),
        ("suffix", "end"), ("tools", [{"type": "function"}]), ("tool_choice", "required"),
        ("functions", [{}]), ("structured_outputs", {"json": {}}), ("lora_scale", 0.5),
        ("loras", [{"path": "a"}]), ("adapter_source", "hub"), ("use_beam_search", True),
        ("bad_words", ["x"]), ("allowed_token_ids", [1]), ("chat_template", "{{ x }}"),
        ("response_format", {"type": "json_object"}),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_what_would_change_the_answer_is_refused_by_name(
    rig: Any, path: str, field: str, value: object
) -> None:
    status, error = await rig.refused(path, **{field: value})
    assert (status, error["code"], error["param"]) == (400, "unsupported_parameter", field)
    assert rig.engine.submitted == []


@pytest.mark.parametrize(
    "fields",
    [
        {"best_of": 1}, {"best_of": 2, "n": 2}, {"stop": ["z"] * 16}, {"suffix": ""}, {"tools": []},
        {"tool_choice": "none"}, {"guided_json": None},
        {"response_format": {"type": "text"}}, {"adapter_source": "registry"}, {"user": "u"},
        {"safety_identifier": "s"},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_the_same_fields_at_rest_are_let_through(rig: Any, path: str, fields: dict[str, Any]) -> None:
    shared: dict[str, Any] = {"model": "tiny-base", "prompt": "x"}
    if path == CHAT:
        shared = {"model": "tiny-base", "messages": [{"role": "user", "content": "x"}]}
    response = await rig.post(path, **shared, **fields)
    assert response.status_code == 200
    assert "x-ignored-fields" not in response.headers


async def test_unknown_fields_are_named_in_a_header_that_cannot_be_broken(rig: Any) -> None:
    odd = "a\r\nset-cookie: x"
    for stream in (False, True):
        response = await rig.post(
            COMPLETIONS, model="tiny-base", prompt="x", metadata={}, zzz=1, **{odd: 1}, stream=stream
        )
        assert response.status_code == 200
        assert response.headers["x-ignored-fields"] == "metadata, zzz, ?"
        assert "set-cookie" not in response.headers


async def test_unknown_fields_of_messages_are_named_and_tool_calls_refused(rig: Any) -> None:
    message = {"role": "user", "content": "x", "mood": "good", "refusal": None}
    response = await rig.post(CHAT, model="tiny-base", messages=[message])
    assert response.headers["x-ignored-fields"] == "messages.mood"
    status, error = await rig.refused(CHAT, messages=[{"role": "assistant", "tool_calls": [{"id": "1"}]}])
    assert (status, error["param"]) == (400, "messages.0.tool_calls")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": [1] * 510, "max_tokens": 3}, "510 tokens and 3 tokens of output"),
        ({"prompt": [1] * 512}, "512 tokens"),
        ({"prompt": "ab" * 256}, "512 tokens"),
        ({"prompt": "x" * 100_000}, "100000 characters"),
    ],
    ids=["wanted", "default", "text", "characters"],
)
async def test_what_does_not_fit_the_context_is_refused_by_its_numbers(
    rig: Any, fields: dict[str, Any], words: str
) -> None:
    status, error = await rig.refused(COMPLETIONS, **fields)
    assert (status, error["code"]) == (400, "context_length_exceeded")
    assert words in error["message"]
    assert "maximum context length is 512 tokens" in error["message"]


async def test_the_last_free_token_can_be_used(rig: Any) -> None:
    body = await rig.complete(prompt=[1] * 511)
    assert body["usage"]["completion_tokens"] == 1
    assert (await rig.complete(prompt=[1] * 512, max_tokens=0))["usage"]["completion_tokens"] == 0


async def test_too_many_prompts_or_choices_are_refused(rig: Any) -> None:
    status, error = await rig.refused(prompt=[[1]] * 1025)
    assert (status, error["param"]) == (400, "prompt")
    status, error = await rig.refused(prompt=[[1]] * 9, n=128)
    assert (status, error["param"]) == (400, "n")


async def test_wrong_values_without_number_are_not_looked_at_one_by_one(rig: Any) -> None:
    status, error = await rig.refused(logit_bias={str(token): "x" for token in range(1025)})
    assert (status, error["param"]) == (400, "logit_bias")
    assert "an object has 1025 fields; at most 1024 are read" in error["message"]
    status, error = await rig.refused(**{f"extra_{index}": index for index in range(256)})
    assert status == 400
    assert "at most 256 are read" in error["message"]


class CountedCodec:
    """The same, and counts the texts that were encoded and those of each job."""

    def __init__(self, codec: Any) -> None:
        self._codec = codec
        self.num_encoded = 0
        self.by_job: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._codec, name)

    def encode(self, text: str, *, add_special_tokens: bool) -> Any:
        self.num_encoded += 1
        return self._codec.encode(text, add_special_tokens=add_special_tokens)

    async def in_thread(self, work: Callable[[], Any], timeout_s: float | None = None) -> Any:
        before = self.num_encoded
        result = await self._codec.in_thread(work, timeout_s)
        self.by_job.append(self.num_encoded - before)
        return result


async def test_each_text_is_a_job_and_the_first_that_does_not_fit_is_the_last(rig: Any) -> None:
    codec = CountedCodec(rig.context.text)
    rig.context = replace(rig.context, text=codec)
    await rig.complete(prompt=["a", "b", "c"])
    assert codec.by_job == [1, 1, 1]
    status, error = await rig.refused(prompt=["a", "ab" * 257, *["c"] * 20])
    assert (status, error["code"]) == (400, "context_length_exceeded")
    assert "512 tokens, but the prompt has 514 tokens" in error["message"]
    assert codec.num_encoded == 3 + 2


async def test_the_text_of_all_prompts_is_bounded_before_any_is_encoded(rig: Any) -> None:
    codec = CountedCodec(rig.context.text)
    rig.context = replace(rig.context, text=codec)
    rig.with_limits(max_prompt_chars=20)
    await rig.complete(prompt=["a" * 10] * 2)
    status, error = await rig.refused(prompt=["a" * 10, "a" * 11])
    assert (status, error["param"]) == (400, "prompt")
    assert "21 characters together; at most 20" in error["message"]
    assert codec.num_encoded == 2


async def test_more_tokens_at_least_than_at_most_are_refused(rig: Any) -> None:
    status, error = await rig.refused(min_tokens=20, max_tokens=10)
    assert (status, error["param"]) == (400, "min_tokens")


@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded"])
async def test_a_body_that_does_not_say_it_is_json_is_told_what_to_say(
    rig: Any, content_type: str | None
) -> None:
    headers = {"content-type": content_type} if content_type else {}
    async with rig.client() as client:
        response = await client.post(COMPLETIONS, content=b'{"model": "tiny-base"}', headers=headers)
    assert response.status_code == 415
    assert "Content-Type: application/json" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "fields",
    [
        '"prompt": "\\ud800"', '"prompt": "a", "stop": "\\udc00"', '"prompt": "a", "model": "\\ud800"',
        '"prompt": "a", "\\ud800": 1', '"prompt": "a", "temperature": "\\ud800"',
        '"messages": [{"role": "user", "content": "\\ud83d"}]',
    ],
)  # fmt: skip
async def test_half_a_surrogate_pair_is_no_text(rig: Any, fields: str) -> None:
    path = CHAT if "messages" in fields else COMPLETIONS
    text = f'{{"model": "tiny-base", {fields}}}'
    async with rig.client() as client:
        response = await client.post(path, content=text, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert "not valid JSON" in response.json()["error"]["message"]


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 50_000, "{", "", "null", "3", "\x00", "1" * 5000])
async def test_hostile_json_is_refused_briefly(rig: Any, text: str) -> None:
    async with rig.client() as client:
        response = await client.post(COMPLETIONS, content=text, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert len(response.content) < 2048
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
