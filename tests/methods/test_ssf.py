from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from timbre_methods.contract import Site
from timbre_methods.errors import AdapterMismatch, InvalidTensors
from timbre_methods.registry import check_adapter, method_for

RAW = {"peft_type": "SSF"}
STEM = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("bias", [False, True])
def test_the_scale_acts_on_the_bias_and_the_shift_comes_after(
    site: Callable[..., Site], evaluate: Any, bias: bool
) -> None:
    base = site(out_features=3, in_features=2, bias=bias)
    given = {
        f"{STEM}.ssf_scale": torch.tensor([2.0, 0.0, -1.0]),
        f"{STEM}.ssf_shift": torch.tensor([0.5, 0.25, 0.0]),
    }
    check_adapter(RAW, given, {base.path: base})
    method = method_for(RAW)
    parts = method.compile(method.parse(RAW), given, {base.path: base}).sites[base.path]
    x = [3.0, -2.0]
    y0 = [w[0] * x[0] + w[1] * x[1] for w in base.weight_OI.double().tolist()]
    if base.bias_O is not None:
        y0 = [y + b for y, b in zip(y0, base.bias_O.double().tolist(), strict=True)]
    wanted = torch.tensor([[2 * y0[0] + 0.5, 0.25, -y0[2]]], dtype=torch.float64)
    actual = evaluate.run_parts(base, parts, torch.tensor([x], dtype=torch.float64))
    torch.testing.assert_close(actual, wanted, atol=1e-6, rtol=0)


def test_scales_of_norms_are_refused_by_name(site: Callable[..., Site]) -> None:
    name = "base_model.model.model.layers.0.input_layernorm.ssf_scale"
    with pytest.raises(AdapterMismatch, match=r"input_layernorm"):
        check_adapter(RAW, {name: torch.ones(6)}, {site().path: site()})
    with pytest.raises(InvalidTensors, match=r"ssf_shift is missing"):
        check_adapter(RAW, {f"{STEM}.ssf_scale": torch.ones(6)}, {site().path: site()})
