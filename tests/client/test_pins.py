"""Pins by both clients."""

from __future__ import annotations

from pathlib import Path

import pytest

from timbre_client import AsyncTimbre, Conflict, NotFound, Pinned, Timbre


async def test_a_pin_comes_back_with_what_it_takes_and_goes_again(
    client: Timbre, url: str, adapter_folder: Path
) -> None:
    pinned = Pinned("merged", 14, 5000)
    assert client.upload_adapter("pirate", adapter_folder).pinned is None
    assert client.pin_adapter("pirate").pinned == pinned
    assert client.get_adapter("pirate@1").pinned == pinned
    async with AsyncTimbre(url) as other:
        assert (await other.unpin_adapter("pirate")).pinned is None
        assert client.get_adapter("pirate").pinned is None
        assert (await other.pin_adapter("pirate@1")).pinned == pinned
    assert client.unpin_adapter("pirate").id == "pirate@1"


def test_what_a_pin_stands_in_the_way_of_is_raised(client: Timbre, adapter_folder: Path) -> None:
    first = client.upload_adapter("first", adapter_folder)
    (adapter_folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 5}')
    client.upload_adapter("second", adapter_folder)
    client.pin_adapter("first")
    with pytest.raises(Conflict, match=first.digest) as caught:
        client.pin_adapter("second")
    assert (caught.value.code, caught.value.retryable) == ("pin_conflict", False)
    with pytest.raises(NotFound):
        client.pin_adapter("nobody")
