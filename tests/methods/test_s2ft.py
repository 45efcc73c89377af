from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidTensors
from timbre_methods.registry import check_adapter, method_for

RAW = {"peft_type": "S2FT"}
STEM = "base_model.model.model.layers.0.self_attn.q_proj"


def compiled(given: dict[str, Tensor], base: Site) -> tuple[Any, ...]:
    check_adapter(RAW, given, {base.path: base})
    method = method_for(RAW)
    return method.compile(method.parse(RAW), given, {base.path: base}).sites[base.path]


def test_s2ft_equals_a_permuted_fine_tuned_pair_of_layers(evaluate: Any) -> None:
    """The paper's own form: co-permute up and down, train the leading channels, run the permuted pair."""
    generator = torch.Generator().manual_seed(3)
    up_HI = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    down_OH = torch.randn(4, 7, generator=generator, dtype=torch.float64)
    order_H = torch.tensor([4, 1, 6, 0, 2, 3, 5])
    tuned_up_HI, tuned_down_OH = up_HI[order_H], down_OH[:, order_H]
    tuned_up_HI[:3] += (up_block := torch.randn(3, 5, generator=generator, dtype=torch.float64))
    tuned_down_OH[:, :2] += (down_block := torch.randn(4, 2, generator=generator, dtype=torch.float64))
    x_TI = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    expected = torch.relu(x_TI @ tuned_up_HI.T) @ tuned_down_OH.T

    up, down = (
        Site(f"model.layers.0.mlp.{name}_proj", weight, None)
        for name, weight in (("up", up_HI), ("down", down_OH))
    )
    stem = "base_model.model.model.layers.0.mlp"
    given = {
        f"{stem}.up_proj.s2ft_output_indices": order_H[:3].int(),
        f"{stem}.up_proj.s2ft_output_block": up_block.float(),
        f"{stem}.down_proj.s2ft_input_indices": order_H[:2].int(),
        f"{stem}.down_proj.s2ft_input_block": down_block.float(),
    }
    sites = {up.path: up, down.path: down}
    check_adapter(RAW, given, sites)
    method = method_for(RAW)
    program = method.compile(method.parse(RAW), given, sites).sites
    hidden = torch.relu(evaluate.run_parts(up, program[up.path], x_TI))
    actual = evaluate.run_parts(down, program[down.path], hidden)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize(
    ("indices", "problem"),
    [([0, 9], "channel 9, expected 0 to"), ([-1, 0], "channel -1"), ([2, 2], "channel 2 twice")],
)
def test_impossible_channels_are_refused(
    side: str, indices: list[int], problem: str, site: Callable[..., Site]
) -> None:
    shape = (6, 2) if side == "input" else (2, 5)
    given = {
        f"{STEM}.s2ft_{side}_indices": torch.tensor(indices),
        f"{STEM}.s2ft_{side}_block": torch.ones(shape),
    }
    with pytest.raises(InvalidTensors, match=rf"s2ft_{side}_indices: found the {problem}"):
        compiled(given, site())


def test_a_block_of_the_other_side_is_refused(site: Callable[..., Site]) -> None:
    given = {
        f"{STEM}.s2ft_input_indices": torch.tensor([0, 1]),
        f"{STEM}.s2ft_output_block": torch.ones(2, 5),
    }
    with pytest.raises(InvalidTensors, match="s2ft_input_block is missing"):
        compiled(given, site())


def test_more_channels_than_the_layer_has_are_refused(site: Callable[..., Site]) -> None:
    given = {f"{STEM}.s2ft_input_indices": torch.arange(6), f"{STEM}.s2ft_input_block": torch.ones(6, 6)}
    with pytest.raises(InvalidTensors, match="found 6 channels, expected at most 5"):
        compiled(given, site())
