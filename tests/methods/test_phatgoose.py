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
RAW: dict[str, Any] = {"peft_type": "PHATGOOSE", "num_experts": 3}
RANKS = (2, 1, 4)


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    given = {STEM + "gate_vector": 2 + 3 * torch.randn(3, 5, generator=generator)}
    for e, rank in enumerate(RANKS):
        given[f"{STEM}experts.{e}.lora_A.weight"] = torch.randn(rank, 5, generator=generator)
        given[f"{STEM}experts.{e}.lora_B.weight"] = torch.randn(6, rank, generator=generator)
    return given


def parts(raw: dict[str, Any], given: dict[str, Tensor], base: Site) -> tuple[Any, ...]:
    check_adapter(raw, given, {base.path: base})
    method = method_for(raw)
    return tuple(method.compile(method.parse(raw), given, {base.path: base}).sites[base.path])


def normalised(values: list[float]) -> list[float]:
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / len(values)
    return [(v - mean) / math.sqrt(variance + 1e-5) for v in values]


@pytest.mark.parametrize("top_k", [None, 1, 3])
def test_tokens_find_experts_by_normalised_directions(
    site: Callable[..., Site], evaluate: Any, top_k: int | None
) -> None:
    """Two are kept where the config does not say how many."""
    base, given = site(), tensors()
    raw = RAW if top_k is None else {**RAW, "top_k": top_k}
    vectors = [normalised(row) for row in given[STEM + "gate_vector"].tolist()]
    x_TI = 1 + 3 * torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = []
    for x in x_TI:
        own = normalised(x.tolist())
        logits = [sum(a * b for a, b in zip(v, own, strict=True)) / math.sqrt(5) for v in vectors]
        kept = sorted(range(3), key=lambda e: -logits[e])[: top_k or 2]
        total, y = sum(math.exp(logits[e]) for e in kept), base.weight_OI.double() @ x
        for e in kept:
            a, b = (given[f"{STEM}experts.{e}.lora_{side}.weight"].double() for side in "AB")
            y = y + math.exp(logits[e]) / total * (b @ (a @ x)) / RANKS[e]
        expected.append(y)

    actual = evaluate.run_parts(base, parts(raw, given, base), x_TI)

    torch.testing.assert_close(actual, torch.stack(expected), rtol=0, atol=1e-5)


def test_what_does_not_fit_is_refused(site: Callable[..., Site]) -> None:
    base, given = site(), tensors()
    with pytest.raises(InvalidConfig, match="top_k: found 4, expected at most 3"):
        parts({**RAW, "top_k": 4}, given, base)
    with pytest.raises(InvalidConfig, match=r"num_experts: .*less than or equal to 256"):
        parts({**RAW, "num_experts": 257}, given, base)
    with pytest.raises(InvalidTensors, match=r"experts\.2\.lora_A\.weight' is surplus"):
        parts({**RAW, "num_experts": 2}, given, base)
    with pytest.raises(InvalidTensors, match=r"gate_vector: found shape \[3, 5\], expected \[4, 5\]"):
        parts({**RAW, "num_experts": 4}, given, base)
    gapped = {key: tensor for key, tensor in given.items() if "experts.1." not in key}
    with pytest.raises(InvalidTensors, match=r"experts\.1\.lora_A\.weight is missing"):
        parts(RAW, gapped, base)
