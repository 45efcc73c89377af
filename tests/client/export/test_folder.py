"""What the export functions write is what was given, in the two files that a server takes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from timbre_client.export.folder import write_folder


def test_a_folder_holds_the_options_and_the_arrays(tmp_path: Path) -> None:
    layers = {"model.layers.0.mlp.up_proj": {"values": [0.5, -1.0], "rows": np.array([3, 4], np.int32)}}
    folder = write_folder(tmp_path / "new", "SDCTFT", {"scale": 2.0}, layers)
    assert json.loads((folder / "adapter_config.json").read_text()) == {"peft_type": "SDCTFT", "scale": 2.0}
    tensors = load_file(folder / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.0.mlp.up_proj"
    assert {name: (str(t.dtype), t.tolist()) for name, t in tensors.items()} == {
        f"{stem}.values": ("float32", [0.5, -1.0]),
        f"{stem}.rows": ("int32", [3, 4]),
    }


def test_no_layer_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        write_folder(tmp_path, "SDCTFT", {}, {})
