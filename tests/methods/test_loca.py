from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidConfig, InvalidTensors
from timbre_methods.program import Spectral
from timbre_methods.registry import check_adapter, method_for

PATH = "model.layers.0.self_attn.q_proj"
RAW = {"peft_type": "LOCA", "scale": 2.0}


def compiled(values: list[float], locations: Tensor, base: Site) -> Spectral:
    stem = f"base_model.model.{PATH}"
    tensors = {f"{stem}.spectrum": torch.tensor(values), f"{stem}.spectrum_indices": locations}
    check_adapter(RAW, tensors, {PATH: base})
    method = method_for(RAW)
    (part,) = method.compile(method.parse(RAW), tensors, {PATH: base}).sites[PATH]
    return part


def test_the_delta_is_a_sum_of_products_of_cosines(site: Callable[..., Site], evaluate: Any) -> None:
    locations = torch.tensor([[0.0, 0.45, 0.99, 0.45], [0.5, 0.2, 0.0, 0.2]])
    values, cells = [1.0, -2.0, 0.5, 3.0], [(0, 2), (2, 1), (5, 0), (2, 1)]
    expected = torch.zeros(6, 5, dtype=torch.float64)
    for a, (u, v) in zip(values, cells, strict=True):
        for p in range(6):
            for q in range(5):
                cosines = math.cos(math.pi * u * (p + 0.5) / 6) * math.cos(math.pi * v * (q + 0.5) / 5)
                expected[p, q] += 2.0 * a * cosines * math.sqrt((2 if u else 1) / 6 * (2 if v else 1) / 5)
    part = compiled(values, locations, site())
    torch.testing.assert_close(evaluate.spectra.spectral_delta(part), expected, atol=1e-6, rtol=1e-6)
    assert part.places.rows_N.tolist() == [u for u, _ in cells]


def test_locations_are_read_in_the_precision_in_which_they_are_stored(site: Callable[..., Site]) -> None:
    wide = site(out_features=1000, in_features=8)
    location = torch.tensor([[0.7], [0.0]], dtype=torch.bfloat16)
    # 0.7 is 0.69921875 in bfloat16; times 999 it is 698.52, whose nearest bfloat16 is 700.
    assert compiled([1.0], location, wide).places.rows_N.tolist() == [700]
    assert compiled([1.0], location.float(), wide).places.rows_N.tolist() == [699]


def test_locations_that_training_moved_out_of_the_unit_are_at_its_ends(site: Callable[..., Site]) -> None:
    places = compiled([1.0, 1.0], torch.tensor([[-0.3, 1.7], [1.0, -1e30]]), site()).places
    assert places.rows_N.tolist() == [0, 5]
    assert places.columns_N.tolist() == [4, 0]


def test_halves_go_to_the_even_neighbour(site: Callable[..., Site]) -> None:
    places = compiled([1.0, 1.0], torch.tensor([[0.5, 0.5], [0.125, 0.375]]), site()).places
    assert places.rows_N.tolist() == [2, 2]
    assert places.columns_N.tolist() == [0, 2]


def test_a_location_that_rounds_out_of_the_layer_is_refused(site: Callable[..., Site]) -> None:
    tall = site(out_features=4096, in_features=4)
    with pytest.raises(InvalidTensors, match="found the row 4096, expected 0 to 4095"):
        compiled([1.0], torch.tensor([[1.0], [0.0]], dtype=torch.bfloat16), tall)


def test_each_coefficient_has_its_two_locations(site: Callable[..., Site]) -> None:
    with pytest.raises(InvalidTensors, match=r"spectrum_indices: found shape \[2, 3\], expected \[2, 2\]"):
        compiled([1.0, 1.0], torch.zeros(2, 3), site())


def test_the_scale_must_be_given() -> None:
    with pytest.raises(InvalidConfig, match="scale"):
        method_for(RAW).parse({"peft_type": "LOCA"})
