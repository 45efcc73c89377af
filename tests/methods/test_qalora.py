"""QA-LoRA against PEFT's own forward of it, called on plain layers, since its writer wants a GPTQ base."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from peft.tuners.lora.variants import QALoraLinearVariant
from torch import Tensor, nn

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidTensors, UnsupportedMethod
from timbre_methods.program import LowRank
from timbre_methods.registry import method_for

WIDE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
RAW: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_qalora": True}
STEM = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "options",
    [{"qalora_group_size": 8}, {"qalora_group_size": 2, "use_rslora": True, "rank_pattern": {"v_proj": 5}}],
    ids=["eight", "patterns"],
)
def test_logits_are_those_of_peft_s_variant(
    llama: nn.Module,
    options: dict[str, Any],
    quiet: Callable[[], AbstractContextManager[None]],
    written: Callable[[Path], Any],
    timbre_logits: Callable[..., Tensor],
    token_ids: Tensor,
    tmp_path: Path,
) -> None:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=WIDE, use_qalora=True, **options)
    torch.manual_seed(5)
    with quiet(), torch.no_grad():
        wrapped = peft.get_peft_model(copy.deepcopy(llama), config).eval()
        for module in wrapped.modules():
            if isinstance(module, Linear):
                QALoraLinearVariant.init(module, "default", config)
                module.lora_variant["default"] = QALoraLinearVariant()
                for factor in (module.lora_A, module.lora_B):
                    nn.init.normal_(factor["default"].weight, std=0.1)
        wrapped.save_pretrained(str(tmp_path))
        expected = wrapped(token_ids).logits
        base = llama(token_ids).logits
    adapter = written(tmp_path)
    assert adapter.tensors[f"{STEM}.lora_A.weight"].shape == (4, 48 // options["qalora_group_size"])
    torch.testing.assert_close(timbre_logits(llama, adapter, token_ids), expected, rtol=0, atol=1e-4)
    assert (expected - base).abs().max() > 0.05


def test_a_file_of_layers_where_peft_ignores_the_option_is_a_plain_lora(
    llama: nn.Module, agrees_with_peft: Callable[..., None]
) -> None:
    agrees_with_peft(llama, LoraConfig(r=4, target_modules=WIDE, use_qalora=True, qalora_group_size=8))


def tensors(groups: int) -> dict[str, Tensor]:
    a_RG = torch.arange(1.0, 2 * groups + 1).view(2, groups)
    return {f"{STEM}.lora_A.weight": a_RG, f"{STEM}.lora_B.weight": torch.eye(6, 2)}


def test_a_column_acts_on_its_group_by_the_mean_times_the_number_of_groups(site: Callable[..., Site]) -> None:
    base, raw = site(in_features=6), {**RAW, "qalora_group_size": 3}
    method = method_for(raw)
    (part,) = method.compile(method.parse(raw), tensors(2), {base.path: base}).sites[base.path]
    assert isinstance(part, LowRank)
    expected_RI = torch.tensor([[1.0, 1.0, 1.0, 2.0, 2.0, 2.0], [3.0, 3.0, 3.0, 4.0, 4.0, 4.0]]) * 2 / 3
    torch.testing.assert_close(part.a_RI, expected_RI)
    torch.testing.assert_close(part.b_OR, 2 * torch.eye(6, 2))


@pytest.mark.parametrize(("groups", "size"), [(2, 2), (3, 3), (1, 3), (12, 3)])
def test_other_groups_than_the_config_s_are_refused(
    groups: int, size: int, site: Callable[..., Site]
) -> None:
    base, raw = site(in_features=6), {**RAW, "qalora_group_size": size}
    method = method_for(raw)
    with pytest.raises(InvalidTensors, match=rf"found shape \[2, {groups}\].*6 / qalora_group_size={size}"):
        method.compile(method.parse(raw), tensors(groups), {base.path: base})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lora_bias": True}, "'lora_bias' is on"),
        ({"qalora_group_size": 1}, "qalora_group_size=1"),
        ({"use_dora": True}, "'use_(dora|qalora)' on"),
        ({"init_lora_weights": "loftq"}, "loftq"),
    ],
)
def test_what_it_cannot_mean_is_refused(options: dict[str, Any], words: str) -> None:
    raw = {**RAW, **options}
    with pytest.raises(UnsupportedMethod, match=words):
        method_for(raw).parse(raw)
