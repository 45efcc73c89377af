from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidConfig, InvalidTensors
from timbre_methods.program import LowRank
from timbre_methods.registry import check_adapter, method_for

RAW: dict[str, Any] = {"peft_type": "HYDRA", "scale": 0.5, "branch_biases": False}
STEM = "base_model.model.model.layers.0.self_attn.q_proj.hydra_"


def tensors(with_biases: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"parallel_A": (2, 5), "parallel_B": (6, 2), "sequential_A": (3, 6), "sequential_B": (6, 3)}
    given = {STEM + key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    if with_biases:
        for key, shape in shapes.items():
            given[f"{STEM}{key}_bias"] = torch.randn(shape[0], generator=generator)
    return given


def parts(given: dict[str, Tensor], base: Site, with_biases: bool) -> tuple[Any, ...]:
    raw = {**RAW, "branch_biases": with_biases}
    check_adapter(raw, given, {base.path: base})
    method = method_for(raw)
    return tuple(method.compile(method.parse(raw), given, {base.path: base}).sites[base.path])


@pytest.mark.parametrize("with_biases", [False, True])
@pytest.mark.parametrize("base_bias", [False, True])
def test_both_branches_merge_into_the_weight_and_the_bias(
    site: Callable[..., Site], evaluate: Any, base_bias: bool, with_biases: bool
) -> None:
    """W' = W + s B_p A_p + s B_s A_s W, and the constants that go with it, in float64."""
    base, given = site(bias=base_bias), tensors(with_biases)
    wide = {key.removeprefix(STEM): t.double() for key, t in given.items()}
    parallel, sequential = (wide[f"{b}_B"] @ wide[f"{b}_A"] for b in ("parallel", "sequential"))
    turn = torch.eye(6, dtype=torch.float64) + 0.5 * sequential
    weight = turn @ base.weight_OI.double() + 0.5 * parallel
    constant = torch.zeros(6, dtype=torch.float64)
    if base.bias_O is not None:
        constant = turn @ base.bias_O.double()
    for branch in ("parallel", "sequential") if with_biases else ():
        inner, outer = wide[f"{branch}_A_bias"], wide[f"{branch}_B_bias"]
        constant = constant + 0.5 * (wide[f"{branch}_B"] @ inner + outer)
    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    actual = evaluate.run_parts(base, parts(given, base, with_biases), x)

    torch.testing.assert_close(actual, x @ weight.T + constant, atol=1e-5, rtol=0)


def test_without_biases_it_is_low_rank_alone(site: Callable[..., Site]) -> None:
    [factors] = parts(tensors(with_biases=False), site(), with_biases=False)
    assert isinstance(factors, LowRank)
    assert factors.a_RI.shape == (5, 5)


def test_what_does_not_fit_is_refused(site: Callable[..., Site]) -> None:
    base, given = site(), tensors(with_biases=True)
    with pytest.raises(InvalidTensors, match=r"hydra_.*_bias' is surplus"):
        parts(given, base, with_biases=False)
    del given[f"{STEM}sequential_B_bias"]
    with pytest.raises(InvalidTensors, match=r"hydra_sequential_B_bias is missing"):
        parts(given, base, with_biases=True)
    without_scale = {key: value for key, value in RAW.items() if key != "scale"}
    with pytest.raises(InvalidConfig, match="scale"):
        method_for(RAW).parse(without_scale)
