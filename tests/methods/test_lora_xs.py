from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidTensors, UnsupportedMethod
from timbre_methods.program import LowRank, Projected
from timbre_methods.registry import check_adapter, method_for

RAW = {"peft_type": "LORA_XS", "r": 2, "lora_alpha": 6}
STEM = "base_model.model.model.layers.0.self_attn.q_proj"
A = torch.tensor([[1.0, 2, 0, 0, -1], [0, 1, 1, 0, 3]])
B = torch.tensor([[1.0, 0], [0, 2], [3, 1], [-1, 0], [0, 0], [2, -2]])
R = torch.tensor([[0.0, 2.0], [-1.0, 0.5]])


def tensors(core: str = ".default_lora_latent_mapping.weight") -> dict[str, Tensor]:
    return {f"{STEM}.lora_A.weight": A, f"{STEM}.lora_B.weight": B, STEM + core: R}


def part(raw: dict[str, Any], given: dict[str, Tensor], base: Site) -> Any:
    sites, method = {base.path: base}, method_for(raw)
    check_adapter(raw, given, sites)
    (found,) = method.compile(method.parse(raw), given, sites).sites[base.path]
    return found


@pytest.mark.parametrize("method", ["LORA_XS", "LORA_SB"])
@pytest.mark.parametrize("core", [".default_lora_latent_mapping.weight", "_lora_latent_mapping.weight"])
@pytest.mark.parametrize(("options", "scale"), [({}, 3.0), ({"use_rslora": True}, 6 / math.sqrt(2))])
def test_the_core_stands_between_a_and_b_under_either_name(
    site: Callable[..., Site], evaluate: Any, method: str, core: str, options: dict[str, Any], scale: float
) -> None:
    base = site(bias=True)
    found = part({**RAW, "peft_type": method, **options}, tensors(core), base)
    assert isinstance(found, Projected if method == "LORA_XS" else LowRank)
    x_I = torch.tensor([1.0, -2.0, 0.5, 3.0, 1.0], dtype=torch.float64)
    # By hand: A x = (1 - 4 - 1, -2 + 0.5 + 3), R z = (2 z_1, -z_0 + 0.5 z_1).
    z = torch.tensor([2 * 1.5, 4.0 + 0.75], dtype=torch.float64)
    assert base.bias_O is not None
    expected_O = base.weight_OI.double() @ x_I + base.bias_O.double() + scale * (B.double() @ z)
    torch.testing.assert_close(evaluate.run_parts(base, (found,), x_I.unsqueeze(0))[0], expected_O)


def test_adapters_of_equal_a_and_b_share_their_basis(site: Callable[..., Site]) -> None:
    base, other = site(), {**tensors(), f"{STEM}.default_lora_latent_mapping.weight": R + 1}
    first, second = part(RAW, tensors(), base), part(RAW, other, base)
    assert first.basis is second.basis
    third = part(RAW, {**tensors(), f"{STEM}.lora_A.weight": -A}, base)
    assert third.basis is not first.basis


def test_a_core_under_two_names_is_refused(site: Callable[..., Site]) -> None:
    given = {**tensors(), f"{STEM}_lora_latent_mapping.weight": R}
    with pytest.raises(InvalidTensors, match="under two names"):
        part(RAW, given, site())


@pytest.mark.parametrize("method", ["LORA_XS", "LORA_SB"])
def test_a_core_under_a_third_name_is_surplus(site: Callable[..., Site], method: str) -> None:
    with pytest.raises(InvalidTensors, match=r"q_proj\.lora_latent_mapping\.weight' is surplus"):
        part({**RAW, "peft_type": method}, tensors(".lora_latent_mapping.weight"), site())


def test_a_factor_that_is_missing_is_not_computed_again(site: Callable[..., Site]) -> None:
    given = tensors()
    del given[f"{STEM}.lora_A.weight"]
    with pytest.raises(InvalidTensors, match=r"lora_A\.weight is missing"):
        part(RAW, given, site())


def test_a_lora_config_as_peft_writes_it_is_read_with_the_methods_own_type(tmp_path: Path) -> None:
    LoraConfig(r=3, lora_alpha=12, target_modules=["q_proj"], lora_dropout=0.1).save_pretrained(tmp_path)
    raw = {**json.loads((tmp_path / "adapter_config.json").read_text()), "peft_type": "LORA_XS"}
    config = method_for(raw).parse(raw)
    assert (config.r, config.scale) == (3, 4.0)


def test_what_loras_config_may_switch_on_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedMethod, match="'use_dora' is on"):
        method_for(RAW).parse({**RAW, "use_dora": True})
    with pytest.raises(UnsupportedMethod, match="'rank_pattern' is on"):
        method_for(RAW).parse({**RAW, "rank_pattern": {"q_proj": 4}})
