"""``/v1/chat/completions``: the template, the answer's form, log-probabilities."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import msgspec
from tokenizers import Tokenizer

from timbre_server.http.text import TextCodec

PATH = "/v1/chat/completions"


def prompt_text(rig: Any, number: int = 0) -> str:
    ids = rig.engine.submitted[number].prompt_token_ids
    text: str = rig.context.text.decode(ids, skip_special_tokens=False)
    return text


async def test_a_conversation_is_written_by_the_models_own_template(rig: Any) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None},
    ]
    body = await rig.chat(messages=messages)
    assert prompt_text(rig) == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\none\ntwo<|im_end|>\n"
        "<|im_start|>assistant\n<|im_end|>\n<|im_start|>assistant\n"
    )
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["adapter"] is None
    [choice] = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "hello wörld 😀!", "refusal": None}
    assert (choice["finish_reason"], choice["logprobs"]) == ("stop", None)


async def test_the_rest_of_the_context_is_the_default_length(rig: Any) -> None:
    await rig.chat()
    [submit] = rig.engine.submitted
    assert submit.sampling.max_tokens == 512 - len(submit.prompt_token_ids)


async def test_either_word_for_the_length_works_and_two_lengths_do_not(rig: Any) -> None:
    assert (await rig.chat(max_tokens=2))["choices"][0]["finish_reason"] == "length"
    assert (await rig.chat(max_completion_tokens=2, max_tokens=2))["usage"]["completion_tokens"] == 2
    status, error = await rig.refused(PATH, max_completion_tokens=2, max_tokens=3)
    assert (status, error["param"]) == (400, "max_tokens")


async def test_the_template_takes_variables_and_can_continue_an_answer(rig: Any) -> None:
    await rig.chat(chat_template_kwargs={"shout": True})
    assert "LOUD" in prompt_text(rig)
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "Well,"}]
    await rig.chat(messages=messages, add_generation_prompt=False, continue_final_message=True)
    assert prompt_text(rig, 1).endswith("<|im_start|>assistant\nWell,")


async def test_a_template_that_refuses_is_quoted(rig: Any) -> None:
    status, error = await rig.refused(PATH, messages=[{"role": "user", "content": "!!"}])
    assert (status, error["param"]) == (400, "messages")
    assert "no such role" in error["message"]


async def test_a_template_that_does_not_end_is_given_up(
    rig: Any, tokenizer: Tokenizer, make_codec: Callable[..., TextCodec]
) -> None:
    codec = make_codec(tokenizer, "{{ messages[0].content }}")
    released = threading.Event()
    codec.render_chat = lambda *_, **__: str(released.wait(60))  # type: ignore[assignment]
    object.__setattr__(rig.context, "text", codec)
    rig.with_limits(template_timeout_s=0.01)
    status, error = await rig.refused(PATH)
    released.set()
    assert status == 400
    assert "did not end within 0.01 s" in error["message"]


async def test_a_model_without_a_template_says_where_to_go(
    rig: Any, tokenizer: Tokenizer, make_codec: Callable[..., TextCodec]
) -> None:
    object.__setattr__(rig.context, "text", make_codec(tokenizer, None))
    status, error = await rig.refused(PATH)
    assert status == 400
    assert "/v1/completions" in error["message"]


async def test_logprobs_name_tokens_with_their_bytes(rig: Any) -> None:
    rig.engine.text = "a😀"
    body = await rig.chat(logprobs=True, top_logprobs=1)
    logprobs = body["choices"][0]["logprobs"]
    assert logprobs["refusal"] is None
    tokens = logprobs["content"]
    raw = bytes(byte for token in tokens for byte in token["bytes"])
    assert raw.decode() == "a😀<|im_end|>"
    assert tokens[0] == {
        "token": "a",
        "logprob": -0.5,
        "bytes": [97],
        "top_logprobs": [{"token": "a", "logprob": -0.5, "bytes": [97]}],
    }


async def test_logprobs_without_alternatives_have_empty_lists(rig: Any) -> None:
    body = await rig.chat(logprobs=True, max_tokens=1)
    assert body["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


async def test_token_ids_and_prompt_logprobs_stand_where_vllm_has_them(rig: Any) -> None:
    body = await rig.chat(return_token_ids=True, prompt_logprobs=0, max_tokens=2)
    [submit] = rig.engine.submitted
    assert body["prompt_token_ids"] == submit.prompt_token_ids
    assert body["choices"][0]["token_ids"] == rig.engine.reply(None)[:2]
    assert body["prompt_logprobs"][0] is None
    assert len(body["prompt_logprobs"]) == len(submit.prompt_token_ids)


async def test_n_answers_are_n_choices(rig: Any) -> None:
    body = await rig.chat(n=3, max_tokens=1)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert body["usage"]["completion_tokens"] == 3


async def test_an_answer_without_a_limit_may_fill_the_context_and_holds_room_for_an_ordinary_one(
    rig: Any,
) -> None:
    rig.engine.info = msgspec.structs.replace(rig.engine.info, max_model_len=131_072)
    held: list[Any] = []
    rig.engine.reply = lambda _: held.extend(rig.gate.held) or [5]
    await rig.chat()
    await rig.chat(max_tokens=100_000)
    prompt_tokens = [len(submit.prompt_token_ids) for submit in rig.engine.submitted]
    wanted = [submit.sampling.max_tokens for submit in rig.engine.submitted]
    assert wanted == [131_072 - prompt_tokens[0], 100_000]
    assert held == [(1, prompt_tokens[0] + 1024), (1, prompt_tokens[1] + 100_000)]


async def test_no_more_room_is_held_than_there_is(rig: Any) -> None:
    held: list[Any] = []
    rig.engine.reply = lambda _: held.extend(rig.gate.held) or [5]
    await rig.chat()
    assert held == [(1, 512)]
