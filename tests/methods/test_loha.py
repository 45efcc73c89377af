from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoHaConfig
from torch import Tensor, nn

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidConfig, InvalidTensors
from timbre_methods.program import Dense, LowRank, Part
from timbre_methods.registry import method_for

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

OPTIONS: dict[str, dict[str, Any]] = {
    "as factors": {"r": 3, "alpha": 6},
    "as a dense change": {"r": 6, "alpha": 6},
    "patterns": {"r": 4, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 1, ".*mlp.*": 16}},
    "training's own options": {
        "r": 2,
        "rank_dropout": 0.1,
        "module_dropout": 0.1,
        "use_effective_conv2d": True,
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_loha_gives_the_logits_of_peft(
    llama: nn.Module, agrees_with_peft: Callable[..., None], options: dict[str, Any]
) -> None:
    agrees_with_peft(llama, LoHaConfig(target_modules=LAYERS, **options), std=0.4)


def test_loha_on_a_bf16_base_is_as_near_as_peft(
    llama: nn.Module, agrees_in_bf16: Callable[..., None]
) -> None:
    agrees_in_bf16(llama, LoHaConfig(r=3, target_modules=LAYERS), std=0.3)


RAW = {"peft_type": "LOHA", "r": 2, "alpha": 4}
STEM = "base_model.model.model.layers.0.self_attn.q_proj"


def tensors(rank: int, out_features: int, in_features: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        f"{STEM}.hada_{key}": torch.randn(shape, generator=generator)
        for key, shape in {
            "w1_a": (out_features, rank),
            "w1_b": (rank, in_features),
            "w2_a": (out_features, rank),
            "w2_b": (rank, in_features),
        }.items()
    }


def compiled(raw: dict[str, Any], given: dict[str, Tensor], base: Site) -> Part:
    method = method_for(raw)
    (part,) = method.compile(method.parse(raw), given, {base.path: base}).sites[base.path]
    return part


def test_the_smaller_form_is_kept(site: Callable[..., Site]) -> None:
    """Rank 4 in 8 x 8 is as large as the change itself, rank 9 in 8 x 8 is larger."""
    base = site(out_features=8, in_features=8)
    factors = compiled(RAW, tensors(2, 8, 8), base)
    dense = compiled({**RAW, "r": 3}, tensors(3, 8, 8), base)
    assert isinstance(factors, LowRank)
    assert factors.a_RI.shape == (4, 8)
    assert isinstance(dense, Dense)


def test_the_change_is_the_product_of_two_products(site: Callable[..., Site]) -> None:
    base, given = site(out_features=9, in_features=8), tensors(2, 9, 8)
    part = compiled(RAW, given, base)
    assert isinstance(part, LowRank)
    a1, b1, a2, b2 = given.values()
    torch.testing.assert_close(part.b_OR @ part.a_RI, 2 * (a1 @ b1) * (a2 @ b2))


def test_a_rank_that_the_config_does_not_name_is_refused(site: Callable[..., Site]) -> None:
    with pytest.raises(InvalidTensors, match=r"hada_w1_a: found rank 3, the config says \[2, 5\]"):
        compiled({**RAW, "rank_pattern": {"k_proj": 5}}, tensors(3, 6, 5), site())


def test_a_convolutions_core_is_refused(site: Callable[..., Site]) -> None:
    given = {**tensors(2, 6, 5), f"{STEM}.hada_t1": torch.ones(2, 2, 3, 3)}
    with pytest.raises(InvalidTensors, match=r"hada_t1' is surplus"):
        compiled(RAW, given, site())


def test_a_pattern_that_cannot_be_read_is_refused() -> None:
    for option in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(InvalidConfig, match=f"{option}: cannot read"):
            method_for(RAW).parse({**RAW, option: {"(?=a)": 2}})
