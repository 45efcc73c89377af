from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from peft import WaveFTConfig, get_peft_model
from torch import Tensor, nn

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidConfig, InvalidTensors, UnsupportedMethod
from timbre_methods.program import Part, Sparse, Spectral
from timbre_methods.registry import method_for
from timbre_methods.spectral.wavelets import LOW_PASS

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

OPTIONS = {
    "haar": {},
    "long filter, another seed": {"wavelet_family": "db4", "random_loc_seed": 20261},
    "symlet, another scale": {"wavelet_family": "sym5", "scaling": 77.5},
    "coiflet": {"wavelet_family": "coif4"},
    "sparse": {"use_idwt": False},
    "every place": {"n_frequency": 48 * 24, "target_modules": ["k_proj"], "wavelet_family": "db2"},
    "counts by layer": {"n_frequency_pattern": {"down_proj": 90, "0.self_attn.q_proj": 7}},
    "counts by size": {"proportional_parameters": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_waveft_gives_the_logits_of_peft(
    llama: nn.Module, agrees_with_peft: Callable[..., None], options: dict[str, object]
) -> None:
    agrees_with_peft(
        llama, WaveFTConfig(**{"n_frequency": 60, "target_modules": LAYERS, **options}), std=0.02
    )


@pytest.mark.parametrize("options", [{"wavelet_family": "db3"}, {"use_idwt": False}], ids=str)
def test_waveft_on_conv1d_gives_the_logits_of_peft(
    gpt2: nn.Module, agrees_with_peft: Callable[..., None], options: dict[str, Any]
) -> None:
    modules = ["c_attn", "c_proj", "c_fc"]
    config = WaveFTConfig(n_frequency=50, target_modules=modules, fan_in_fan_out=True, **options)
    agrees_with_peft(gpt2, config, std=0.02)


def test_waveft_on_a_bf16_base_is_as_near_as_peft(
    llama: nn.Module, agrees_in_bf16: Callable[..., None]
) -> None:
    config = WaveFTConfig(n_frequency=50, target_modules=LAYERS, wavelet_family="db2")
    agrees_in_bf16(llama, config, std=0.01)


@pytest.mark.parametrize("family", LOW_PASS)
def test_every_family_gives_pefts_delta(
    family: str, quiet: Callable[[], AbstractContextManager[None]], evaluate: Any
) -> None:
    """On sizes that are even and odd, smaller and larger than the filter."""
    for out_features, in_features in ((7, 12), (30, 9), (1, 5)):
        count = min(40, out_features * in_features)
        options = {"n_frequency": count, "wavelet_family": family, "random_loc_seed": 4}
        layer = nn.Sequential(nn.Linear(in_features, out_features))
        with quiet():
            adapted = get_peft_model(layer, WaveFTConfig(target_modules=["0"], **options))
        spectrum = torch.randn(count, generator=torch.Generator().manual_seed(1))
        wrapped = adapted.base_model.model[0]
        wrapped.waveft_spectrum["default"].data = spectrum
        expected = wrapped.get_delta_weight("default").detach()
        base = Site(PATH, torch.zeros(out_features, in_features), None)
        part = compiled({"peft_type": "WAVEFT", **options}, spectrum, base)
        delta = evaluate.change(part, torch.eye(in_features), torch.empty(0)).T
        torch.testing.assert_close(delta, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("family", LOW_PASS)
def test_a_filter_is_orthonormal_to_its_shifts(family: str) -> None:
    taps = torch.tensor(LOW_PASS[family], dtype=torch.float64)
    shifts = [float(taps[: len(taps) - shift] @ taps[shift:]) for shift in range(0, len(taps), 2)]
    # The digits of coif4 are PEFT's, whose table is off.
    tolerance = 0.05 if family == "coif4" else 1e-11
    assert shifts == pytest.approx([1.0] + [0.0] * (len(shifts) - 1), abs=tolerance)
    assert float(taps.sum()) == pytest.approx(math.sqrt(2), abs=tolerance)


PATH = "model.layers.0.self_attn.q_proj"
RAW = {"peft_type": "WAVEFT", "n_frequency": 4, "scaling": 10.0, "random_loc_seed": 3}


def compiled(raw: dict[str, Any], spectrum: Tensor, base: Site) -> Part:
    method = method_for(raw)
    tensors = {f"base_model.model.{base.path}.waveft_spectrum": spectrum}
    (part,) = method.compile(method.parse(raw), tensors, {base.path: base}).sites[base.path]
    return part


def test_adapters_of_one_seed_shape_and_family_share_their_places(site: Callable[..., Site]) -> None:
    one, other = compiled(RAW, torch.ones(4), site()), compiled(RAW, torch.zeros(4), site())
    assert isinstance(one, Spectral)
    assert isinstance(other, Spectral)
    assert one.places is other.places
    assert one.c_N.tolist() == [10.0] * 4
    longer = compiled({**RAW, "wavelet_family": "db2"}, torch.ones(4), site())
    assert isinstance(longer, Spectral)
    assert longer.places is not one.places


def test_without_the_transform_it_is_a_sparse_matrix(site: Callable[..., Site]) -> None:
    part = compiled({**RAW, "use_idwt": False, "wavelet_family": "db30"}, torch.ones(4), site())
    assert isinstance(part, Sparse)
    assert part.values_N.tolist() == [10.0] * 4


@pytest.mark.parametrize("family", ["haar", "db11", "coif5", "../db1"])
def test_a_family_without_a_filter_is_refused(family: str) -> None:
    with pytest.raises(UnsupportedMethod, match=r"wavelet_family='.*train with one of db1, db2"):
        method_for(RAW).parse({**RAW, "wavelet_family": family})


def test_a_count_that_the_config_does_not_name_is_refused(site: Callable[..., Site]) -> None:
    with pytest.raises(InvalidTensors, match=r"found 5 coefficients, the config says \[4\]"):
        compiled(RAW, torch.ones(5), site())
    shared_out = {**RAW, "proportional_parameters": True}
    assert isinstance(compiled(shared_out, torch.ones(5), site()), Spectral)
    with pytest.raises(InvalidTensors, match="found 31 coefficients for 6 x 5 places, expected at most 30"):
        compiled(shared_out, torch.ones(31), site())


def test_a_value_out_of_bounds_is_refused_with_its_key() -> None:
    for key, value in (("n_frequency", 0), ("use_idwt", "yes"), ("wavelet_family", 4), ("scaling", "25")):
        with pytest.raises(InvalidConfig, match=key):
            method_for(RAW).parse({**RAW, key: value})
