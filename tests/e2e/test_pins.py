"""An adapter pinned on a real server: through HTTP, the engine's process and back."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from torch import nn

from timbre_client import InvalidRequest, Timbre


@pytest.fixture(scope="module")
def uploaded(
    base: nn.Module, tiny_server: Any, catalogue: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """``popular``, a LoRA, and ``gained``, an (IA)³."""
    folder = tmp_path_factory.mktemp("pins")
    lora = peft.LoraConfig(r=4, target_modules=catalogue.TARGETS)
    gain = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    for seed, (name, config) in enumerate({"popular": lora, "gained": gain}.items()):
        adapter = catalogue.save_adapter(base, lambda config=config: config, folder / name, 0.2, seed)
        assert tiny_server.upload(name, adapter).status_code == 201


def gauge(server: Any, name: str) -> float | None:
    with server.client() as client:
        lines = client.get("/metrics").text.splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(name)), None)


def test_a_pin_serves_the_same_answers_until_its_adapter_is_deleted(
    tiny_server: Any, uploaded: None, prompt_ids: list[int]
) -> None:
    before = {name: tiny_server.prompt_logprobs(prompt_ids, model=name) for name in ("popular", "tiny")}
    with Timbre(tiny_server.url) as client:
        with pytest.raises(InvalidRequest, match="Diagonal part") as caught:
            client.pin_adapter("gained")
        assert caught.value.code == "pin_not_served"

        pinned = client.pin_adapter("popular").pinned
        assert pinned is not None
        assert pinned.sites == gauge(tiny_server, 'timbre_pinned_sites{adapter="popular"}')
        assert pinned.bytes == gauge(tiny_server, "timbre_pinned_bytes ")
        torch.testing.assert_close(
            tiny_server.prompt_logprobs(prompt_ids, model="popular"), before["popular"], atol=1e-4, rtol=1e-4
        )
        assert torch.equal(tiny_server.prompt_logprobs(prompt_ids, model="tiny"), before["tiny"])

        client.delete_adapter("popular", wait=True)
        assert gauge(tiny_server, "timbre_pinned_bytes ") == 0
        assert gauge(tiny_server, "timbre_pinned_sites{") is None
