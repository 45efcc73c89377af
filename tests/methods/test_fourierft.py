from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import FourierFTConfig
from torch import Tensor, nn

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidConfig, InvalidTensors
from timbre_methods.program import Spectral
from timbre_methods.registry import method_for

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

OPTIONS = {
    "plain": {"n_frequency": 60},
    "another seed": {"n_frequency": 60, "random_loc_seed": 20261},
    "another scale": {"n_frequency": 60, "scaling": 77.5},
    "one coefficient": {"n_frequency": 1, "scaling": 2000.0},
    "every place": {"n_frequency": 48 * 24, "target_modules": ["k_proj"]},
    "counts by layer": {"n_frequency": 40, "n_frequency_pattern": {"down_proj": 90, "0.self_attn.q_proj": 7}},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_fourierft_gives_the_logits_of_peft(
    llama: nn.Module, agrees_with_peft: Callable[..., None], options: dict[str, object]
) -> None:
    agrees_with_peft(
        llama, FourierFTConfig(task_type="CAUSAL_LM", **{"target_modules": LAYERS, **options}), std=2.0
    )


@pytest.mark.parametrize("modules", [["c_attn"], ["c_attn", "c_proj", "c_fc"]])
def test_fourierft_on_conv1d_gives_the_logits_of_peft(
    gpt2: nn.Module, agrees_with_peft: Callable[..., None], modules: list[str]
) -> None:
    config = FourierFTConfig(n_frequency=50, target_modules=modules, fan_in_fan_out=True)
    agrees_with_peft(gpt2, config, std=2.0)


def test_fourierft_on_a_bf16_base_is_as_near_as_peft(
    llama: nn.Module, agrees_in_bf16: Callable[..., None]
) -> None:
    agrees_in_bf16(llama, FourierFTConfig(n_frequency=50, target_modules=LAYERS), std=1.0)


RAW = {"peft_type": "FOURIERFT", "n_frequency": 4, "scaling": 10.0, "random_loc_seed": 3}
KEY = "base_model.model.model.layers.0.self_attn.q_proj.fourierft_spectrum"


def compiled(raw: dict[str, Any], spectrum: Tensor, base: Site) -> Spectral:
    method = method_for(raw)
    program = method.compile(method.parse(raw), {KEY: spectrum}, {base.path: base})
    (part,) = program.sites[base.path]
    return part


def test_the_scale_is_folded_into_the_coefficients(site: Callable[..., Site]) -> None:
    part = compiled(RAW, torch.tensor([1.0, -2.0, 0.5, 0.25]), site())
    assert part.c_N.tolist() == [10.0, -20.0, 5.0, 2.5]
    assert part.places.transform == "dft"
    assert (part.places.out_features, part.places.in_features) == (6, 5)


def test_adapters_of_one_seed_and_shape_share_their_places(site: Callable[..., Site]) -> None:
    one, other = compiled(RAW, torch.ones(4), site()), compiled(RAW, torch.zeros(4), site())
    assert one.places is other.places
    assert compiled({**RAW, "random_loc_seed": 4}, torch.ones(4), site()).places is not one.places


def test_a_count_that_the_config_does_not_name_is_refused(site: Callable[..., Site]) -> None:
    with pytest.raises(InvalidTensors, match=r"found 5 coefficients, the config says \[4, 9\]"):
        compiled({**RAW, "n_frequency_pattern": {"(a+)+": 9}}, torch.ones(5), site())
    assert compiled({**RAW, "n_frequency_pattern": {"(a+)+": 5}}, torch.ones(5), site()).c_N.numel() == 5


def test_more_coefficients_than_places_are_refused(site: Callable[..., Site]) -> None:
    with pytest.raises(InvalidTensors, match="found 31 coefficients for 6 x 5 places"):
        compiled({**RAW, "n_frequency": 31}, torch.ones(31), site())


def test_a_file_without_places_on_a_layer_too_large_is_refused(site: Callable[..., Site]) -> None:
    huge = Site(site().path, torch.empty(2**15, 2**15, device="meta"), None)
    with pytest.raises(InvalidConfig, match="leave this layer out"):
        compiled(RAW, torch.ones(4), huge)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("n_frequency", 0),
        ("n_frequency", 2**40),
        ("random_loc_seed", None),
        ("random_loc_seed", -1),
        ("random_loc_seed", 2**64),
        ("scaling", "150"),
        ("n_frequency_pattern", {"q_proj": 0}),
    ],
)
def test_a_value_out_of_bounds_is_refused_with_its_key(key: str, value: object) -> None:
    with pytest.raises(InvalidConfig, match=key):
        method_for(RAW).parse({**RAW, key: value})
