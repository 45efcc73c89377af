"""What the export functions for bases of the weight write is what a server reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from timbre_client.export import weight_bases
from timbre_methods.contract import Site
from timbre_methods.registry import check_adapter, derive, method_for

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
GENERATOR = torch.Generator().manual_seed(2)
SITES = {
    Q: Site(Q, torch.randn(4, 3, generator=GENERATOR), torch.randn(4, generator=GENERATOR)),
    UP: Site(UP, torch.randn(5, 3, generator=GENERATOR), None),
}
NUMPY = np.random.default_rng(3)


def parts(folder: Path, method: str) -> dict[str, tuple[Any, ...]]:
    """The parts that a server makes of a folder, by site."""
    raw_config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    assert check_adapter(raw_config, tensors, SITES).method == method
    found = method_for(raw_config)
    completed = {**tensors, **derive(raw_config, tensors, SITES)}
    return dict(found.compile(found.parse(raw_config), completed, SITES).sites)


def as_tensor(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array)).float()


def test_lora_xs_and_lora_sb(tmp_path: Path) -> None:
    a, b, core = NUMPY.normal(size=(2, 3)), NUMPY.normal(size=(4, 2)), NUMPY.normal(size=(2, 2))
    folder = weight_bases.lora_xs(tmp_path / "xs", alpha=6, layers={Q: (a, b, core)})
    (part,) = parts(folder, "lora_xs")[Q]
    torch.testing.assert_close(part.core, as_tensor(3 * core))
    torch.testing.assert_close(part.basis.p_NPI[0], as_tensor(a))
    torch.testing.assert_close(part.basis.q_NOQ[0], as_tensor(b))
    folder = weight_bases.lora_sb(tmp_path / "sb", alpha=6, layers={Q: (a, b, core)}, rslora=True)
    (part,) = parts(folder, "lora_sb")[Q]
    torch.testing.assert_close(part.b_OR, as_tensor(6 / np.sqrt(2) * b @ core))
    with pytest.raises(ValueError, match=r"one rank, found \[1, 2\]"):
        weight_bases.lora_xs(tmp_path, alpha=6, layers={Q: (a, b, core), UP: (a[:1], b[:, :1], core[:1])})


def test_svfit(tmp_path: Path) -> None:
    folder = weight_bases.svfit(tmp_path, sigma={Q: [2.0, 1.0], UP: [3.0]})
    found = parts(folder, "svfit")
    sigma = torch.linalg.svdvals(SITES[Q].weight_OI)
    torch.testing.assert_close(found[Q][0].core, torch.tensor([[2.0, 1.0]]) - sigma[:2])
    assert found[UP][0].core.shape == (1, 1)


def test_svft(tmp_path: Path) -> None:
    u, v = NUMPY.normal(size=(5, 3)), NUMPY.normal(size=(3, 3))
    layers = {
        Q: weight_bases.SvftLayer(s=[2.0, 4.0, 6.0], gate=0.0),
        UP: weight_bases.SvftLayer(s=[2.0, 8.0], gate=0.0, rows=[0, 2], columns=[1, 0], u=u, v=v),
    }
    found = parts(weight_bases.svft(tmp_path, layers=layers), "svft")
    assert found[Q][0].core.tolist() == [[1.0, 2.0, 3.0]]
    (part,) = found[UP]
    assert (part.core.tolist(), part.rows_K.tolist(), part.columns_K.tolist()) == ([1.0, 4.0], [0, 2], [1, 0])
    torch.testing.assert_close(part.basis.q_NOQ[0], as_tensor(u))


def test_salt(tmp_path: Path) -> None:
    u, s, vt = np.linalg.svd(SITES[Q].weight_OI.numpy(), full_matrices=False)
    split = weight_bases.SaltLayer(u, s, vt, scale=[1.0], shift=[0.5], x=np.zeros((2, 1)), y=np.zeros((1, 2)))
    (part,) = parts(weight_bases.salt(tmp_path / "split", layers={Q: split}), "salt")[Q]
    torch.testing.assert_close(part.delta_OI, as_tensor(0.5 * np.outer(u[:, 0], vt[0])))
    whole = weight_bases.SaltLayer(u, s, vt, scale=np.ones(3), shift=np.zeros(3))
    (part,) = parts(weight_bases.salt(tmp_path / "whole", layers={Q: whole}), "salt")[Q]
    assert part.delta_OI.abs().max() < 1e-5


def test_loldu(tmp_path: Path) -> None:
    layers = {Q: weight_bases.LolduLayer(z=[1.0, 5.0], scale=2.0, start=[1.0, 1.0])}
    folder = weight_bases.loldu(tmp_path / "start", alpha=6, layers=layers, init_method="normal")
    assert parts(folder, "loldu")[Q][0].core.tolist() == [[-1.0, 7.0]]
    pivots = torch.linalg.lu(SITES[Q].weight_OI).U.diagonal()
    layers = {Q: weight_bases.LolduLayer(z=[1.0], scale=2.0)}
    (part,) = parts(weight_bases.loldu(tmp_path / "lu", alpha=6, layers=layers), "loldu")[Q]
    torch.testing.assert_close(part.core, 2 - 6 * pivots[:1].unsqueeze(0))
