"""Adapters as PEFT writes them, uploaded to a real server, against PEFT's own forward."""

from __future__ import annotations

import copy
import json
import random
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from torch import Tensor


@pytest.fixture
def peft_logprobs(base: torch.nn.Module, catalogue: ModuleType) -> Callable[[Path], Tensor]:
    """Of each next token of the prompt, by PEFT's own forward."""

    def logprobs(folder: Path) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
            return catalogue.logprobs_of(model)

    return logprobs


@pytest.fixture
def save_lora(base: torch.nn.Module, catalogue: ModuleType) -> Callable[..., Path]:
    """A random LoRA in a folder, as PEFT saves it."""

    def save(folder: Path, seed: int, **options: Any) -> Path:
        config = {"r": 4, "target_modules": catalogue.TARGETS, **options}
        return catalogue.save_adapter(base, lambda: peft.LoraConfig(**config), folder, 0.2, seed)

    return save


@pytest.fixture(scope="module")
def uploaded(
    base: torch.nn.Module,
    tiny_server: Any,
    catalogue: ModuleType,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """One adapter of each kind in the store, by name."""
    folder = tmp_path_factory.mktemp("adapters")
    folders = {
        name: catalogue.save_adapter(base, make, folder / name, std)
        for name, (make, std) in catalogue.ADAPTERS.items()
    }
    for name, adapter in folders.items():
        answer = tiny_server.upload(name, adapter)
        assert answer.status_code == 201, answer.text
        assert answer.json()["method"] == name.split("-")[0]
    return folders


def test_every_family_in_one_batch_with_base_rows_equals_peft(
    base: torch.nn.Module,
    tiny_server: Any,
    uploaded: dict[str, Path],
    catalogue: ModuleType,
    peft_logprobs: Callable[[Path], Tensor],
) -> None:
    names = [*uploaded, "tiny"] * 2
    random.Random(5).shuffle(names)
    with ThreadPoolExecutor(len(names)) as pool:
        served = list(
            pool.map(lambda name: tiny_server.prompt_logprobs(catalogue.PROMPT_IDS, model=name), names)
        )
    expected = {name: peft_logprobs(folder) for name, folder in uploaded.items()}
    expected["tiny"] = catalogue.logprobs_of(base)
    for name, logprobs in zip(names, served, strict=True):
        torch.testing.assert_close(logprobs, expected[name], atol=1e-4, rtol=1e-4)
        if name != "tiny":
            assert (logprobs - expected["tiny"]).abs().max() > 0.05, "the adapter must be heard"


def test_an_answer_says_which_adapter_gave_it(tiny_server: Any, uploaded: dict[str, Path]) -> None:
    with tiny_server.client() as client:
        manifest = client.get("/v1/adapters/lora").json()
        answer = client.post("/v1/completions", json={"model": "lora@1", "prompt": "Hi", "max_tokens": 1})
        by_digest = {"model": f"lora@{manifest['digest']}", "prompt": "Hi", "max_tokens": 1}
        again = client.post("/v1/completions", json=by_digest)
    stamp = {"name": "lora", "version": 1, "digest": manifest["digest"]}
    assert answer.json()["adapter"] == stamp
    assert again.json()["adapter"]["digest"] == manifest["digest"]
    assert answer.headers["x-timbre-adapter-digest"] == manifest["digest"]


def greedy(server: Any, model: str, prompt: list[int]) -> str:
    body = {"model": model, "prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    with server.client() as client:
        answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def test_a_new_version_never_meets_the_old_ones_cache(
    save_lora: Callable[..., Path], tiny_server: Any, tmp_path: Path, prompt_ids: list[int]
) -> None:
    prompt = prompt_ids * 4
    old = save_lora(tmp_path / "old", seed=2)
    new = save_lora(tmp_path / "new", seed=3)
    assert tiny_server.upload("changing", old).json()["version"] == 1
    warm = [greedy(tiny_server, "changing", prompt) for _ in range(2)]
    assert tiny_server.upload("changing", new).json()["version"] == 2
    after = greedy(tiny_server, "changing", prompt)
    assert warm[0] == warm[1] == greedy(tiny_server, "changing@1", prompt)
    assert after != warm[0]
    assert tiny_server.upload("only-new", new).status_code == 201
    assert after == greedy(tiny_server, "only-new", prompt)


def test_an_alias_moves_between_requests(
    tiny_server: Any, uploaded: dict[str, Path], prompt_ids: list[int]
) -> None:
    with tiny_server.client() as client:
        for target in ("lora", "shira"):
            answer = client.put(f"/v1/adapters/{target}/alias", json={"alias": "voice"})
            assert answer.status_code == 200, answer.text
            voice, itself = (greedy(tiny_server, name, prompt_ids) for name in ("voice", target))
            assert voice == itself


def test_a_deleted_adapter_is_gone_at_once(
    save_lora: Callable[..., Path], tiny_server: Any, tmp_path: Path, prompt_ids: list[int]
) -> None:
    folder = save_lora(tmp_path / "gone", seed=4)
    tiny_server.upload("gone", folder)
    greedy(tiny_server, "gone", prompt_ids)
    with tiny_server.client() as client:
        assert client.delete("/v1/adapters/gone").status_code in (200, 204)
        answer = client.post("/v1/completions", json={"model": "gone", "prompt": "Hi"})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"


def test_a_bad_adapter_is_refused_by_name_and_leaves_nothing(
    uploaded: dict[str, Path], tiny_server: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "bad"
    shutil.copytree(uploaded["lora"], folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["arrow_config"] = {"top_k": 2}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    answer = tiny_server.upload("bad", folder)
    assert answer.status_code == 422
    assert "arrow_config" in answer.json()["error"]["message"]
    with tiny_server.client() as client:
        assert client.get("/v1/adapters/bad").status_code == 404


@pytest.fixture(scope="module")
def cramped_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the `cramped_server` looks for adapters that it is told to load."""
    return tmp_path_factory.mktemp("cramped")


@pytest.fixture(scope="module")
def cramped_server(serve: Callable[..., Any], tiny_model: Path, cramped_folder: Path) -> Any:
    """One with one MiB for all adapters."""
    flags = ("--model", tiny_model, "--dtype", "float32", "--adapter-memory-mib", 1, "--kv-cache-mib", 16)
    return serve(*flags, "--allow-merged-pin", "--lora-path-root", cramped_folder)


def test_an_adapter_larger_than_memory_is_the_callers_to_mend_wherever_it_is_asked_for(
    save_lora: Callable[..., Path], cramped_server: Any, cramped_folder: Path
) -> None:
    """Of some 1.4 MiB in float32, which might be half of that in 16 bits: its upload was taken."""
    answer = cramped_server.upload("large", save_lora(cramped_folder / "large", seed=5, r=256))
    assert answer.status_code == 201, answer.text
    large, needed = answer.json()["digest"], answer.json()["prepared_bytes"]
    asked = {"prompt": "Hi", "max_tokens": 1}
    with cramped_server.client() as client:
        answers = [
            client.post("/v1/completions", json={**asked, "model": "large"}),
            client.post("/v1/completions", json={**asked, "adapters": [{"name": "large", "weight": 0.5}]}),
            client.post("/v1/adapters/large/pin", json={"mode": "merged"}),
            client.post("/v1/load_lora_adapter", json={"lora_name": "again", "lora_path": "large"}),
        ]
        stream = client.post("/v1/completions", json={**asked, "model": "large", "stream": True}).text
    errors = [each.json()["error"] for each in answers]
    errors.append(json.loads(stream.splitlines()[0].removeprefix("data: "))["error"])
    assert [each.status_code for each in answers] == [422] * 4
    assert (
        errors
        == [
            {
                "message": f"adapter {large} needs {needed} bytes in memory; the budget for all adapters is "
                "1048576: raise --adapter-memory-mib",
                "type": "invalid_request_error",
                "param": None,
                "code": "adapter_too_large",
            }
        ]
        * 5
    )


def test_more_adapters_than_memory_are_all_served_right(
    peft_logprobs: Callable[[Path], Tensor],
    save_lora: Callable[..., Path],
    cramped_server: Any,
    tmp_path: Path,
    prompt_ids: list[int],
) -> None:
    """Twelve adapters of some 700 KiB each, one MiB for all: one at a time is resident, none is wrong."""
    names = [f"storm-{number}" for number in range(12)]
    folders = {
        name: save_lora(tmp_path / name, seed=number, r=128, lora_alpha=8)
        for number, name in enumerate(names)
    }
    for name, folder in folders.items():
        answer = cramped_server.upload(name, folder)
        assert answer.status_code == 201, answer.text
        assert 512 << 10 < answer.json()["prepared_bytes"] <= 1 << 20
    with ThreadPoolExecutor(12) as pool:
        served = list(
            pool.map(lambda name: cramped_server.prompt_logprobs(prompt_ids, model=name), names * 2)
        )
    for name, logprobs in zip(names * 2, served, strict=True):
        torch.testing.assert_close(logprobs, peft_logprobs(folders[name]), atol=1e-3, rtol=1e-3)
