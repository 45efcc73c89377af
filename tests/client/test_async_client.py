"""The awaiting client does what the ordinary one does; only what differs in kind is tested again."""

from __future__ import annotations

import inspect
from contextlib import aclosing
from pathlib import Path

import pytest

from timbre_client import AsyncTimbre, ContextLengthExceeded, Progress, StreamFailed, Timbre


def test_both_clients_have_the_same_methods_and_parameters() -> None:
    def methods(of: type) -> dict[str, list[str]]:
        return {
            name: list(inspect.signature(member).parameters)
            for name, member in vars(of).items()
            if not name.startswith("_") and callable(member)
        }

    assert methods(AsyncTimbre) == methods(Timbre)


async def test_a_completion_and_a_stream_agree(url: str) -> None:
    async with AsyncTimbre(url) as client:
        whole = await client.complete("pirate", "Say hello")
        pieces = [piece.text async for piece in client.stream_completion("pirate", "Say hello")]
    assert (whole.text, "".join(pieces)) == ("Ahoy", "Ahoy \N{PARTY POPPER}")


async def test_a_stream_may_be_left_early(url: str) -> None:
    async with AsyncTimbre(url) as client:
        async with aclosing(client.stream_completion("pirate", "Say hello")) as stream:
            assert (await anext(stream)).text == "Ahoy"
        assert (await client.chat("base", [{"role": "user", "content": "Hello"}])).text == "Arr"


async def test_errors_are_the_same(url: str) -> None:
    async with AsyncTimbre(url) as client:
        with pytest.raises(ContextLengthExceeded):
            await client.complete("pirate", "too long")
        with pytest.raises(StreamFailed):
            [piece async for piece in client.stream_completion("pirate", "break")]


@pytest.mark.parametrize("by_digest", [False, True])
async def test_an_uploaded_adapter_is_there(url: str, adapter_folder: Path, by_digest: bool) -> None:
    told: list[Progress] = []
    async with AsyncTimbre(url) as client:
        adapter = await client.upload_adapter(
            "pirate", adapter_folder, by_digest=by_digest, on_progress=told.append
        )
        page = await client.list_adapters()
    assert page.items == (adapter,)
    assert told[-1].sent_bytes == told[-1].total_bytes == adapter.stored_bytes
