from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import VBLoRAConfig
from torch import Tensor, nn

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidConfig, InvalidTensors
from timbre_methods.registry import check_adapter, method_for

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

OPTIONS = {
    "logits": {"r": 3, "num_vectors": 20, "vector_length": 8},
    "top k alone": {"r": 3, "num_vectors": 20, "vector_length": 8, "save_only_topk_weights": True},
    "three of many": {"r": 2, "num_vectors": 300, "topk": 3, "save_only_topk_weights": True},
    "one of each": {"r": 4, "num_vectors": 6, "topk": 1, "vector_length": 4},
    "one of each, top k alone": {"r": 4, "num_vectors": 6, "topk": 1, "save_only_topk_weights": True},
    "all layers": {
        "r": 2,
        "num_vectors": 9,
        "vector_length": 2,
        "target_modules": [*ATTENTION, "up_proj", "down_proj"],
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_vblora_gives_the_logits_of_peft(
    llama: nn.Module, agrees_with_peft: Callable[..., None], options: dict[str, Any]
) -> None:
    config = VBLoRAConfig(**{"target_modules": ATTENTION, "vector_length": 12, **options})
    agrees_with_peft(llama, config, std=0.5)


@pytest.mark.parametrize("is_short", [True, False])
def test_vblora_on_conv1d_gives_the_logits_of_peft(
    gpt2: nn.Module, agrees_with_peft: Callable[..., None], is_short: bool
) -> None:
    config = VBLoRAConfig(
        r=2,
        num_vectors=12,
        vector_length=16,
        target_modules=["c_attn", "c_proj", "c_fc"],
        fan_in_fan_out=True,
        save_only_topk_weights=is_short,
    )
    agrees_with_peft(gpt2, config, std=0.5)


def test_vblora_on_a_bf16_base_is_as_near_as_peft(
    llama: nn.Module, agrees_in_bf16: Callable[..., None]
) -> None:
    config = VBLoRAConfig(r=3, num_vectors=20, vector_length=8, target_modules=ATTENTION)
    agrees_in_bf16(llama, config, std=0.5)


STEM = "base_model.model.model.layers.0.self_attn.q_proj"
RAW = {
    "peft_type": "VBLORA",
    "r": 1,
    "num_vectors": 3,
    "vector_length": 2,
    "topk": 2,
    "save_only_topk_weights": True,
}


def tensors() -> dict[str, Tensor]:
    """For a layer of 2 x 4."""
    return {
        "base_model.vblora_vector_bank": torch.tensor([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]]),
        f"{STEM}.vblora_logits_A_topk_indices": torch.tensor([[[2, 0], [1, 0]]], dtype=torch.uint8),
        f"{STEM}.vblora_logits_A_topk_weights": torch.tensor([[[0.75], [0.5]]]),
        f"{STEM}.vblora_logits_B_topk_indices": torch.tensor([[[0, 1]]], dtype=torch.uint8),
        f"{STEM}.vblora_logits_B_topk_weights": torch.tensor([[[1.0]]]),
    }


def test_the_last_weight_is_what_is_left_of_one(site: Callable[..., Site]) -> None:
    base, method = site(out_features=2, in_features=4), method_for(RAW)
    [part] = method.compile(method.parse(RAW), tensors(), {base.path: base}).sites[base.path]
    assert part.a_RI.tolist() == [[75.25, 150.5, 5.5, 11.0]]
    assert part.b_OR.tolist() == [[1.0], [2.0]]


@pytest.mark.parametrize(
    ("indices", "fault"), [([3, 0], "places 0 to 3, expected 0 to 2"), ([1, 1], "a vector twice")]
)
def test_impossible_places_are_refused(indices: list[int], fault: str, site: Callable[..., Site]) -> None:
    base, given = site(out_features=2, in_features=4), tensors()
    check_adapter(RAW, given, {base.path: base})
    given[f"{STEM}.vblora_logits_B_topk_indices"] = torch.tensor([[indices]], dtype=torch.uint8)
    with pytest.raises(InvalidTensors, match=f"logits_B_topk_indices: found {fault}"):
        check_adapter(RAW, given, {base.path: base})


def test_a_layer_that_pieces_do_not_fill_is_refused(site: Callable[..., Site]) -> None:
    base = site(out_features=2, in_features=5)
    with pytest.raises(InvalidTensors, match=r"found a layer of 2 x 5, expected multiples of .* 2"):
        check_adapter(RAW, tensors(), {base.path: base})


def test_a_file_of_the_other_form_is_refused(site: Callable[..., Site]) -> None:
    base = site(out_features=2, in_features=4)
    with pytest.raises(InvalidTensors, match="topk_indices' is surplus"):
        check_adapter({**RAW, "save_only_topk_weights": False}, tensors(), {base.path: base})


def test_more_in_a_sum_than_in_the_bank_are_refused() -> None:
    with pytest.raises(InvalidConfig, match="topk: found 4, expected at most num_vectors, 3"):
        method_for(RAW).parse({**RAW, "topk": 4})
