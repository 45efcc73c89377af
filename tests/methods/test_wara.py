from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidConfig, InvalidTensors, UnsupportedMethod
from timbre_methods.program import LowRank
from timbre_methods.registry import check_adapter, method_for
from timbre_methods.spectral.wavelets import LOW_PASS

PATH = "model.layers.0.self_attn.q_proj"


def raw(**options: Any) -> dict[str, Any]:
    return {"peft_type": "WARA", "r": 2, "scale": 1.5, "wavelet": "db1", **options}


def adapter(out_features: int, in_features: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(out_features)
    stem = f"base_model.model.{PATH}"
    return {
        f"{stem}.wara_A": torch.randn(2, in_features // 2, generator=generator),
        f"{stem}.wara_B": torch.randn(out_features // 2, 2, generator=generator),
    }


def compiled(config: dict[str, Any], tensors: dict[str, Tensor], base: Site) -> LowRank:
    check_adapter(config, tensors, {PATH: base})
    method = method_for(config)
    (part,) = method.compile(method.parse(config), tensors, {PATH: base}).sites[PATH]
    return part


def test_haar_bands_are_sums_and_differences_of_neighbours(site: Callable[..., Site]) -> None:
    base, tensors = site(out_features=8, in_features=6), adapter(8, 6)
    part = compiled(raw(), tensors, base)
    assert (part.a_RI.shape, part.b_OR.shape) == ((4, 6), (8, 4))
    a, b = (tensor.double() for tensor in tensors.values())
    x_I = torch.randn(6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    low, high = ((x_I[::2] + sign * x_I[1::2]) / math.sqrt(2) for sign in (1, -1))
    low, high = b @ a @ low, b @ a @ high
    expected = torch.stack([low + high, low - high], dim=1).flatten() * 1.5 / math.sqrt(2)
    torch.testing.assert_close(part.b_OR.double() @ (part.a_RI.double() @ x_I), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["db2", "db10", "sym4", "coif2"])
def test_longer_filters_wrap_around(family: str, site: Callable[..., Site]) -> None:
    """Also where they are longer than the features."""
    base, tensors = site(out_features=8, in_features=6), adapter(8, 6)
    part = compiled(raw(wavelet=family), tensors, base)
    a, b = (tensor.double() for tensor in tensors.values())
    taps = LOW_PASS[family]
    filters = [list(taps), [(-1) ** j * taps[-1 - j] for j in range(len(taps))]]

    def analysed(n: int) -> Tensor:
        shifts = torch.eye(n, dtype=torch.float64)
        rows = [
            sum(f * shifts[(2 * k + j) % n] for j, f in enumerate(own))
            for own in filters
            for k in range(n // 2)
        ]
        return torch.stack(rows)

    inner, outer = analysed(6), analysed(8)
    torch.testing.assert_close(outer @ outer.T, torch.eye(8, dtype=torch.float64), atol=1e-10, rtol=0)
    expected = 1.5 * outer.T @ torch.block_diag(b @ a, b @ a) @ inner
    torch.testing.assert_close(part.b_OR.double() @ part.a_RI.double(), expected, atol=1e-5, rtol=0)


def test_a_layer_of_odd_size_is_refused(site: Callable[..., Site]) -> None:
    with pytest.raises(InvalidTensors, match="found a layer of 6 x 5, expected even numbers"):
        compiled(raw(), adapter(6, 5), site())


def test_a_rank_that_the_config_does_not_name_is_refused(site: Callable[..., Site]) -> None:
    with pytest.raises(InvalidTensors, match=r"wara_A: found shape \[2, 2\], expected \[3, 2\]"):
        compiled(raw(r=3), adapter(6, 4), site(in_features=4))


def test_what_is_no_wavelet_is_refused() -> None:
    with pytest.raises(UnsupportedMethod, match="wavelet='haar' is not served; use one of db1, db2"):
        method_for(raw()).parse(raw(wavelet="haar"))
    with pytest.raises(InvalidConfig, match="wavelet"):
        method_for(raw()).parse(raw(wavelet=["db1"]))
