from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidConfig, InvalidTensors
from timbre_methods.registry import check_adapter, method_for

STEM = "base_model.model.model.layers.0.self_attn.q_proj."
RAW: dict[str, Any] = {"peft_type": "MOLORA", "r": 2, "lora_alpha": 8, "top_k": None}


def tensors(num_experts: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        STEM + "molora_A": torch.randn(num_experts, 2, 5, generator=generator),
        STEM + "molora_B": torch.randn(num_experts, 6, 2, generator=generator),
        STEM + "molora_router": torch.randn(num_experts, 5, generator=generator),
    }


def parts(raw: dict[str, Any], given: dict[str, Tensor], base: Site) -> tuple[Any, ...]:
    check_adapter(raw, given, {base.path: base})
    method = method_for(raw)
    return tuple(method.compile(method.parse(raw), given, {base.path: base}).sites[base.path])


@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_shares_are_of_all_experts_whoever_acts(
    site: Callable[..., Site], evaluate: Any, top_k: int | None
) -> None:
    base, given = site(), tensors()
    a, b, router = (given[STEM + key].double() for key in ("molora_A", "molora_B", "molora_router"))
    x_TI = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = []
    for x in x_TI:
        logits = [float(row @ x) for row in router]
        shares = [math.exp(logit) / sum(map(math.exp, logits)) for logit in logits]
        kept = sorted(range(3), key=lambda e: -shares[e])[: top_k or 3]
        y = base.weight_OI.double() @ x
        for e in kept:
            y = y + 4.0 * shares[e] * (b[e] @ (a[e] @ x))
        expected.append(y)

    actual = evaluate.run_parts(base, parts({**RAW, "top_k": top_k}, given, base), x_TI)

    torch.testing.assert_close(actual, torch.stack(expected), rtol=0, atol=1e-6)


def test_what_does_not_fit_is_refused(site: Callable[..., Site]) -> None:
    base, given = site(), tensors()
    with pytest.raises(InvalidConfig, match="top_k: found 4, expected at most 3"):
        parts({**RAW, "top_k": 4}, given, base)
    with pytest.raises(InvalidTensors, match="found 257 experts, expected <= 256"):
        parts(RAW, tensors(257), base)
    with pytest.raises(InvalidTensors, match="found 2 experts, expected 3 as in molora_A"):
        parts(RAW, {**given, STEM + "molora_router": torch.ones(2, 5)}, base)
    with pytest.raises(InvalidTensors, match=r"molora_router: found shape \[3, 6\], expected \[E, 5\]"):
        parts(RAW, {**given, STEM + "molora_router": torch.ones(3, 6)}, base)
