from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import C3AConfig
from torch import Tensor, nn

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidConfig, InvalidTensors
from timbre_methods.program import Circulant
from timbre_methods.registry import method_for

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

OPTIONS = {
    "plain": {"block_size": 12},
    "odd blocks": {"block_size": 3},
    "single numbers": {"block_size": 1},
    "whole layers": {"block_size": 24, "target_modules": ["k_proj", "v_proj"]},
    "all layers": {"block_size": 2, "target_modules": [*ATTENTION, "gate_proj", "up_proj", "down_proj"]},
    "sizes by layer": {"block_size": 4, "block_size_pattern": {"o_proj": 16, "0.self_attn.k_proj": 8}},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_c3a_gives_the_logits_of_peft(
    llama: nn.Module, agrees_with_peft: Callable[..., None], options: dict[str, Any]
) -> None:
    agrees_with_peft(llama, C3AConfig(**{"target_modules": ATTENTION, **options}), std=2.0)


def test_c3a_on_a_bf16_base_is_as_near_as_peft(llama: nn.Module, agrees_in_bf16: Callable[..., None]) -> None:
    agrees_in_bf16(llama, C3AConfig(block_size=8, target_modules=ATTENTION), std=0.5)


RAW = {"peft_type": "C3A", "block_size": 3, "block_size_pattern": {"mlp": 2, "(a+)+": 4}}
KEY = "base_model.model.model.layers.0.self_attn.q_proj.c3a_kernel"


def compiled(kernel: Tensor, base: Site) -> Circulant:
    method = method_for(RAW)
    (part,) = method.compile(method.parse(RAW), {KEY: kernel}, {base.path: base}).sites[base.path]
    return part


def test_a_block_is_a_correlation_divided_by_the_input_size(site: Callable[..., Site], evaluate: Any) -> None:
    part = compiled(torch.tensor([[[3.0, 6.0, 12.0]]]), site(out_features=3, in_features=3))
    expected = [[1.0, 2.0, 4.0], [4.0, 1.0, 2.0], [2.0, 4.0, 1.0]]
    torch.testing.assert_close(
        evaluate.spectra.circulant_delta(part), torch.tensor(expected, dtype=torch.float64)
    )


def test_blocks_that_do_not_fit_are_refused(site: Callable[..., Site]) -> None:
    square = site(out_features=6, in_features=6)
    assert compiled(torch.ones(2, 2, 3), square).spectrum_MNK2.shape == (2, 2, 2, 2)
    with pytest.raises(InvalidTensors, match=r"found blocks of 6, the config says \[2, 3, 4\]"):
        compiled(torch.ones(1, 1, 6), square)
    with pytest.raises(InvalidTensors, match="found blocks of 4, expected a divisor of both 6 and 6"):
        compiled(torch.ones(1, 1, 4), square)
    with pytest.raises(InvalidTensors, match=r"found shape \[2, 1, 3\], expected \[2, 2, 3\]"):
        compiled(torch.ones(2, 1, 3), square)


@pytest.mark.parametrize(("key", "value"), [("block_size", 0), ("block_size_pattern", {"q_proj": -1})])
def test_a_value_out_of_bounds_is_refused_with_its_key(key: str, value: object) -> None:
    with pytest.raises(InvalidConfig, match=key):
        method_for(RAW).parse({**RAW, key: value})
