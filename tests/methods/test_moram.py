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
    "peft_type": "MORAM",
    "r": 2,
    "r_sum": 6,
    "lora_alpha": 32,
    "tau": 0.1,
    "k": 3,
    "delta": 0.2,
}


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        STEM + "lora_A.weight": torch.randn(6, 5, generator=generator),
        STEM + "lora_B.weight": torch.randn(6, 6, generator=generator),
    }


def parts(raw: dict[str, Any], given: dict[str, Tensor], base: Site) -> tuple[Any, ...]:
    check_adapter(raw, given, {base.path: base})
    method = method_for(raw)
    return tuple(method.compile(method.parse(raw), given, {base.path: base}).sites[base.path])


@pytest.mark.parametrize("k", [1, 3])
def test_ranks_choose_themselves_and_have_no_scale(site: Callable[..., Site], evaluate: Any, k: int) -> None:
    """One by one in Python's numbers: two at least, signed, and what lies below delta is cut off after."""
    base, given = site(), tensors()
    a, b = (given[STEM + key].tolist() for key in ("lora_A.weight", "lora_B.weight"))
    x_TI = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    num_cut, expected = 0, []
    for x in x_TI.tolist():
        p = [sum(w * v for w, v in zip(row, x, strict=True)) for row in a]
        n = [each / math.sqrt(sum(v * v for v in p)) for each in p]
        kept = sorted(range(6), key=lambda e: -n[e])[: max(k, 2)]
        total = sum(math.exp(n[e] / 0.1) for e in kept)
        change = [0.0] * 6
        for e in kept:
            num_cut += n[e] < 0.2
            g = math.exp(n[e] / 0.1) / total if n[e] >= 0.2 else 0.0
            change = [c + g * p[e] * b[o][e] for o, c in enumerate(change)]
        expected.append(change)
    assert num_cut > 0

    actual = evaluate.run_parts(base, parts({**RAW, "k": k}, given, base), x_TI)

    plain = torch.nn.functional.linear(x_TI, base.weight_OI.double())
    torch.testing.assert_close(actual - plain, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("key", ["tau", "k", "delta"])
def test_what_training_does_not_save_must_be_written(key: str) -> None:
    raw = {other: value for other, value in RAW.items() if other != key}
    with pytest.raises(InvalidConfig, match=rf"MORAM: {key} is missing .* write .* as '{key}'"):
        method_for(raw).parse(raw)


def test_what_does_not_fit_is_refused(site: Callable[..., Site]) -> None:
    base, given = site(), tensors()
    with pytest.raises(InvalidConfig, match="k: found 7, expected at most 6"):
        parts({**RAW, "k": 7}, given, base)
    with pytest.raises(InvalidConfig, match=r"r_sum: .*greater than or equal to 2"):
        parts({**RAW, "k": 1, "r_sum": 1}, given, base)
    with pytest.raises(InvalidTensors, match="found 6 ranks, the config says r_sum=8"):
        parts({**RAW, "r_sum": 8}, given, base)
    for tau in (0.0, -0.1, math.nan, math.inf):
        with pytest.raises(InvalidConfig, match="tau"):
            parts({**RAW, "tau": tau}, given, base)
