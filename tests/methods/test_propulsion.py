from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidConfig, InvalidTensors
from timbre_methods.program import Diagonal
from timbre_methods.registry import check_adapter, method_for

RAW: dict[str, Any] = {"peft_type": "PROPULSION", "degree": 3}
NAME = "base_model.model.model.layers.0.self_attn.q_proj.propulsion"


def part(p_O: Tensor, base: Site, raw: dict[str, Any] = RAW) -> Diagonal:
    method = method_for(raw)
    [found] = method.compile(method.parse(raw), {NAME: p_O}, {base.path: base}).sites[base.path]
    return found


def test_the_power_scales_the_output_with_its_bias(site: Callable[..., Site], evaluate: Any) -> None:
    base = site(out_features=3, bias=True)
    x_TI = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    y_TO = evaluate.run_parts(base, (part(torch.tensor([2.0, -1.0, 0.5]), base),), x_TI)
    y0_TO = x_TI @ base.weight_OI.T + base.bias_O
    torch.testing.assert_close(y_TO, y0_TO * torch.tensor([8.0, -1.0, 0.125]))


def test_the_power_of_a_half_precision_value_is_not_rounded_to_it(site: Callable[..., Site]) -> None:
    p_O = torch.tensor([1.1015625], dtype=torch.bfloat16)
    gain = part(p_O, site(out_features=1), {**RAW, "degree": 15}).gain
    torch.testing.assert_close(gain.double(), torch.tensor([1.1015625**15]).double(), rtol=1e-7, atol=0)
    assert abs(float(gain.bfloat16()) - float(gain)) > 1e-3


def test_without_a_degree_nothing_is_served(site: Callable[..., Site]) -> None:
    raw = {"peft_type": "PROPULSION"}
    with pytest.raises(InvalidConfig, match="degree"):
        method_for(raw).parse(raw)


def test_an_infinite_power_is_refused(site: Callable[..., Site]) -> None:
    base, p_O = site(out_features=2), torch.tensor([1.0, 20.0])
    check_adapter(RAW, {NAME: p_O}, {base.path: base})
    with pytest.raises(InvalidTensors, match="a value whose power of 60 is infinite"):
        check_adapter({**RAW, "degree": 60}, {NAME: p_O}, {base.path: base})
