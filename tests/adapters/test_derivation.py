"""Derived tensors are written off the loop, and what goes wrong comes back as a reason."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidTensors
from timbre_methods.low_rank.lora import Lora
from timbre_server.adapters.derivation import MAX_OPEN, Derivation, Derivations

SITES = {"q": Site("q", torch.arange(12.0).view(3, 4), None)}
CONFIG = json.dumps({"peft_type": "LORA"}).encode()


def run(folder: Path, config: bytes = CONFIG, derived_path: Path | None = None) -> tuple[Derivation, Path]:
    """One derivation, waited for by its bell."""
    tensors = folder / "tensors.safetensors"
    save_file({"given": torch.ones(2)}, tensors)
    path = derived_path or folder / "derived.safetensors"
    bell = threading.Event()
    derivations = Derivations(SITES, bell.set)
    derivations.begin(config, str(tensors), str(path))
    assert bell.wait(60)
    (ended,) = derivations.poll()
    assert derivations.poll() == ()
    assert ended.derived_path == str(path)
    return ended, path


def transposed(self: Lora, config: object, tensors: dict[str, Tensor], sites: dict[str, Site]) -> object:
    assert set(tensors) == {"given"}
    return {"derived.q.turned": sites["q"].weight_OI.T}


def test_a_derivation_writes_what_the_method_derives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lora, "derive", transposed)
    ended, path = run(tmp_path)
    assert ended.code is None
    (turned,) = load_file(path).values()
    assert torch.equal(turned, SITES["q"].weight_OI.T)


def test_an_adapter_that_does_not_fit_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> dict[str, Tensor]:
        raise InvalidTensors("cluster 3 has 2 rows, expected 5")

    monkeypatch.setattr(Lora, "derive", refuse)
    ended, path = run(tmp_path)
    assert (ended.code, ended.reason) == ("invalid_adapter", "cluster 3 has 2 rows, expected 5")
    assert not path.exists()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_comes_to_no_number_is_the_adapters_fault_and_is_not_written(
    value: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    derived = {
        "derived.q.places": torch.ones(2, dtype=torch.int32),
        "derived.q.core": torch.tensor([1, value]),
    }
    monkeypatch.setattr(Lora, "derive", lambda *_: derived)
    ended, path = run(tmp_path)
    expected = "what the adapter's values give at q, core, comes to more than float32 holds"
    assert (ended.code, ended.reason.partition(";")[0]) == ("invalid_adapter", expected)
    assert not path.exists()


def test_a_fault_is_told_and_ends_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lora, "derive", lambda *_: 1 / 0)
    ended, _ = run(tmp_path)
    assert ended.code == "failed"
    assert "ZeroDivisionError" in ended.reason


def test_a_place_that_cannot_be_written_is_told_without_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Lora, "derive", transposed)
    ended, _ = run(tmp_path, derived_path=tmp_path / "no" / "folder")
    assert (ended.code, str(tmp_path) in ended.reason) == ("failed", False)


def test_a_full_disk_is_no_fault_of_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lora, "derive", transposed)
    full = tmp_path / "full"
    full.symlink_to("/dev/full")
    ended, _ = run(tmp_path, derived_path=full)
    assert ended.code == "disk_full"
    assert "No space left" in ended.reason


def test_more_than_a_few_at_once_are_sent_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()

    def wait(*_: object) -> dict[str, Tensor]:
        assert gate.wait(60)
        return {}

    monkeypatch.setattr(Lora, "derive", wait)
    save_file({"given": torch.ones(2)}, tmp_path / "tensors")
    derivations = Derivations(SITES)
    for number in range(MAX_OPEN + 1):
        derivations.begin(CONFIG, str(tmp_path / "tensors"), str(number))
    (sent_away,) = derivations.poll()
    assert (sent_away.derived_path, sent_away.code) == (str(MAX_OPEN), "busy")
    gate.set()
    ended: list[Derivation] = []
    while len(ended) < MAX_OPEN:
        ended += derivations.poll()
    assert {each.code for each in ended} == {None}
