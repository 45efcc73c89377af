"""What the export functions write is what a server reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from timbre_client.export import multiplicative
from timbre_methods.contract import Site
from timbre_methods.errors import InvalidTensors
from timbre_methods.registry import check_adapter, method_for

PATH = "model.layers.0.mlp.down_proj"


@pytest.fixture
def base() -> Site:
    generator = torch.Generator().manual_seed(1)
    return Site(PATH, torch.randn(4, 6, generator=generator), torch.randn(4, generator=generator))


@pytest.fixture
def served(base: Site) -> Callable[[Path, Tensor], Tensor]:
    """The output of the one layer as the method of the folder has it, after the server's checks."""

    def read(folder: Path, x_TI: Tensor) -> Tensor:
        raw_config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        check_adapter(raw_config, tensors, {PATH: base})
        method = method_for(raw_config)
        return method.reference(method.parse(raw_config), tensors, base, x_TI)

    return read


X = torch.tensor([[1.0, -2, 3, 0.5, 0, 4], [0, 1, 0, 0, -1, 0]])


def base_output(base: Site) -> Tensor:
    assert base.bias_O is not None
    return X @ base.weight_OI.T + base.bias_O


def test_ether(tmp_path: Path, base: Site, served: Callable[[Path, Tensor], Tensor]) -> None:
    folder = multiplicative.ether(
        tmp_path, {PATH: {"out_u": np.eye(4)[:1] * 3}}, plus=False, side="output", input_reading="every_chunk"
    )
    flipped = X @ base.weight_OI.T * torch.tensor([-1.0, 1, 1, 1]) + base.bias_O
    torch.testing.assert_close(served(folder, X), flipped)


def test_ether_without_its_second_vector(tmp_path: Path, served: Callable[[Path, Tensor], Tensor]) -> None:
    folder = multiplicative.ether(
        tmp_path, {PATH: {"in_u": np.ones((2, 3))}}, plus=True, side="input", input_reading="block_diagonal"
    )
    with pytest.raises(InvalidTensors, match="ether_in_v is missing"):
        served(folder, X)


def test_ssf(tmp_path: Path, base: Site, served: Callable[[Path, Tensor], Tensor]) -> None:
    folder = multiplicative.ssf(tmp_path, {PATH: ([2, 3, 4, 5.0], np.array([0, 0, 0, 1.0]))})
    expected = base_output(base) * torch.tensor([2.0, 3, 4, 5]) + torch.tensor([0.0, 0, 0, 1])
    torch.testing.assert_close(served(folder, X), expected)


def test_propulsion(tmp_path: Path, base: Site, served: Callable[[Path, Tensor], Tensor]) -> None:
    folder = multiplicative.propulsion(tmp_path, {PATH: np.array([1, 2, -1, 0.5])}, degree=3)
    expected = base_output(base) * torch.tensor([1, 8, -1, 0.125])
    torch.testing.assert_close(served(folder, X), expected)


@pytest.mark.parametrize("with_biases", [False, True])
def test_hydra(
    tmp_path: Path, base: Site, served: Callable[[Path, Tensor], Tensor], with_biases: bool
) -> None:
    sides = ("parallel", "sequential")
    arrays: dict[str, Any] = {"parallel_A": np.ones((1, 6)), "sequential_A": np.ones((1, 4))}
    arrays |= {f"{side}_B": np.ones((4, 1)) for side in sides}
    if with_biases:
        arrays |= {f"{side}_A_bias": np.ones(1) for side in sides}
        arrays |= {f"{side}_B_bias": np.ones(4) for side in sides}
    folder = multiplicative.hydra(tmp_path, {PATH: arrays}, scale=0.5, branch_biases=with_biases)
    y0_TO = base_output(base)
    constant = 2.0 if with_biases else 0.0
    added_T1 = 0.5 * (X.sum(1, keepdim=True) + y0_TO.sum(1, keepdim=True) + 2 * constant)
    torch.testing.assert_close(served(folder, X), y0_TO + added_T1)
