"""What the export functions of the sparse family write is what a server reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from timbre_client.export import sparse
from timbre_methods.contract import Site
from timbre_methods.registry import check_adapter, derive, method_for

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
GENERATOR = torch.Generator().manual_seed(2)
SITES = {
    Q: Site(Q, torch.randn(4, 6, generator=GENERATOR), torch.randn(4, generator=GENERATOR)),
    UP: Site(UP, torch.randn(8, 6, generator=GENERATOR), None),
}


def parts(folder: Path, method: str) -> dict[str, tuple[Any, ...]]:
    """The parts that a server makes of a folder, by site."""
    raw_config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    assert check_adapter(raw_config, tensors, SITES).method == method
    found = method_for(raw_config)
    completed = {**tensors, **derive(raw_config, tensors, SITES)}
    return dict(found.compile(found.parse(raw_config), completed, SITES).sites)


def test_s2ft(tmp_path: Path) -> None:
    on_input, on_output = np.arange(8.0).reshape(4, 2), np.arange(6.0).reshape(1, 6)
    folder = sparse.s2ft(
        tmp_path, inputs={Q: ([5, 0], on_input)}, outputs={Q: ([3], on_output), UP: ([7], on_output)}
    )
    found = parts(folder, "s2ft")
    first, second = found[Q]
    assert (first.side, first.index_N.tolist(), first.block.tolist()) == ("input", [5, 0], on_input.tolist())
    assert (second.side, second.index_N.tolist(), second.block.tolist()) == (
        "output",
        [3],
        on_output.tolist(),
    )
    assert len(found[UP]) == 1


def test_composable_sft(tmp_path: Path) -> None:
    folder = sparse.composable_sft(
        tmp_path, weights={Q: ([1, 4], [0.5, -1.0]), UP: ([47], [2.0])}, biases={Q: ([2], [3.0])}
    )
    found = parts(folder, "composable_sft")
    weight, bias = found[Q]
    assert (weight.row_ends.tolist(), weight.columns_N.tolist()) == ([0, 0, 2, 2, 2], [0, 1])
    assert bias.shift.tolist() == [0.0, 0.0, 3.0, 0.0]
    assert found[UP][0].row_ends.tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 1]


def test_sara(tmp_path: Path) -> None:
    weight_OI = SITES[UP].weight_OI
    count = int((weight_OI.abs() < 0.4).sum())
    (part,) = parts(sparse.sara(tmp_path, threshold=0.4, values={UP: np.zeros(count)}), "sara")[UP]
    assert sorted(part.values_N.tolist()) == sorted((-weight_OI[weight_OI.abs() < 0.4]).tolist())


def test_snell(tmp_path: Path) -> None:
    of_in, of_out = np.zeros((2, 6, 1)), np.zeros((2, 8, 1))
    of_out[0, 3, 0] = 50.0
    (part,) = parts(sparse.snell(tmp_path, threshold=0, points={UP: (of_in, of_out)}), "snell")[UP]
    assert part.delta_OI.tolist() == [[5.0 if row == 3 else 0.0] * 6 for row in range(8)]


def test_snella(tmp_path: Path) -> None:
    of_in, of_out = np.zeros((2, 6, 1)), np.zeros((2, 8, 1))
    of_out[0, 3, 0] = 50.0
    points = {UP: (of_in, of_out)}
    kernels = {UP: (0.0, 1.0, 0.5)}
    (part,) = parts(sparse.snella(tmp_path, thresholds={UP: 0}, points=points, kernels=kernels), "snella")[UP]
    assert part.delta_OI.tolist() == [[30.25 if row == 3 else 0.0] * 6 for row in range(8)]
    with pytest.raises(ValueError, match="expected the same ones in all three"):
        sparse.snella(tmp_path, thresholds={Q: 0.5}, points=points, kernels=kernels)


def test_spt(tmp_path: Path) -> None:
    pair = (np.ones((2, 6)), np.ones((4, 2)), np.arange(4.0))
    folder = sparse.spt(tmp_path, sparse={UP: ([7], [2.0]), Q: ([0], [1.0])}, low_rank={Q: pair})
    found = parts(folder, "spt")
    assert [type(part).__name__ for part in found[Q]] == ["Sparse", "LowRank", "Diagonal"]
    assert found[UP][0].columns_N.tolist() == [1]
    with pytest.raises(ValueError, match="all or none"):
        sparse.spt(tmp_path, low_rank={Q: pair, UP: (np.ones((1, 6)), np.ones((8, 1)))})


def test_an_index_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"index of 2147483648, expected at most 2147483647"):
        sparse.s2ft(tmp_path, inputs={Q: ([2**31], np.ones((4, 1)))})
