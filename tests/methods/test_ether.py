"""Against literal constructions in float64: the paper's matrices, and the reshapes of the authors' code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidConfig, InvalidTensors
from timbre_methods.program import Dense, LowRank
from timbre_methods.registry import check_adapter, method_for

STEM = "base_model.model.model.layers.0.self_attn.q_proj"
RAW: dict[str, Any] = {
    "peft_type": "ETHER",
    "plus": False,
    "side": "input",
    "input_reading": "block_diagonal",
}


def reflections(u_ND: Tensor, v_ND: Tensor | None) -> Tensor:
    """[N, D, D], as the paper writes them."""
    blocks = []
    for n, u in enumerate(u_ND.double()):
        h = torch.eye(len(u), dtype=torch.float64)
        if v_ND is None:
            h = h - 2 * torch.outer(u, u) / u.dot(u)
        else:
            v = v_ND[n].double()
            h = h - torch.outer(u, u) / u.dot(u) + torch.outer(v, v) / v.dot(v)
        blocks.append(h)
    return torch.stack(blocks)


def tensors(base: Site, *keys: str, blocks: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    features = {"in": base.in_features // blocks, "out": base.out_features // blocks}
    return {
        f"{STEM}.ether_{key}": torch.randn(blocks, features[key.split("_")[0]], generator=generator)
        for key in keys
    }


def adapted(raw: dict[str, Any], given: dict[str, Tensor], base: Site, evaluate: Any) -> Tensor:
    """The adapted layer for the unit inputs and none: the changed weight [O, I], beside the bias."""
    check_adapter(raw, given, {base.path: base})
    method = method_for(raw)
    parts = method.compile(method.parse(raw), given, {base.path: base}).sites[base.path]
    x = torch.cat([torch.eye(base.in_features), torch.zeros(1, base.in_features)]).double()
    y: Tensor = evaluate.run_parts(base, parts, x)
    return torch.cat([(y[:-1] - y[-1]).T, y[-1:].T], dim=1)


def expected(weight_OI: Tensor, base: Site) -> Tensor:
    assert base.bias_O is not None
    return torch.cat([weight_OI, base.bias_O.double()[:, None]], dim=1)


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_the_paper_reading_of_both_sides(
    site: Callable[..., Site], evaluate: Any, plus: bool, blocks: int
) -> None:
    base = site(out_features=12, in_features=8, bias=True)
    letters = "uv" if plus else "u"
    given = tensors(base, *(f"{s}_{letter}" for s in ("in", "out") for letter in letters), blocks=blocks)
    raw = {**RAW, "plus": plus, "side": "both"}
    h_in, h_out = (
        torch.block_diag(*reflections(given[f"{STEM}.ether_{s}_u"], given.get(f"{STEM}.ether_{s}_v")))
        for s in ("in", "out")
    )
    wanted = expected(h_out @ base.weight_OI.double() @ h_in, base)
    torch.testing.assert_close(adapted(raw, given, base, evaluate), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_the_codes_reading_of_the_input(
    site: Callable[..., Site], evaluate: Any, plus: bool, blocks: int
) -> None:
    base = site(out_features=12, in_features=8, bias=True)
    given = tensors(base, *(("in_u", "in_v") if plus else ("in_u",)), blocks=blocks)
    raw = {**RAW, "plus": plus, "input_reading": "every_chunk"}
    h = reflections(given[f"{STEM}.ether_in_u"], given.get(f"{STEM}.ether_in_v"))
    # In memory order, as the released code reshapes a weight.
    pieces = base.weight_OI.double().reshape(blocks, 12, 8 // blocks)
    wanted = expected(torch.bmm(pieces, h).reshape(12, 8), base)
    torch.testing.assert_close(adapted(raw, given, base, evaluate), wanted, atol=1e-5, rtol=0)
    if blocks > 1:
        paper = adapted({**raw, "input_reading": "block_diagonal"}, given, base, evaluate)
        assert (paper - wanted).abs().max() > 0.1


def test_many_blocks_on_every_chunk_become_dense(site: Callable[..., Site]) -> None:
    base = site(out_features=12, in_features=8)
    raw = {**RAW, "input_reading": "every_chunk"}
    method = method_for(raw)
    for blocks, kind in [(1, LowRank), (2, LowRank), (4, Dense)]:
        given = tensors(base, "in_u", blocks=blocks)
        [part] = method.compile(method.parse(raw), given, {base.path: base}).sites[base.path]
        assert isinstance(part, kind)


def test_what_is_not_written_out_is_refused() -> None:
    for key in ("plus", "side", "input_reading"):
        rest = {name: value for name, value in RAW.items() if name != key}
        with pytest.raises(InvalidConfig, match=key):
            method_for(rest).parse(rest)


def test_vectors_that_do_not_fit_are_refused(site: Callable[..., Site]) -> None:
    base = site(out_features=6, in_features=8)
    sites = {base.path: base}
    key = f"{STEM}.ether_in_u"
    with pytest.raises(InvalidTensors, match=r"ether_in_u: found a row of zeros"):
        check_adapter(RAW, {key: torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]])}, sites)
    with pytest.raises(InvalidTensors, match=r"found 3 blocks, expected a number that divides 8"):
        check_adapter(RAW, {key: torch.ones(3, 2)}, sites)
    with pytest.raises(InvalidTensors, match=r"found 6 outputs, expected a multiple of the 4 blocks"):
        check_adapter({**RAW, "input_reading": "every_chunk"}, {key: torch.ones(4, 2)}, sites)
    with pytest.raises(InvalidTensors, match=r"ether_in_v' is surplus"):
        check_adapter(RAW, {key: torch.ones(4, 2), f"{STEM}.ether_in_v": torch.ones(4, 2)}, sites)
