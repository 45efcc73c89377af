"""MoS against numbers worked out here; PEFT does not have it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidConfig, InvalidTensors
from timbre_methods.registry import check_adapter, method_for

PATH = "model.layers.0.self_attn.q_proj"
STEM = f"base_model.model.{PATH}"
RAW = {"peft_type": "MOS", "r": 2, "lora_alpha": 6, "shards": 2, "pool_sizes": {"q_proj": 3}}


def tensors() -> dict[str, Tensor]:
    """For a layer of 6 x 4: two shards in each vector."""
    return {
        "base_model.mos_pool_A.q_proj": torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]),
        "base_model.mos_pool_B.q_proj": torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 3.0]]),
        f"{STEM}.mos_indices_A": torch.tensor([[2, 0], [1, 1]], dtype=torch.int32),
        f"{STEM}.mos_indices_B": torch.tensor([[0, 1], [2, 2]], dtype=torch.int32),
    }


def test_vectors_are_joined_from_their_shards(site: Callable[..., Site]) -> None:
    base, method = site(out_features=6, in_features=4), method_for(RAW)
    [part] = method.compile(method.parse(RAW), tensors(), {base.path: base}).sites[base.path]
    assert part.a_RI.tolist() == [[5.0, 6.0, 1.0, 2.0], [3.0, 4.0, 3.0, 4.0]]
    assert (part.b_OR / 3).T.tolist() == [[1.0, 0, 0, 0, 2.0, 0], [0, 0, 3.0, 0, 0, 3.0]]


def test_the_expanded_form_is_the_plain_lora(site: Callable[..., Site]) -> None:
    base, mos = site(out_features=6, in_features=4), method_for(RAW)
    raw = {"peft_type": "LORA", "r": 2, "lora_alpha": 6}
    given = {
        f"{STEM}.lora_A.weight": torch.tensor([[5.0, 6.0, 1.0, 2.0], [3.0, 4.0, 3.0, 4.0]]),
        f"{STEM}.lora_B.weight": torch.tensor(
            [[1.0, 0, 0, 0, 2.0, 0], [0, 0, 3.0, 0, 0, 3.0]]
        ).T.contiguous(),
    }
    lora = method_for(raw)
    [of_mos] = mos.compile(mos.parse(RAW), tensors(), {base.path: base}).sites[base.path]
    [of_lora] = lora.compile(lora.parse(raw), given, {base.path: base}).sites[base.path]
    assert torch.equal(of_mos.a_RI, of_lora.a_RI)
    assert torch.equal(of_mos.b_OR, of_lora.b_OR)


@pytest.mark.parametrize("place", [-1, 3])
def test_a_place_outside_the_pool_is_refused(place: int, site: Callable[..., Site]) -> None:
    base, given = site(out_features=6, in_features=4), tensors()
    check_adapter(RAW, given, {base.path: base})
    given[f"{STEM}.mos_indices_B"][1, 0] = place
    with pytest.raises(InvalidTensors, match=r"mos_indices_B: found places .*expected 0 to 2"):
        check_adapter(RAW, given, {base.path: base})


def test_pools_and_layers_must_belong_together(site: Callable[..., Site]) -> None:
    base = site(out_features=6, in_features=4)
    sizes = {"q_proj": 3, "k_proj": 1}
    stray = {**tensors(), "base_model.mos_pool_A.k_proj": torch.ones(1, 2)}
    with pytest.raises(InvalidTensors, match=r"mos_pool_A\.k_proj is surplus"):
        check_adapter({**RAW, "pool_sizes": sizes}, stray, {base.path: base})
    for key in ("base_model.mos_pool_A.k_proj", "base_model.mos_pool_B.k_proj"):
        with pytest.raises(InvalidTensors, match=rf"{key} is surplus: no adapted layer"):
            check_adapter(
                {**RAW, "pool_sizes": sizes}, {**tensors(), key: torch.ones(1, 2)}, {base.path: base}
            )
    with pytest.raises(InvalidTensors, match=r"mos_pool_A\.k_proj' is surplus"):
        check_adapter(RAW, stray, {base.path: base})
    without = {name: tensor for name, tensor in tensors().items() if "pool" not in name}
    with pytest.raises(InvalidConfig, match="expected a size for 'q_proj', found none"):
        check_adapter({**RAW, "pool_sizes": {}}, without, {base.path: base})


def test_a_layer_that_shards_do_not_fill_is_refused(site: Callable[..., Site]) -> None:
    base = site(out_features=6, in_features=5)
    with pytest.raises(InvalidTensors, match="found a layer of 6 x 5, expected multiples of 2 shards"):
        check_adapter(RAW, tensors(), {base.path: base})
