"""The official ``openai`` client, unchanged but for its address, against a live server."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import uvicorn

from timbre_server.engine.messages import TokenEvent

READ_TIMEOUT_S = 60.0


@pytest.fixture
def served(rig: Any) -> Iterator[Any]:
    """The rig behind uvicorn on a free port, with the client in ``rig.openai``."""
    rig.shelf.add("pirate", 3)
    server = uvicorn.Server(
        uvicorn.Config(rig.app, port=0, http="h11", ws="none", log_config=None, lifespan="off")
    )
    started = threading.Event()
    original = server.startup

    async def startup(*args: Any, **kwargs: Any) -> None:
        await original(*args, **kwargs)
        started.set()

    server.startup = startup  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert started.wait(READ_TIMEOUT_S)
    port = server.servers[0].sockets[0].getsockname()[1]
    rig.openai = openai.OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=READ_TIMEOUT_S, max_retries=0
    )
    yield rig
    rig.openai.close()
    server.should_exit = True
    thread.join(READ_TIMEOUT_S)
    assert not thread.is_alive()


def test_the_openai_client_works_unchanged(served: Any) -> None:
    client: openai.OpenAI = served.openai
    assert [model.id for model in client.models.list()] == ["tiny-base", "org/tiny-base", "pirate"]
    assert client.models.retrieve("pirate").id == "pirate"

    completion = client.completions.create(
        model="pirate", prompt="hi", max_tokens=100, logprobs=1, n=2, seed=1, stop=["!"]
    )
    assert [choice.text for choice in completion.choices] == ["hello wörld 😀"] * 2
    assert completion.choices[0].logprobs is not None
    assert completion.usage is not None
    assert completion.usage.prompt_tokens_details is not None
    assert completion.model_extra is not None
    assert completion.model_extra["adapter"]["version"] == 3

    chat = client.chat.completions.create(
        model="pirate", messages=[{"role": "user", "content": "hi"}], logprobs=True, top_logprobs=2
    )
    assert chat.choices[0].message.content == "hello wörld 😀!"
    assert chat.choices[0].logprobs is not None
    assert chat.choices[0].logprobs.content is not None
    assert len(chat.choices[0].logprobs.content[0].top_logprobs) == 2


def test_its_streams_work_unchanged(served: Any) -> None:
    client: openai.OpenAI = served.openai
    chunks = list(
        client.chat.completions.create(
            model="pirate",
            messages=[{"role": "user", "content": "hi"}],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "hello wörld 😀!"
    assert chunks[-1].usage is not None
    assert chunks[-2].choices[0].finish_reason == "stop"

    with client.completions.with_streaming_response.create(
        model="tiny-base", prompt="hi", stream=True, max_tokens=4
    ) as response:
        assert b"".join(response.iter_bytes()).endswith(b"data: [DONE]\n\n")


def test_its_errors_are_raised_by_their_kind(served: Any) -> None:
    client: openai.OpenAI = served.openai
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="parrot", prompt="hi")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model="pirate", prompt="hi", temperature=3)
    assert wrong.value.param == "temperature"
    served.gate.is_full = True
    with pytest.raises(openai.InternalServerError):
        client.completions.create(model="pirate", prompt="hi")


def test_an_error_in_a_stream_is_raised_by_the_client(served: Any) -> None:
    served.engine.failure = TokenEvent("", finish_reason="error", error_message="it broke")
    stream = served.openai.completions.create(model="pirate", prompt="hi", stream=True)
    with pytest.raises(openai.APIError, match="it broke"):
        list(stream)


def test_a_client_that_closes_its_stream_frees_the_engine(served: Any) -> None:
    served.engine.gate = asyncio.Event()
    stream = served.openai.completions.create(model="pirate", prompt="hi", stream=True)
    assert next(iter(stream)).choices[0].text == "hell"
    stream.close()
    while not served.records:
        time.sleep(0.01)
    assert served.records[0].finish_reason == "abort"
    assert served.engine.aborted == [served.engine.submitted[0].request_id]
