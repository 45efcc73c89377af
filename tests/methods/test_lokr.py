from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoKrConfig
from torch import Tensor, nn

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidTensors
from timbre_methods.program import Kronecker
from timbre_methods.registry import method_for

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

OPTIONS: dict[str, dict[str, Any]] = {
    "w2 in factors": {"r": 2, "alpha": 6},
    "both in factors": {"r": 2, "alpha": 6, "decompose_both": True},
    "both whole: the rank shows nowhere": {"r": 40, "alpha": 6},
    "a small first factor": {"r": 4, "decompose_factor": 2},
    "patterns": {"r": 2, "rank_pattern": {"v_proj": 3}, "alpha_pattern": {"q_proj": 1, ".*mlp.*": 16}},
    "a rank of whole matrices from a pattern": {
        "r": 2,
        "rank_pattern": {"v_proj": 30},
        "decompose_factor": 4,
    },
    "initialised as LyCORIS does": {"r": 2, "init_weights": "lycoris", "rank_dropout_scale": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_lokr_gives_the_logits_of_peft(
    llama: nn.Module, agrees_with_peft: Callable[..., None], options: dict[str, Any]
) -> None:
    agrees_with_peft(llama, LoKrConfig(target_modules=LAYERS, **options), std=0.4)


def test_lokr_on_a_bf16_base_is_as_near_as_peft(
    llama: nn.Module, agrees_in_bf16: Callable[..., None]
) -> None:
    agrees_in_bf16(llama, LoKrConfig(r=2, target_modules=LAYERS), std=0.3)


RAW = {"peft_type": "LOKR", "r": 2, "alpha": 4}
STEM = "base_model.model.model.layers.0.self_attn.q_proj"


def compiled(given: dict[str, Tensor], base: Site, **options: Any) -> Kronecker:
    method = method_for(RAW)
    program = method.compile(
        method.parse({**RAW, **options}),
        {f"{STEM}.lokr_{key}": t for key, t in given.items()},
        {base.path: base},
    )
    (part,) = program.sites[base.path]
    assert isinstance(part, Kronecker)
    return part


def test_w2_stays_in_factors_only_while_that_is_smaller(site: Callable[..., Site]) -> None:
    base = site(out_features=14, in_features=12)
    wide = {"w1": torch.ones(2, 2), "w2_a": torch.ones(7, 2), "w2_b": torch.ones(2, 6)}
    part = compiled(wide, base)
    assert part.w2_RN is not None
    assert part.w1_LM[0, 0] == 2
    narrow = {"w1": torch.ones(7, 4), "w2_a": torch.ones(2, 2), "w2_b": torch.ones(2, 3)}
    part = compiled(narrow, base)
    assert part.w2_RN is None
    torch.testing.assert_close(part.w2_KR, torch.full((2, 3), 2.0))


def test_sizes_that_do_not_divide_the_layers_are_refused(site: Callable[..., Site]) -> None:
    base = site(out_features=14, in_features=12)
    with pytest.raises(
        InvalidTensors, match=r"lokr_w1: found shape \[3, 2\], expected divisors of \[14, 12\]"
    ):
        compiled({"w1": torch.ones(3, 2), "w2": torch.ones(7, 6)}, base)
    with pytest.raises(InvalidTensors, match=r"lokr_w2: found shape \[6, 7\], expected \[7, 6\]"):
        compiled({"w1": torch.ones(2, 2), "w2": torch.ones(6, 7)}, base)


def test_a_matrix_that_is_there_twice_is_refused(site: Callable[..., Site]) -> None:
    base = site(out_features=14, in_features=12)
    given = {
        "w1": torch.ones(2, 2),
        "w2": torch.ones(7, 6),
        "w2_a": torch.ones(7, 2),
        "w2_b": torch.ones(2, 6),
    }
    with pytest.raises(InvalidTensors, match=r"lokr_w2_a is surplus"):
        compiled(given, base)


def test_ranks_must_be_the_configs(site: Callable[..., Site]) -> None:
    base = site(out_features=14, in_features=12)
    given = {"w1": torch.ones(2, 2), "w2_a": torch.ones(7, 3), "w2_b": torch.ones(3, 6)}
    assert compiled(given, base, rank_pattern={"v_proj": 3}).w1_LM[0, 0] == pytest.approx(4 / 3)
    with pytest.raises(InvalidTensors, match=r"lokr_w2_a: found rank 3, the config says \[2\]"):
        compiled(given, base)
