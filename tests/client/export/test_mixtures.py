"""What the export writes is an adapter that the methods read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from timbre_client.export.mixtures import (
    RankMixture,
    arrow,
    lora_mixer,
    molora,
    moram,
    mov,
    phatgoose,
    smora,
)
from timbre_methods.contract import Site
from timbre_methods.registry import check_adapter

ATTENTION = "model.layers.0.self_attn"
PATH = f"{ATTENTION}.q_proj"
STEM = f"base_model.model.{PATH}."
SITES = {PATH: Site(PATH, torch.empty(6, 4, device="meta"), None)}
EXPERTS = [(np.ones((2, 4)), np.ones((6, 2))), (np.ones((2, 4)), np.ones((6, 2)))]


def read(folder: Path) -> tuple[str, dict[str, torch.Tensor]]:
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    return check_adapter(config, tensors, SITES).method, tensors


@pytest.mark.parametrize("balance_bias", [None, [1.0, 2.0, 3.0]])
def test_smora_is_read_by_its_method(tmp_path: Path, balance_bias: list[float] | None) -> None:
    layer = RankMixture(np.ones((3, 4)), np.ones((6, 3)), np.ones((3, 4)), balance_bias)
    method, tensors = read(smora(tmp_path, {PATH: layer}, top_k=2, gate="one", scale=0.5))
    assert method == "smora"
    assert (STEM + "router.balance_bias" in tensors) == (balance_bias is not None)


def test_moram_is_read_by_its_method(tmp_path: Path) -> None:
    layers = {PATH: (np.ones((3, 4)), np.ones((6, 3)))}
    assert read(moram(tmp_path, layers, tau=0.03, k=2, delta=0.2))[0] == "moram"


def test_molora_is_read_by_its_method_and_turned_from_t5x(tmp_path: Path) -> None:
    a, b, kernel = np.arange(24.0).reshape(3, 4, 2), np.ones((3, 2, 6)), np.arange(12.0).reshape(4, 3)
    method, tensors = read(molora(tmp_path, {PATH: (a, b, kernel)}, lora_alpha=16, top_k=2))
    assert method == "molora"
    assert tensors[STEM + "molora_A"][1, :, 0].tolist() == [8.0, 9.0]
    assert tensors[STEM + "molora_B"].shape == (3, 6, 2)
    assert tensors[STEM + "molora_router"][0].tolist() == [0.0, 3.0, 6.0, 9.0]


def test_mov_is_read_by_its_method_and_turned_from_t5x(tmp_path: Path) -> None:
    method, tensors = read(mov(tmp_path, {PATH: (np.ones((3, 6)), np.arange(12.0).reshape(4, 3))}))
    assert method == "mov"
    assert tensors[STEM + "mov_router"][0].tolist() == [0.0, 3.0, 6.0, 9.0]


def test_phatgoose_is_read_by_its_method(tmp_path: Path) -> None:
    assert read(phatgoose(tmp_path, {PATH: (EXPERTS, np.ones((2, 4)))}))[0] == "phatgoose"


@pytest.mark.parametrize("owner", [PATH, ATTENTION])
def test_lora_mixer_is_read_by_its_method(tmp_path: Path, owner: str) -> None:
    routers = {owner: np.ones((2, 4))}
    options: dict[str, Any] = {"scales": [1, 2], "top_k": 1, "renormalised": False}
    for biases in (None, {owner: np.ones(2)}):
        method, tensors = read(lora_mixer(tmp_path, {PATH: EXPERTS}, routers, biases=biases, **options))
        assert method == "lora_mixer"
        assert f"base_model.model.{owner}.router.weight" in tensors
        assert (f"base_model.model.{owner}.router.bias" in tensors) == (biases is not None)


@pytest.mark.parametrize("peft_seed", [None, 7])
def test_arrow_is_read_by_its_method(tmp_path: Path, peft_seed: int | None) -> None:
    general = {PATH: EXPERTS[:1]}
    folder = arrow(tmp_path, {PATH: EXPERTS}, general, scales=[1, 0.5], top_k=1, peft_seed=peft_seed)
    method, tensors = read(folder)
    assert method == "arrow"
    assert len(tensors) == 6


def test_an_adapter_without_a_layer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one layer"):
        moram(tmp_path, {}, tau=1, k=2, delta=0)
    with pytest.raises(ValueError, match="at least one layer"):
        arrow(tmp_path, {}, scales=[1])
