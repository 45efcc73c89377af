"""What the export functions of mixtures write is what a server reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from timbre_client.export import routed
from timbre_methods.contract import Site
from timbre_methods.registry import check_adapter, compile_adapter
from timbre_methods.routing import Routed, RoutedBlock

MLP, QUERY = "model.layers.0.mlp", "model.layers.0.self_attn.q_proj"
SITES = {
    QUERY: Site(QUERY, torch.zeros(4, 6), None),
    f"{MLP}.gate_proj": Site(f"{MLP}.gate_proj", torch.zeros(9, 6), None),
    f"{MLP}.up_proj": Site(f"{MLP}.up_proj", torch.zeros(9, 6), None),
    f"{MLP}.down_proj": Site(f"{MLP}.down_proj", torch.zeros(6, 9), None),
    MLP: Site(MLP, torch.empty(6, 6, device="meta"), None, "block"),
}


@pytest.mark.parametrize("mode", ["sparse", "dense"])
def test_llava_mole(mode: Literal["sparse", "dense"], tmp_path: Path) -> None:
    experts = [(np.full((2, 6), e + 1.0), np.ones((9, 2))) for e in range(3)]
    folder = routed.llava_mole(
        tmp_path,
        r=2,
        lora_alpha=4,
        mode=mode,
        mlps={
            MLP: routed.MoleMlp(
                weight=np.ones((3, 6)),
                bias=np.arange(3.0),
                gate=experts,
                down=[(np.ones((2, 9)), np.ones((6, 2)))] * 3,
            )
        },
        attention={QUERY: (np.ones((2, 6)), np.ones((4, 2)))},
    )
    raw_config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    assert check_adapter(raw_config, tensors, SITES).method == "llava_mole"
    program = compile_adapter(raw_config, tensors, SITES)
    assert set(program.sites) == SITES.keys() - {f"{MLP}.up_proj"}
    (block,) = program.sites[MLP]
    assert isinstance(block, RoutedBlock)
    assert block.router.rule.keep == {"sparse": "top_k", "dense": "all"}[mode]
    (gate,) = program.sites[f"{MLP}.gate_proj"]
    assert isinstance(gate, Routed)
    assert [float(part.a_RI[0, 0]) for (part,) in gate.experts] == [1.0, 2.0, 3.0]  # type: ignore[union-attr]
