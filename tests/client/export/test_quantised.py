"""What the export functions of the quantised family write is what a server reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from timbre_client.export import quantised
from timbre_methods.contract import Site
from timbre_methods.registry import check_adapter

PATH = "model.layers.0.self_attn.q_proj"


def test_lq_lora(tmp_path: Path) -> None:
    arrays = (np.ones((2, 6)), np.ones((4, 2)), np.ones((4, 3)), np.ones((3, 6)))
    folder = quantised.lq_lora(tmp_path, r=2, lora_alpha=4, layers={PATH: arrays})
    raw_config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found = check_adapter(raw_config, tensors, {PATH: Site(PATH, torch.zeros(4, 6), None)})
    assert (found.method, found.prepared_bytes) == ("lq_lora", 4 * 5 * (4 + 6))
