"""What is exported is read back by the methods, and refused where it does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from timbre_client.export.spectral import Coefficients, Located, loca, sdctft, wara
from timbre_methods.contract import Site
from timbre_methods.errors import InvalidTensors
from timbre_methods.registry import Inspection, check_adapter

Read = Callable[[Path], tuple[Inspection, dict[str, Tensor]]]

PATH = "model.layers.0.mlp.up_proj"


@pytest.fixture
def read_back() -> Read:
    """Reads a folder for a base with one layer of 6 x 4."""

    def read(folder: Path) -> tuple[Inspection, dict[str, Tensor]]:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        sites = {PATH: Site(PATH, torch.empty(6, 4, device="meta"), None)}
        return check_adapter(config, tensors, sites), tensors

    return read


def test_sdctft_is_read_back(tmp_path: Path, read_back: Read) -> None:
    layer = Coefficients([0.5, -1.0, 2.0], [0, 5, 5], np.array([3, 1, 0]))
    folder = sdctft(tmp_path, {PATH: layer}, scale=3.0, transform="dct2-raw")
    inspection, tensors = read_back(folder)
    assert (inspection.method, inspection.sites) == ("sdctft", (PATH,))
    assert tensors[f"base_model.model.{PATH}.sdctft_indices"].tolist() == [[0, 5, 5], [3, 1, 0]]
    outside = Coefficients([1.0], [1], [4])
    with pytest.raises(InvalidTensors, match="found the column 4, expected 0 to 3"):
        read_back(sdctft(tmp_path, {PATH: outside}, scale=1.0))
    transposed = sdctft(tmp_path, {PATH: outside}, scale=1.0, transform="hartley", transpose=True)
    assert read_back(transposed)[0].method == "sdctft"


def test_places_of_sdctft_are_whole_numbers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="whole numbers, found float64"):
        sdctft(tmp_path, {PATH: Coefficients([1.0], [1.5], [2])}, scale=1.0)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_loca_keeps_the_type_of_its_locations(tmp_path: Path, dtype: type, read_back: Read) -> None:
    layer = Located([1.0, 2.0], np.array([[0.1, 0.9], [0.0, 0.5]], dtype))
    inspection, tensors = read_back(loca(tmp_path, {PATH: layer}, scale=1.0))
    assert inspection.method == "loca"
    assert tensors[f"base_model.model.{PATH}.spectrum_indices"].numpy().dtype == dtype


def test_wara_is_read_back(tmp_path: Path, read_back: Read) -> None:
    folder = wara(tmp_path, {PATH: (np.ones((2, 2)), np.ones((3, 2)))}, rank=2, scale=0.5)
    inspection, _ = read_back(folder)
    assert (inspection.method, inspection.parameters) == ("wara", 10)
