"""Prompts, prefixes, attention and aLoRA as PEFT writes them, through a real server, against PEFT."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch

INVOCATION = [66, 5]
COUNT = 6
CONFIGS: dict[str, Callable[[], peft.PeftConfig]] = {
    "prompt_tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20),
    "prefix_tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=9),
    "adaption_prompt": lambda: peft.AdaptionPromptConfig(
        task_type="CAUSAL_LM", adapter_len=5, adapter_layers=1
    ),
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"]),
    "alora": lambda: peft.LoraConfig(
        r=4,
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "v_proj", "down_proj"],
        alora_invocation_tokens=INVOCATION,
    ),
}


@torch.no_grad()
def peft_text(model: torch.nn.Module, folder: Path, prompt_ids: list[int]) -> list[int]:
    """Greedy tokens. An aLoRA's place is that of the prompt, whatever is generated."""
    wrapped: Any = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()
    tokens = list(prompt_ids)
    for _ in range(COUNT):
        place = (
            {"alora_offsets": [len(tokens) - prompt_ids.index(INVOCATION[0])]}
            if folder.name == "alora"
            else {}
        )
        tokens.append(int(wrapped(torch.tensor([tokens]), **place).logits[0, -1].argmax()))
    return tokens[len(prompt_ids) :]


def served(server: Any, model: str, prompt: list[int], **fields: Any) -> dict[str, Any]:
    body = {"model": model, "prompt": prompt, "max_tokens": COUNT, "temperature": 0, "ignore_eos": True}
    with server.client() as client:
        answer = client.post("/v1/completions", json={**body, "return_token_ids": True, **fields})
    return {"status": answer.status_code, **answer.json()}


@pytest.fixture(scope="module")
def uploaded(
    base: torch.nn.Module, tiny_server: Any, catalogue: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("prompts")
    folders = {
        name: catalogue.save_adapter(base, make, folder / name, std=0.5, seed=4)
        for name, make in CONFIGS.items()
    }
    for name, adapter in folders.items():
        answer = tiny_server.upload(f"p-{name}", adapter)
        assert answer.status_code == 201, answer.text
        assert answer.json()["method"] == name
    return folders


def test_every_kind_at_once_gives_peft_s_text(
    base: torch.nn.Module, tiny_server: Any, uploaded: dict[str, Path], prompt_ids: list[int]
) -> None:
    names = list(uploaded) * 3
    with ThreadPoolExecutor(len(names)) as pool:
        answers = list(pool.map(lambda name: served(tiny_server, f"p-{name}", prompt_ids), names))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = {name: peft_text(base, folder, prompt_ids) for name, folder in uploaded.items()}
    for name, answer in zip(names, answers, strict=True):
        assert answer["choices"][0]["token_ids"] == expected[name], name
        assert answer["choices"][0]["prompt_token_ids"] == prompt_ids
        assert answer["usage"]["prompt_tokens"] == len(prompt_ids)
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] <= len(prompt_ids)
    assert len({tuple(tokens) for tokens in expected.values()}) == len(expected)


def test_manifests_say_what_a_client_must_know(tiny_server: Any, uploaded: dict[str, Path]) -> None:
    with tiny_server.client() as client:
        found = {name: client.get(f"/v1/adapters/p-{name}").json() for name in uploaded}
    assert {name: each["virtual_tokens"] for name, each in found.items() if each["virtual_tokens"]} == {
        "prompt_tuning": 20,
        "prefix_tuning": 9,
    }
    assert found["alora"]["invocation_tokens"] == INVOCATION
    assert found["lora"]["invocation_tokens"] == []


def test_what_cannot_be_answered_in_the_adapter_s_name_is_refused(
    tiny_server: Any, uploaded: dict[str, Path], prompt_ids: list[int]
) -> None:
    without = served(tiny_server, "p-alora", [1, 2, 3])
    assert (without["status"], without["error"]["param"]) == (400, "prompt")
    assert "p-alora@1" in without["error"]["message"]
    most = 256 - 20 - len(prompt_ids)
    assert served(tiny_server, "p-prompt_tuning", prompt_ids, max_tokens=most + 1)["status"] == 400
    whole = served(tiny_server, "p-prompt_tuning", prompt_ids, max_tokens=most)
    assert len(whole["choices"][0]["token_ids"]) == most
