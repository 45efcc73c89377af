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
RAW: dict[str, Any] = {
    "peft_type": "SMORA",
    "r": 5,
    "top_k": 2,
    "gate": "softmax",
    "scale": 0.5,
    "balance_bias": True,
}


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "lora_A.weight": (5, 4),
        "lora_B.weight": (6, 5),
        "router.weight": (5, 4),
        "router.balance_bias": (5,),
    }
    return {STEM + key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def parts(raw: dict[str, Any], given: dict[str, Tensor], base: Site) -> tuple[Any, ...]:
    check_adapter(raw, given, {base.path: base})
    method = method_for(raw)
    return tuple(method.compile(method.parse(raw), given, {base.path: base}).sites[base.path])


@pytest.mark.parametrize("gate", ["softmax", "renormalised", "one"])
@pytest.mark.parametrize("balance_bias", [False, True])
def test_each_token_uses_its_own_ranks(
    site: Callable[..., Site], evaluate: Any, gate: str, balance_bias: bool
) -> None:
    """Rank by rank in Python's numbers. The balance bias chooses and weighs nothing."""
    base, given = site(in_features=4, bias=True), tensors()
    raw = {**RAW, "gate": gate, "balance_bias": balance_bias}
    balance = given["base_model.model.model.layers.0.self_attn.q_proj.router.balance_bias"].tolist()
    if not balance_bias:
        del given[STEM + "router.balance_bias"]
        balance = [0.0] * 5
    a, b, router = (given[STEM + key].tolist() for key in ("lora_A.weight", "lora_B.weight", "router.weight"))
    x_TI = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    choices, expected = set(), []
    for x in x_TI.tolist():
        logits = [sum(w * v for w, v in zip(row, x, strict=True)) for row in router]
        kept = sorted(range(5), key=lambda e: -(logits[e] + balance[e]))[:2]
        choices.add(frozenset(kept))
        total = sum(math.exp(logit) for logit in logits)
        total = sum(math.exp(logits[e]) for e in kept) if gate == "renormalised" else total
        change = [0.0] * 6
        for e in kept:
            g = 1.0 if gate == "one" else math.exp(logits[e]) / total
            p = sum(w * v for w, v in zip(a[e], x, strict=True))
            change = [c + 0.5 * g * p * b[o][e] for o, c in enumerate(change)]
        expected.append(change)
    assert len(choices) > 2

    actual = evaluate.run_parts(base, parts(raw, given, base), x_TI)

    plain = torch.nn.functional.linear(x_TI, base.weight_OI.double(), base.bias_O.double())  # type: ignore[union-attr]
    torch.testing.assert_close(actual - plain, torch.tensor(expected, dtype=torch.float64))


def test_what_does_not_fit_is_refused(site: Callable[..., Site]) -> None:
    base, given = site(in_features=4), tensors()
    with pytest.raises(InvalidConfig, match="top_k: found 6, expected at most 5"):
        parts({**RAW, "top_k": 6}, given, base)
    with pytest.raises(InvalidConfig, match=r"r: .*less than or equal to 256"):
        parts({**RAW, "r": 257}, given, base)
    with pytest.raises(InvalidConfig, match="gate"):
        parts({key: value for key, value in RAW.items() if key != "gate"}, given, base)
    with pytest.raises(InvalidTensors, match=r"router.balance_bias' is surplus"):
        parts({**RAW, "balance_bias": False}, given, base)
    given[STEM + "router.weight"] = torch.ones(4, 4)
    with pytest.raises(InvalidTensors, match=r"router.weight: found shape \[4, 4\], expected \[5, 4\]"):
        parts(RAW, given, base)
