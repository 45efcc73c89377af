"""The ordinary client against a server on a socket."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from timbre_client import (
    AdapterRefused,
    AdapterStamp,
    BrokenAnswer,
    ConnectionFailed,
    ContextLengthExceeded,
    InvalidRequest,
    NotFound,
    Overloaded,
    Progress,
    StreamFailed,
    Timbre,
    Usage,
)


def test_a_completion_says_what_was_made_by_whom(client: Timbre) -> None:
    answer = client.complete("pirate", "Say hello")
    assert (answer.text, answer.choices[0].finish_reason) == ("Ahoy", "length")
    assert answer.adapter == AdapterStamp("pirate", 2, "sha256:" + "1" * 64)
    assert answer.usage == Usage(prompt_tokens=3, completion_tokens=2, total_tokens=5, cached_tokens=1)


def test_options_and_the_key_reach_the_server(url: str, seen: list[dict[str, Any]]) -> None:
    with Timbre(url, api_key="timbre-secret") as client:
        client.complete("pirate", [1, 2, 3], max_tokens=4, top_k=5, seed=6)
    assert seen == [
        {
            "authorization": "Bearer timbre-secret",
            "model": "pirate",
            "prompt": [1, 2, 3],
            "max_tokens": 4,
            "top_k": 5,
            "seed": 6,
        }
    ]


def test_a_mix_goes_out_and_comes_back_with_its_weights(client: Timbre, seen: list[dict[str, Any]]) -> None:
    answer = client.complete(None, "Say hello", mix={"pirate": 0.7, "json@2": -0.3}, max_tokens=4)
    adapters = [{"name": "pirate", "weight": 0.7}, {"name": "json@2", "weight": -0.3}]
    assert (seen[0]["model"], seen[0]["adapters"], "mix" in seen[0]) == (None, adapters, False)
    assert answer.adapter is None
    assert [(stamp.name, stamp.version, stamp.weight) for stamp in answer.mix] == [
        ("pirate", 2, 0.7),
        ("json@2", 2, -0.3),
    ]
    client.chat("base", [{"role": "user", "content": "Hello"}], mix={"pirate": 1})
    assert seen[1]["adapters"] == [{"name": "pirate", "weight": 1}]
    pieces = list(client.stream_completion(None, "Say hello", mix={"pirate": 0.5}))
    assert seen[2]["adapters"] == [{"name": "pirate", "weight": 0.5}]
    assert pieces[0].adapter == AdapterStamp("pirate", 2, "sha256:" + "1" * 64)


def test_a_chat_by_the_base_model_has_no_adapter(client: Timbre) -> None:
    answer = client.chat("base", [{"role": "user", "content": "Who are you?"}])
    assert (answer.text, answer.adapter) == ("Arr", None)


def test_a_stream_gives_pieces_and_then_the_usage(client: Timbre) -> None:
    pieces = list(client.stream_completion("pirate", "Say hello"))
    assert [piece.text for piece in pieces] == ["Ahoy", " \N{PARTY POPPER}", ""]
    assert [piece.finish_reason for piece in pieces] == [None, "stop", None]
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.total_tokens == 5


def test_a_chat_stream_joins_to_the_text(client: Timbre) -> None:
    pieces = client.stream_chat("pirate", [{"role": "user", "content": "Hello"}])
    assert "".join(piece.content for piece in pieces) == "Arr"


def test_a_stream_that_the_server_ends_with_an_error_raises_it(client: Timbre) -> None:
    stream = client.stream_completion("pirate", "fail")
    assert next(stream).text == "Ahoy"
    with pytest.raises(StreamFailed, match="the engine died") as caught:
        next(stream)
    assert caught.value.code == "engine_died"


def test_a_stream_without_its_end_mark_is_not_taken_for_whole(client: Timbre) -> None:
    with pytest.raises(StreamFailed, match="not whole"):
        list(client.stream_completion("pirate", "break"))


def test_a_stream_that_is_refused_raises_before_its_first_piece(client: Timbre) -> None:
    with pytest.raises(ContextLengthExceeded):
        next(client.stream_completion("pirate", "too long"))


def test_the_narrowest_error_carries_the_server_s_words(client: Timbre) -> None:
    with pytest.raises(ContextLengthExceeded, match="the model reads 8") as caught:
        client.complete("pirate", "too long")
    assert isinstance(caught.value, InvalidRequest)
    assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")


def test_a_full_server_says_when_to_come_back(client: Timbre) -> None:
    with pytest.raises(Overloaded) as caught:
        client.complete("pirate", "full")
    assert caught.value.retryable
    assert caught.value.retry_after_s is not None


def test_an_answer_of_another_server_is_called_what_it_is(client: Timbre) -> None:
    with pytest.raises(BrokenAnswer, match="<html>"):
        client.complete("pirate", "nonsense")


def test_a_server_that_is_not_there_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with Timbre(f"http://127.0.0.1:{port}") as client, pytest.raises(ConnectionFailed, match=str(port)):
        client.list_adapters()


@pytest.mark.parametrize("by_digest", [False, True])
def test_an_uploaded_adapter_is_there(client: Timbre, adapter_folder: Path, by_digest: bool) -> None:
    told: list[Progress] = []
    adapter = client.upload_adapter("pirate", adapter_folder, by_digest=by_digest, on_progress=told.append)
    size = sum(path.stat().st_size for path in adapter_folder.iterdir())
    assert (adapter.id, adapter.method, adapter.stored_bytes) == ("pirate@1", "lora", size)
    assert told[-1] == Progress(size, size)
    assert len(told) > 3
    found = client.get_adapter("pirate")
    assert (found.digest, [item.version for item in found.versions]) == (adapter.digest, [1])


def test_both_ways_of_uploading_give_the_same_adapter(client: Timbre, adapter_folder: Path) -> None:
    by_form = client.upload_adapter("form", adapter_folder, by_digest=False)
    by_digest = client.upload_adapter("digest", adapter_folder, by_digest=True)
    assert by_form.digest == by_digest.digest


def test_a_file_that_the_server_has_is_not_sent_again(
    client: Timbre, adapter_folder: Path, seen: list[dict[str, Any]]
) -> None:
    client.upload_adapter("pirate", adapter_folder, by_digest=True)
    first = [entry["method"] for entry in seen]
    seen.clear()
    told: list[Progress] = []
    client.upload_adapter("again", adapter_folder, by_digest=True, on_progress=told.append)
    assert first == ["HEAD", "PUT", "HEAD", "PUT"]
    assert [entry["method"] for entry in seen] == ["HEAD", "HEAD"]
    assert told[-1].sent_bytes == told[-1].total_bytes


def test_an_adapter_that_is_refused_says_why(client: Timbre, adapter_folder: Path) -> None:
    (adapter_folder / "adapter_config.json").write_text('{"peft_type": "MAGIC"}')
    with pytest.raises(AdapterRefused, match="expected LORA"):
        client.upload_adapter("pirate", adapter_folder)
    assert client.list_adapters().items == ()


def test_a_folder_without_tensors_is_found_before_anything_is_sent(client: Timbre, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors"):
        client.upload_adapter("pirate", tmp_path)


def test_pages_lead_to_every_adapter(client: Timbre, adapter_folder: Path) -> None:
    for name in ("a", "b", "c"):
        client.upload_adapter(name, adapter_folder)
    first = client.list_adapters(limit=2)
    second = client.list_adapters(limit=2, after=first.next_after)
    assert [adapter.name for adapter in (*first.items, *second.items)] == ["a", "b", "c"]
    assert second.next_after is None


def test_an_alias_follows_its_target(client: Timbre, adapter_folder: Path) -> None:
    adapter = client.upload_adapter("pirate", adapter_folder)
    client.set_alias("captain", "pirate")
    found = client.get_adapter("captain")
    assert (found.digest, [item.alias for item in found.aliases]) == (adapter.digest, ["captain"])


def test_a_deleted_adapter_is_gone(client: Timbre, adapter_folder: Path, seen: list[dict[str, Any]]) -> None:
    adapter = client.upload_adapter("pirate", adapter_folder)
    client.delete_adapter("pirate", wait=True)
    assert {"unloaded": adapter.digest} in seen
    with pytest.raises(NotFound):
        client.get_adapter("pirate")


def test_models_name_their_base(client: Timbre) -> None:
    page = client.list_models(limit=2)
    assert [(model.id, model.parent) for model in page.items] == [("base", None), ("pirate", "base")]
    assert page.next_after == "pirate"


def test_a_name_that_looks_like_a_path_stays_a_name(client: Timbre) -> None:
    with pytest.raises((NotFound, InvalidRequest)):
        client.get_adapter("../../readyz")
