from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import MissConfig
from torch import Tensor, nn

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidConfig, InvalidTensors
from timbre_methods.program import Dense, Kronecker, LowRank, Part
from timbre_methods.registry import method_for

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

OPTIONS: dict[str, dict[str, Any]] = {
    "r divides some inputs": {"r": 6},
    "r divides no input": {"r": 9, "init_weights": False},
    "mini": {"r": 4, "init_weights": "mini", "mini_r": 2},
    "mini with a larger block": {"r": 5, "init_weights": "mini", "mini_r": 8, "target_modules": ATTENTION},
    "bat": {"r": 2, "init_weights": "bat"},
    "bat with larger tiles": {"r": 8, "init_weights": "bat", "target_modules": ATTENTION},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_miss_gives_the_logits_of_peft(
    llama: nn.Module, agrees_with_peft: Callable[..., None], options: dict[str, Any]
) -> None:
    agrees_with_peft(llama, MissConfig(**{"target_modules": LAYERS, **options}), std=0.1)


@pytest.mark.parametrize("kind", [True, "bat"])
def test_miss_on_a_bf16_base_is_as_near_as_peft(
    kind: bool | str, llama: nn.Module, agrees_in_bf16: Callable[..., None]
) -> None:
    agrees_in_bf16(llama, MissConfig(r=2, init_weights=kind, target_modules=LAYERS), std=0.05)


@pytest.mark.parametrize("kind", [True, False, "bat"])
def test_bone_is_miss_under_its_older_name(
    kind: bool | str,
    llama: nn.Module,
    write_with_peft: Callable[..., Any],
    timbre_logits: Callable[..., Tensor],
    token_ids: Tensor,
) -> None:
    """As PEFT wrote it while it had the type: BoneConfig knew no mini_r and no miss_dropout."""
    written = write_with_peft(llama, MissConfig(r=2, init_weights=kind, target_modules=LAYERS), std=0.1)
    expected = timbre_logits(llama, written, token_ids)
    del written.config["mini_r"], written.config["miss_dropout"]
    written.config["peft_type"] = "BONE"
    for name in list(written.tensors):
        written.tensors[name.replace("miss_block", "bone_block")] = written.tensors.pop(name)
    assert torch.equal(timbre_logits(llama, written, token_ids), expected)


RAW = {"peft_type": "MISS", "r": 2}
STEM = "base_model.model.model.layers.0.self_attn.q_proj"


def compiled(block: Tensor, base: Site, **options: Any) -> Part:
    method = method_for(RAW)
    config = method.parse({**RAW, **options})
    (part,) = method.compile(config, {f"{STEM}.miss_block": block}, {base.path: base}).sites[base.path]
    return part


def test_the_smallest_exact_form_is_kept(site: Callable[..., Site]) -> None:
    even, odd, small = (site(out_features=8, in_features=n) for n in (12, 13, 2))
    assert isinstance(compiled(torch.ones(2, 8), even), Kronecker)
    assert isinstance(compiled(torch.ones(2, 8), odd), LowRank)
    assert isinstance(compiled(torch.ones(2, 8), small), Dense)
    assert isinstance(compiled(torch.ones(1, 1), even, r=1, init_weights="mini"), LowRank)
    assert isinstance(compiled(torch.ones(8, 8), odd, r=8), Dense)


def test_mini_keeps_the_block_as_small_as_the_file(site: Callable[..., Site]) -> None:
    part = compiled(
        torch.ones(4, 3), site(out_features=12, in_features=16), r=4, init_weights="mini", mini_r=3
    )
    assert isinstance(part, Kronecker)
    assert (part.w1_LM.shape, part.w2_KR.shape) == ((4, 4), (3, 4))


def test_the_last_piece_of_the_input_is_filled_up_with_zeros(site: Callable[..., Site]) -> None:
    base = site(out_features=30, in_features=13)
    block = torch.randn(4, 30, generator=torch.Generator().manual_seed(1))
    part = compiled(block, base, r=4)
    assert isinstance(part, LowRank)
    expected = torch.stack([block[i % 4] for i in range(13)], dim=1)
    torch.testing.assert_close(part.b_OR @ part.a_RI, expected)


def test_sizes_that_do_not_fit_are_refused(site: Callable[..., Site]) -> None:
    with pytest.raises(InvalidTensors, match=r"found shape \[7, 6\], expected at most 5 rows"):
        compiled(torch.ones(7, 6), site(), r=7)
    with pytest.raises(InvalidTensors, match=r"and a divisor of 6 columns"):
        compiled(torch.ones(2, 4), site(), init_weights="mini", mini_r=4)
    with pytest.raises(InvalidTensors, match=r"found a layer of 6 x 5, expected multiples of r=2"):
        compiled(torch.ones(3, 2, 2), site(), init_weights="bat")


def test_a_formula_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="init_weights"):
        method_for(RAW).parse({**RAW, "init_weights": "lora"})
    with pytest.raises(InvalidConfig, match="BONE has no 'mini'"):
        method_for(RAW).parse({**RAW, "peft_type": "BONE", "init_weights": "mini"})
