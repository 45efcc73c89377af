"""What the export writes is an adapter that the methods read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from timbre_client.export.low_rank import Combination, Factors, lorta, mos, nola
from timbre_methods.contract import Site
from timbre_methods.registry import check_adapter

PATH = "model.layers.0.self_attn.q_proj"
SITES = {PATH: Site(PATH, torch.empty(6, 4, device="meta"), None)}


def read(folder: Path) -> tuple[str, dict[str, torch.Tensor]]:
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    return check_adapter(config, tensors, SITES).method, tensors


def test_nola_is_read_by_its_method(tmp_path: Path) -> None:
    a = Combination(np.ones((2, 4)), [0.5, 0.25, 1.0], seed=7)
    b = Combination(np.zeros((6, 2)), [1.0], seed=10**10)
    folder = nola(tmp_path / "nola", {PATH: (a, b)}, r=2, lora_alpha=4, normalised=True)
    method, tensors = read(folder)
    assert method == "nola"
    assert tensors[f"base_model.model.{PATH}.lora_B.seed"].tolist() == [10**10]


def test_mos_is_read_by_its_method(tmp_path: Path) -> None:
    places = np.array([[0, 4], [1, 2], [3, 3]]), np.array([[4, 0], [2, 2], [1, 1]])
    pools = {"q_proj": (np.ones((5, 2)), np.ones((5, 3)))}
    method, tensors = read(mos(tmp_path / "mos", {PATH: places}, pools, lora_alpha=6))
    assert method == "mos"
    assert tensors[f"base_model.model.{PATH}.mos_indices_A"].dtype == torch.int32
    assert tensors["base_model.mos_pool_B.q_proj"].shape == (5, 3)


def test_lorta_is_read_by_its_method_with_its_rows_multiplied(tmp_path: Path) -> None:
    tensor = Factors(
        np.ones((6, 2)), np.ones((2, 2)), np.ones((2, 2)), [[1, 2], [3, 4]], [[5, 6], [7, 8], [9, 10]]
    )
    method, tensors = read(lorta(tmp_path / "lorta", tensor, {PATH: (1, 2)}, lora_alpha=6))
    assert method == "lorta"
    assert tensors[f"base_model.model.{PATH}.lorta_c"].tolist() == [27.0, 40.0]


def test_an_adapter_without_a_layer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        nola(tmp_path, {}, r=1, lora_alpha=1, normalised=False)
    with pytest.raises(ValueError, match="at least one layer"):
        mos(tmp_path, {}, {}, lora_alpha=1)
