"""A server whose base runs layers again, and adapters of it and of the plain base."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

RANGES = [[0, 2], [1, 2], [0, 2]]
PROMPT_IDS = [7, 80, 3, 200, 41, 41, 9]
NUM_TOKENS = 16


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def folders(
    base: torch.nn.Module, catalogue: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Random adapters, as PEFT saves them: one of the stack, one of each layer once."""
    folder = tmp_path_factory.mktemp("stacks")
    layouts = {"stacked": {"layer_replication": RANGES}, "plain": {}}
    return {
        name: catalogue.save_adapter(
            base,
            lambda options=options: peft.LoraConfig(r=4, target_modules=catalogue.TARGETS, **options),
            folder / name,
            0.2,
        )
        for name, options in layouts.items()
    }


def greedy(model: torch.nn.Module) -> list[int]:
    ids = list(PROMPT_IDS)
    with torch.inference_mode():
        for _ in range(NUM_TOKENS):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(PROMPT_IDS) :]


def served(server: Any, model: str) -> list[int]:
    body = {
        "model": model,
        "prompt": PROMPT_IDS,
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    with server.client() as client:
        answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["token_ids"]  # type: ignore[no-any-return]


def test_the_stack_and_an_adapter_of_it_answer_as_in_peft(
    serve: Callable[..., Any], tiny_model: Path, base: torch.nn.Module, folders: dict[str, Path]
) -> None:
    server = serve(
        *("--model", tiny_model, "--served-model-name", "tiny", "--dtype", "float32"),
        *("--kv-cache-mib", 16, "--layer-replication", json.dumps(RANGES)),
        *("--examples-dir", folders["plain"].parent),
    )
    said = server.log.read_text()
    assert "Running a stack of 5 of the model's layers" in said
    assert "Added the example adapter stacked (lora)." in said
    assert "The example adapter plain does not fit and is left out" in said
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folders["stacked"])).eval()
    with wrapped.disable_adapter():
        assert served(server, "tiny") == greedy(wrapped)
    assert served(server, "stacked") == greedy(wrapped) != served(server, "tiny")
    refused = server.upload("plain", folders["plain"])
    assert refused.status_code == 422, refused.text
    assert "started without --layer-replication" in refused.json()["error"]["message"]


def test_a_server_of_each_layer_once_refuses_it_and_says_how_to_start(
    tiny_server: Any, folders: dict[str, Path]
) -> None:
    refused = tiny_server.upload("stacked", folders["stacked"])
    assert refused.status_code == 422, refused.text
    assert "--layer-replication '[[0, 2], [1, 2], [0, 2]]'" in refused.json()["error"]["message"]
