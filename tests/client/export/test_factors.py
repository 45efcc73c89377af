"""What the export writes is an adapter that the methods read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from timbre_client.export.factors import Gated, Rings, block_lora, increlora, sora, tlora
from timbre_methods.contract import Site
from timbre_methods.registry import check_adapter

PATH = "model.layers.0.self_attn.q_proj"
SITES = {PATH: Site(PATH, torch.empty(6, 4, device="meta"), None)}
A, B = np.ones((2, 4)), np.ones((6, 2))


def method_of(folder: Path) -> str:
    config = json.loads((folder / "adapter_config.json").read_text())
    return check_adapter(config, load_file(folder / "adapter_model.safetensors"), SITES).method


def test_each_export_is_read_by_its_method(tmp_path: Path) -> None:
    gated = {PATH: Gated(A, B, [0.5, 2.0])}
    assert method_of(sora(tmp_path / "sora", gated, r=8, lora_alpha=16)) == "sora"
    assert method_of(increlora(tmp_path / "increlora", gated, lora_alpha=16)) == "increlora"
    blocks = {PATH: (A, np.ones((3, 6, 2)))}
    assert method_of(block_lora(tmp_path / "block", blocks, r=6, lora_alpha=12)) == "block_lora"
    core = np.ones((2, 3, 3))
    rings = {PATH: Rings([np.ones((4, 4, 1, 1))], [core, np.ones((3, 3, 3))], [core, core])}
    assert method_of(tlora(tmp_path / "tlora", rings)) == "tlora"
