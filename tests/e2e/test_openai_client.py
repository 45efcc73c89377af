"""The official OpenAI client, unchanged, against a real server with a real model."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from openai import OpenAI

PROMPT = "Once upon a time"


@pytest.fixture
def client(tiny_server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{tiny_server.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def test_models_are_listed_and_retrieved(client: OpenAI) -> None:
    assert [model.id for model in client.models.list() if model.id == "tiny"] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"


def test_a_completion_has_text_usage_and_a_reason(client: OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8, temperature=0)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(PROMPT)
    assert answer.usage.completion_tokens <= 8
    assert answer.choices[0].finish_reason in ("length", "stop")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stream_says_what_the_whole_answer_says(client: OpenAI, temperature: float) -> None:
    fields = {"model": "tiny", "prompt": PROMPT, "max_tokens": 24, "temperature": temperature, "seed": 5}
    whole = client.completions.create(**fields)
    chunks = list(client.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage or chunks[-1].usage.total_tokens == whole.usage.total_tokens


def test_chat_uses_the_models_own_template(client: OpenAI) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    chat = client.chat.completions.create(model="tiny", messages=messages, max_tokens=6, temperature=0)
    plain = client.completions.create(
        model="tiny", prompt="<user>Hello\n<assistant>", max_tokens=6, temperature=0
    )
    assert chat.choices[0].message.role == "assistant"
    assert chat.choices[0].message.content == plain.choices[0].text
    assert chat.usage.prompt_tokens == plain.usage.prompt_tokens


def test_a_chat_stream_begins_with_the_role_and_ends_with_the_reason(client: OpenAI) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    chunks = list(client.chat.completions.create(model="tiny", messages=messages, max_tokens=6, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason in ("length", "stop")
    assert all(chunk.choices[0].finish_reason is None for chunk in chunks[:-1])


def test_several_choices_differ_and_a_seed_repeats_them(client: OpenAI) -> None:
    fields = {"model": "tiny", "prompt": PROMPT, "max_tokens": 16, "n": 4, "seed": 7, "temperature": 1.2}
    first, second = client.completions.create(**fields), client.completions.create(**fields)
    texts = [choice.text for choice in first.choices]
    assert len(set(texts)) == 4
    assert texts == [choice.text for choice in second.choices]


def test_log_probabilities_are_sorted_and_include_the_chosen_token(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Hello"}],
        max_tokens=5,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    for entry in answer.choices[0].logprobs.content:
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert entry.logprob == pytest.approx(values[0])


def test_the_stop_string_ends_the_text_and_is_not_in_it(client: OpenAI) -> None:
    fields = {"model": "tiny", "prompt": PROMPT, "max_tokens": 32, "temperature": 0}
    free = client.completions.create(**fields).choices[0].text
    stop = free[5:7]
    cut = client.completions.create(**fields, stop=[stop]).choices[0]
    assert cut.text == free[: free.index(stop)]
    assert cut.finish_reason == "stop"


def test_an_unknown_model_is_the_clients_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="nobody", prompt=PROMPT)
    assert caught.value.code == "model_not_found"
    assert "nobody" in caught.value.message


def test_a_prompt_longer_than_the_context_is_refused_with_both_figures(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="x" * 300)
    assert caught.value.code == "context_length_exceeded"
    assert "300" in caught.value.message
    assert "256" in caught.value.message
