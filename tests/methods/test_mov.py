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


def tensors(num_experts: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        STEM + "mov_gain": torch.randn(num_experts, 6, generator=generator),
        STEM + "mov_router": torch.randn(num_experts, 5, generator=generator),
    }


def parts(top_k: int | None, given: dict[str, Tensor], base: Site) -> tuple[Any, ...]:
    raw = {"peft_type": "MOV", "top_k": top_k}
    check_adapter(raw, given, {base.path: base})
    method = method_for(raw)
    return tuple(method.compile(method.parse(raw), given, {base.path: base}).sites[base.path])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("top_k", [None, 1, 2, 3])
def test_the_mixture_multiplies_the_output(
    site: Callable[..., Site], evaluate: Any, top_k: int | None, bias: bool
) -> None:
    """With fewer than all experts the shares add up to less than 1, and the output is smaller for it."""
    base, given = site(bias=bias), tensors()
    gain, router = (given[STEM + key].double() for key in ("mov_gain", "mov_router"))
    x_TI = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = []
    for x in x_TI:
        logits = [float(row @ x) for row in router]
        shares = [math.exp(logit) / sum(map(math.exp, logits)) for logit in logits]
        kept = sorted(range(3), key=lambda e: -shares[e])[: top_k or 3]
        y = base.weight_OI.double() @ x
        if base.bias_O is not None:
            y = y + base.bias_O.double()
        expected.append(sum((shares[e] * gain[e] for e in kept), torch.zeros(6).double()) * y)

    actual = evaluate.run_parts(base, parts(top_k, given, base), x_TI)

    torch.testing.assert_close(actual, torch.stack(expected), rtol=0, atol=2e-6)


def test_what_does_not_fit_is_refused(site: Callable[..., Site]) -> None:
    base, given = site(), tensors()
    with pytest.raises(InvalidConfig, match="top_k: found 4, expected at most 3"):
        parts(4, given, base)
    with pytest.raises(InvalidTensors, match="found 257 experts, expected <= 256"):
        parts(None, tensors(257), base)
    with pytest.raises(InvalidTensors, match=r"mov_gain: found shape \[2, 6\], expected \[3, 6\]"):
        parts(None, {**given, STEM + "mov_gain": torch.ones(2, 6)}, base)
