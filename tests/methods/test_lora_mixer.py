from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidConfig, InvalidTensors
from timbre_methods.program import AdapterProgram
from timbre_methods.registry import check_adapter, method_for
from timbre_methods.routing import Routed

ATTENTION = "base_model.model.model.layers.0.self_attn."
RAW: dict[str, Any] = {
    "peft_type": "LORA_MIXER",
    "scales": [2.0, 0.5, 1.0],
    "top_k": 2,
    "renormalised": True,
    "routers": "projection",
}
SHARED = {**RAW, "routers": "attention"}


def tensors(*names: str, is_shared: bool = False, has_bias: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    given = {}
    for name in names:
        for e, rank in enumerate((2, 1, 3)):
            given[f"{ATTENTION}{name}.experts.{e}.lora_A.weight"] = torch.randn(rank, 5, generator=generator)
            given[f"{ATTENTION}{name}.experts.{e}.lora_B.weight"] = torch.randn(6, rank, generator=generator)
        owner = "" if is_shared else f"{name}."
        given[f"{ATTENTION}{owner}router.weight"] = torch.randn(3, 5, generator=generator)
        if has_bias:
            given[f"{ATTENTION}{owner}router.bias"] = torch.randn(3, generator=generator)
    return given


def compiled(raw: dict[str, Any], given: dict[str, Tensor], *bases: Site) -> AdapterProgram:
    sites = {base.path: base for base in bases}
    check_adapter(raw, given, sites)
    method = method_for(raw)
    return method.compile(method.parse(raw), given, sites)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("renormalised", [False, True])
@pytest.mark.parametrize("routers", ["projection", "attention"])
def test_each_token_mixes_two_of_three_experts(
    site: Callable[..., Site], evaluate: Any, routers: str, renormalised: bool, has_bias: bool
) -> None:
    base, given = site(), tensors("q_proj", is_shared=routers == "attention", has_bias=has_bias)
    router = next(tensor for key, tensor in given.items() if "router.weight" in key).double()
    bias = next((tensor.tolist() for key, tensor in given.items() if "router.bias" in key), [0.0] * 3)
    x_TI = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = []
    for x in x_TI:
        weights = [math.exp(float(row @ x) + c) for row, c in zip(router, bias, strict=True)]
        kept = sorted(range(3), key=lambda e: -weights[e])[:2]
        total, y = sum(weights[e] for e in (kept if renormalised else range(3))), base.weight_OI.double() @ x
        for e in kept:
            a, b = (given[f"{ATTENTION}q_proj.experts.{e}.lora_{side}.weight"].double() for side in "AB")
            y = y + RAW["scales"][e] * weights[e] / total * (b @ (a @ x))
        expected.append(y)

    options = {"routers": routers, "renormalised": renormalised, "router_bias": has_bias}
    program = compiled({**RAW, **options}, given, base)
    actual = evaluate.run_parts(base, program.sites[base.path], x_TI)

    torch.testing.assert_close(actual, torch.stack(expected), rtol=0, atol=1e-5)


def test_the_projections_of_an_attention_share_one_router(site: Callable[..., Site]) -> None:
    bases = [site(f"model.layers.0.self_attn.{name}_proj") for name in "qk"]
    program = compiled(SHARED, tensors("q_proj", "k_proj", is_shared=True), *bases)
    (query,), (key,) = program.sites.values()
    assert isinstance(query, Routed)
    assert isinstance(key, Routed)
    assert query.router is key.router


def test_what_does_not_fit_is_refused(site: Callable[..., Site]) -> None:
    base, given = site(), tensors("q_proj", is_shared=True)
    after = site("model.layers.0.self_attn.o_proj")
    with pytest.raises(InvalidConfig, match="top_k: found 4, expected at most 3"):
        compiled({**RAW, "top_k": 4}, given, base)
    with pytest.raises(InvalidConfig, match=r"scales: .*at most 256 items"):
        compiled({**RAW, "scales": [1.0] * 257}, given, base)
    with pytest.raises(InvalidTensors, match=r"o_proj' does not read its attention's input"):
        compiled(SHARED, tensors("o_proj", is_shared=True), after)
    with pytest.raises(InvalidTensors, match=r"self_attn\.router\.weight is missing"):
        compiled(SHARED, {key: t for key, t in given.items() if "router" not in key}, base)
    stray = "base_model.model.model.layers.1.self_attn.router.weight"
    with pytest.raises(InvalidTensors, match=r"layers\.1\.self_attn\.router\.weight is surplus"):
        compiled(SHARED, {**given, stray: torch.ones(3, 5)}, base)
    with pytest.raises(InvalidTensors, match=r"router\.weight: found shape \[2, 5\], expected \[3, 5\]"):
        compiled(SHARED, {**given, ATTENTION + "router.weight": torch.ones(2, 5)}, base)
    with pytest.raises(InvalidTensors, match=r"self_attn\.router\.bias is missing"):
        compiled({**SHARED, "router_bias": True}, given, base)
    with pytest.raises(InvalidTensors, match=r"self_attn\.router\.bias' is surplus"):
        compiled(SHARED, {**given, ATTENTION + "router.bias": torch.ones(3)}, base)
    short = {ATTENTION + "router.bias": torch.ones(2)}
    with pytest.raises(InvalidTensors, match=r"router\.bias: found shape \[2\], expected \[3\]"):
        compiled({**SHARED, "router_bias": True}, {**given, **short}, base)
    with pytest.raises(InvalidTensors, match=r"experts\.3\.lora_A\.weight is missing"):
        compiled({**SHARED, "scales": [1.0] * 4}, given, base)
