from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidConfig, InvalidTensors, UnsupportedMethod
from timbre_methods.low_rank.dora import ROWS_AT_ONCE
from timbre_methods.program import Diagonal, LowRank
from timbre_methods.registry import method_for

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

OPTIONS = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "patterns": {"r": 4, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 1, ".*mlp.*": 16}},
    "layers with a bias": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "with the head": {"r": 4, "target_modules": ["down_proj", "lm_head"]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_dora_gives_the_logits_of_peft(
    llama: nn.Module, agrees_with_peft: Callable[..., None], options: dict[str, Any]
) -> None:
    config = LoraConfig(use_dora=True, **{"target_modules": LAYERS, **options})
    agrees_with_peft(llama, config, std=0.2, save_embedding_layers=False)


def test_dora_on_conv1d_gives_the_logits_of_peft(
    gpt2: nn.Module, agrees_with_peft: Callable[..., None]
) -> None:
    modules = ["c_attn", "c_proj", "c_fc"]
    config = LoraConfig(use_dora=True, r=3, target_modules=modules, fan_in_fan_out=True)
    agrees_with_peft(gpt2, config, std=0.2)


def test_dora_on_a_bf16_base_is_as_near_as_peft(
    llama: nn.Module, agrees_in_bf16: Callable[..., None]
) -> None:
    agrees_in_bf16(llama, LoraConfig(use_dora=True, r=4, target_modules=LAYERS), std=0.1)


RAW = {"peft_type": "LORA", "use_dora": True, "r": 2, "lora_alpha": 4}
STEM = "base_model.model.model.layers.0.self_attn.q_proj"


def tensors(out_features: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        f"{STEM}.lora_A.weight": torch.randn(2, 5, generator=generator),
        f"{STEM}.lora_B.weight": torch.randn(out_features, 2, generator=generator),
        f"{STEM}.lora_magnitude_vector": 1 + torch.rand(out_features, generator=generator),
    }


def compiled(given: dict[str, Tensor], base: Site) -> tuple[LowRank, Diagonal]:
    method = method_for(RAW)
    factors, rows = method.compile(method.parse(RAW), given, {base.path: base}).sites[base.path]
    return factors, rows


def test_a_magnitude_of_the_rows_own_length_is_plain_lora(site: Callable[..., Site]) -> None:
    base, given = site(bias=True), tensors()
    delta_OI = 2 * given[f"{STEM}.lora_B.weight"] @ given[f"{STEM}.lora_A.weight"]
    given[f"{STEM}.lora_magnitude_vector"] = (base.weight_OI + delta_OI).norm(dim=1)
    factors, rows = compiled(given, base)
    torch.testing.assert_close(rows.gain, torch.ones(6))
    torch.testing.assert_close(rows.shift, torch.zeros(6))
    torch.testing.assert_close(factors.b_OR @ factors.a_RI, delta_OI)


def test_the_bases_bias_is_not_scaled(site: Callable[..., Site], evaluate: Any) -> None:
    base = site(bias=True)
    y_TO = evaluate.run_parts(base, compiled(tensors(), base), torch.zeros(1, 5))
    torch.testing.assert_close(y_TO[0], base.bias_O)
    assert compiled(tensors(), site())[1].shift is None


def test_a_row_of_zeros_stays_one(site: Callable[..., Site]) -> None:
    base, given = site(), tensors()
    weight_OI = base.weight_OI.clone()
    weight_OI[4] = given[f"{STEM}.lora_B.weight"][4] = 0
    _, rows = compiled(given, Site(base.path, weight_OI, None))
    assert rows.gain[4] == 1
    assert rows.gain.isfinite().all()


def test_rows_are_measured_in_pieces_without_a_seam(site: Callable[..., Site]) -> None:
    out_features = 2 * ROWS_AT_ONCE + 3
    base, given = site(out_features=out_features), tensors(out_features)
    adapted_OI = base.weight_OI + 2 * given[f"{STEM}.lora_B.weight"] @ given[f"{STEM}.lora_A.weight"]
    expected_O = given[f"{STEM}.lora_magnitude_vector"] / adapted_OI.norm(dim=1)
    torch.testing.assert_close(compiled(given, base)[1].gain, expected_O)


def test_a_magnitude_without_the_switch_is_surplus(site: Callable[..., Site]) -> None:
    raw = {**RAW, "use_dora": False}
    method = method_for(raw)
    assert method.name == "lora"
    with pytest.raises(InvalidTensors, match=r"lora_magnitude_vector' is surplus"):
        method.compile(method.parse(raw), tensors(), {site().path: site()})


def test_what_dora_does_not_have_is_refused() -> None:
    method = method_for(RAW)
    assert method.name == "dora"
    with pytest.raises(UnsupportedMethod, match="'lora_bias' is on"):
        method.parse({**RAW, "lora_bias": True})
    with pytest.raises(UnsupportedMethod, match="init_lora_weights='pissa'"):
        method.parse({**RAW, "init_lora_weights": "pissa"})
    with pytest.raises(InvalidConfig, match="use_dora"):
        method.parse({**RAW, "use_dora": "yes"})
    with pytest.raises(UnsupportedMethod, match=r"'arrow_config' on .*without it dora would"):
        method_for({**RAW, "arrow_config": {"top_k": 2}})
