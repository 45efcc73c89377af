"""Where models come from, and what they are called."""

from __future__ import annotations

from pathlib import Path

import pytest

from timbre_server.engine import embedded_model
from timbre_server.model_source import base_names, model_folder


def test_a_gguf_file_is_served_from_its_converted_folder_under_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted: list[Path] = []
    monkeypatch.setattr(embedded_model, "_convert", lambda gguf, out, say: converted.append(gguf))
    gguf = tmp_path / "Small-1B.Q4.gguf"
    gguf.write_bytes(b"weights")

    folder = model_folder(str(gguf), tmp_path / "cache", lambda text: None)

    assert converted == [gguf]
    assert Path(folder).parent == tmp_path / "cache"
    assert base_names(str(gguf), folder, None) == ("Small-1B.Q4",)


def test_a_folder_is_served_as_it_is_and_anything_else_is_a_hub_id(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    assert model_folder(str(tmp_path / "mine"), tmp_path, print) == str(tmp_path / "mine")
    assert base_names(str(tmp_path / "mine"), "x", None) == ("mine",)
    for model in ("org/name", str(tmp_path / "missing.gguf")):
        assert model_folder(model, tmp_path, print) == model
    assert base_names("org/name", "org/name", None) == ("org/name",)


def test_a_chosen_name_is_the_only_one(tmp_path: Path) -> None:
    assert base_names(str(tmp_path), "x", "house-model") == ("house-model",)
