"""Several adapters in one request to a real server, against the model with the dense effective weights."""

from __future__ import annotations

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

Mix = dict[str, float]
TWO_LORAS: Mix = {"mix-lora": 0.7, "mix-narrow": 0.5}
MIXES: list[Mix] = [
    {},
    TWO_LORAS,
    {"mix-lora": 1},
    {"mix-lora": 0.7, "mix-fourierft": 0.3},
    {"mix-shira": 1.5, "mix-ia3": -0.5},
    {"mix-lora": 0.6, "mix-fourierft": -0.4, "mix-shira": 1.2, "mix-ia3": 0.8},
    {"mix-ia3": 1},
    {"mix-narrow": -2},
]


class Oracle:
    """The tiny model in float64, and each adapter's weights as PEFT merges them."""

    def __init__(self, base: nn.Module, folders: dict[str, Path], catalogue: ModuleType) -> None:
        self._base = copy.deepcopy(base).double()
        self._catalogue = catalogue
        self._own = _weights(self._base)
        self._adapted = {name: self._merged(folder) for name, folder in folders.items()}

    def _merged(self, folder: Path) -> dict[str, Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(self._base), str(folder))
            return _weights(wrapped.double().merge_and_unload())

    def logprobs(self, mix: Mix, ids: list[int]) -> Tensor:
        """Of each next token, under W + Σ w (W_k - W)."""
        model = copy.deepcopy(self._base)
        for path, own in self._own.items():
            change = sum((w * (self._adapted[name][path] - own) for name, w in mix.items()), 0.0)
            model.get_submodule(path).weight.data = own + change
        logprobs: Tensor = self._catalogue.logprobs_of(model, ids)
        return logprobs


def _weights(model: nn.Module) -> dict[str, Tensor]:
    linears = ((path, each) for path, each in model.named_modules() if isinstance(each, nn.Linear))
    return {path: linear.weight.data.clone() for path, linear in linears}


def asked_for(mix: Mix) -> list[dict[str, Any]]:
    return [{"name": name, "weight": weight} for name, weight in mix.items()]


def answered(server: Any, mix: Mix, **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", **({"adapters": asked_for(mix)} if mix else {}), **fields}
    with server.client() as client:
        answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def prompt_logprobs(server: Any, mix: Mix, prompt_ids: list[int]) -> Tensor:
    logprobs: Tensor = server.prompt_logprobs(prompt_ids, model="tiny", adapters=asked_for(mix) or None)
    return logprobs


@pytest.fixture(scope="module")
def folders(
    base: nn.Module, tiny_server: Any, catalogue: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """One random adapter of each kind, in the store by its name."""
    folder = tmp_path_factory.mktemp("mixes")
    made = {
        name: catalogue.save_adapter(base, make, folder / name, std, seed)
        for seed, (name, (make, std)) in enumerate(catalogue.MIXED.items())
    }
    for name, adapter in made.items():
        answer = tiny_server.upload(name, adapter)
        assert answer.status_code == 201, answer.text
    return made


@pytest.fixture(scope="module")
def oracle(base: nn.Module, folders: dict[str, Path], catalogue: ModuleType) -> Oracle:
    return Oracle(base, folders, catalogue)


def test_every_mix_in_one_batch_with_others_has_exactly_its_effective_weights(
    tiny_server: Any, oracle: Oracle, prompt_ids: list[int]
) -> None:
    mixes = MIXES * 3
    with ThreadPoolExecutor(len(mixes)) as pool:
        served = list(pool.map(lambda mix: prompt_logprobs(tiny_server, mix, prompt_ids), mixes))
    expected = [oracle.logprobs(mix, prompt_ids) for mix in MIXES]
    for found, wanted in zip(served, expected * 3, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    for one in range(len(MIXES)):
        for other in range(one):
            assert (expected[one] - expected[other]).abs().max() > 0.02, "each mix must be heard"


def test_two_loras_mix_as_peft_concatenates_them(
    base: nn.Module, tiny_server: Any, folders: dict[str, Path], catalogue: ModuleType
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, second = TWO_LORAS
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folders[first]), adapter_name=first)
        model.load_adapter(str(folders[second]), adapter_name=second)
        model.add_weighted_adapter(
            list(TWO_LORAS), list(TWO_LORAS.values()), "together", combination_type="cat"
        )
        model.set_adapter("together")
    found = prompt_logprobs(tiny_server, TWO_LORAS, catalogue.PROMPT_IDS)
    torch.testing.assert_close(found, catalogue.logprobs_of(model), atol=1e-4, rtol=0)


def test_a_mix_never_reads_the_cache_of_the_same_adapters_with_other_weights(
    tiny_server: Any, oracle: Oracle, prompt_ids: list[int]
) -> None:
    prompt = prompt_ids * 4
    same = {"max_tokens": 4, "temperature": 0, "ignore_eos": True, "logprobs": 0, "return_token_ids": True}
    cached = []
    for mix in (
        {"mix-lora": 0.7, "mix-shira": 0.3},
        {"mix-shira": 0.3, "mix-lora": 0.7},
        {"mix-lora": 0.3, "mix-shira": 0.7},
        {"mix-lora": 0.7},
        {"mix-lora": 0.7, "mix-shira": 0},
    ):
        answer = answered(tiny_server, mix, prompt=prompt, **same)
        choice = answer["choices"][0]
        found = torch.tensor(choice["logprobs"]["token_logprobs"], dtype=torch.float64)
        expected = oracle.logprobs(mix, prompt + choice["token_ids"])[-4:]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert cached == [0, 32, 0, 0, 32]


def test_metrics_count_a_mix_for_each_of_its_adapters(
    tiny_server: Any, oracle: Oracle, prompt_ids: list[int]
) -> None:
    def counts() -> dict[str, float]:
        with tiny_server.client() as client:
            lines = client.get("/metrics").text.splitlines()
        rows = [line for line in lines if line.startswith("timbre_adapter_requests_total{")]
        return {row.split('"')[1]: float(row.rsplit(" ", 1)[1]) for row in rows}

    before = counts()
    answered(tiny_server, TWO_LORAS, prompt=prompt_ids, max_tokens=1)
    after = counts()
    assert after == before | {name: before.get(name, 0) + 1 for name in TWO_LORAS}
