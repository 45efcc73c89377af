"""What packs no X-LoRA writes nothing; that a packed one is what PEFT runs is shown among the methods."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from timbre_client.export.xlora import CLASSIFIER, xlora

FACTORS = ("q_proj.lora_A.weight", "q_proj.lora_B.weight")


def write(folder: Path, peft_type: str, *names: str) -> Path:
    folder.mkdir(parents=True)
    config = {"peft_type": peft_type, "adapters": {"0": "elsewhere", "1": "elsewhere"}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({name: np.ones((2, 2), np.float32) for name in names}, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A classifier with its two experts below it."""
    folder = write(tmp_path / "source", "XLORA", f"{CLASSIFIER}0.weight", f"{CLASSIFIER}0.bias")
    for number in "01":
        write(folder / number, "LORA", *FACTORS)
    return folder


def test_a_folder_is_not_packed_into_one_of_its_own(source: Path) -> None:
    before = {path: path.read_bytes() for path in source.rglob("*.*")}
    for target in (source, source / "1", source / "0" / ".."):
        with pytest.raises(ValueError, match="is one of the folders that are packed"):
            xlora(target, source)
    assert {path: path.read_bytes() for path in source.rglob("*.*")} == before


def test_nothing_is_written_before_all_is_read(source: Path, tmp_path: Path) -> None:
    target, sound = tmp_path / "packed", source / "0"
    dora = write(tmp_path / "dora", "LORA", *FACTORS, "q_proj.lora_magnitude_vector")
    torn = write(tmp_path / "torn", "LORA", *FACTORS)
    (torn / "adapter_model.safetensors").write_bytes(b"torn")
    bare = write(tmp_path / "bare", "LORA")
    (bare / "adapter_model.safetensors").unlink()
    for last, words in (
        (source, "peft_type: found 'XLORA', expected 'LORA'"),
        (dora, "expert 1: 'q_proj.lora_magnitude_vector' is no factor"),
        (torn, "4 bytes are no safetensors file"),
        (bare, "No such file"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            xlora(target, source, [sound, last])
        assert not target.exists()
    assert len(list(xlora(target, source).iterdir())) == 2
