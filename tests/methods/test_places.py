from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from timbre_methods.bases import MAX_GRID
from timbre_methods.errors import InvalidConfig
from timbre_methods.places import first_of_permutation, fourier_places

CPU, META = torch.device("cpu"), torch.device("meta")


def test_the_default_seed_gives_the_places_that_peft_draws() -> None:
    places = fourier_places(777, 8, 6, 5, CPU)
    cells = torch.randperm(48, generator=torch.Generator().manual_seed(777))[:5]
    assert (places.rows_N * 6 + places.columns_N).tolist() == cells.tolist()
    # Literals from torch 2.13; another draw would misread every FourierFT file.
    assert cells.tolist() == [23, 22, 33, 26, 47]


@pytest.mark.parametrize("seed", [0, 777, 2**31 + 5, 2**63 - 1])
@pytest.mark.parametrize(
    ("size", "count"), [(1, 1), (2, 1), (48, 3), (4096, 255), (4096, 256), (100_003, 6250), (2_000_003, 999)]
)
def test_the_first_of_a_permutation_are_torchs_bit_for_bit(size: int, count: int, seed: int) -> None:
    expected = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count]
    assert torch.equal(first_of_permutation(seed, size, count), expected)


class CellsMade(TorchDispatchMode):
    """Counts the cells of all tensors that torch makes."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.count += sum(each.numel() for each in tree_leaves(made) if isinstance(each, torch.Tensor))
        return made


def test_few_places_of_a_large_layer_cost_no_more_than_of_a_small_one() -> None:
    with CellsMade() as small:
        first_of_permutation(5, 200 * 200, 1000)
    with CellsMade() as large:
        cells_N = first_of_permutation(5, 14_000 * 14_000, 1000)
    with CellsMade() as whole:
        first_of_permutation(5, 100 * 100, 1000)
    assert len(cells_N.unique()) == 1000
    assert large.count == small.count < 20 * 1000
    assert whole.count > 100 * 100, "a whole permutation of a layer is counted"


def test_equal_adapters_share_one_object_and_others_do_not() -> None:
    places = fourier_places(1, 8, 6, 5, CPU)
    assert fourier_places(1, 8, 6, 5, CPU) is places
    assert fourier_places(2, 8, 6, 5, CPU) is not places
    assert fourier_places(1, 6, 8, 5, CPU) is not places


def test_places_that_nobody_has_are_not_kept() -> None:
    places = weakref.ref(fourier_places(6, 8, 6, 5, CPU))
    gc.collect()
    assert places() is None


def test_fewer_places_are_the_beginning_of_more() -> None:
    few, many = fourier_places(3, 20, 30, 7, CPU), fourier_places(3, 20, 30, 70, CPU)
    assert torch.equal(many.rows_N[:7], few.rows_N)
    assert torch.equal(many.columns_N[:7], few.columns_N)


def test_places_keep_nothing_of_the_whole_draw() -> None:
    places = fourier_places(4, 100, 100, 3, CPU)
    assert places.rows_N.untyped_storage().nbytes() == 3 * 8
    assert places.columns_N.untyped_storage().nbytes() == 3 * 8


def test_drawing_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    fourier_places(5, 9, 9, 4, CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_on_meta_nothing_is_drawn() -> None:
    places = fourier_places(777, 2**14, 2**14, 1000, META)
    assert places.rows_N.device.type == "meta"
    assert places.rows_N.shape == places.columns_N.shape == (1000,)
    assert places.rows_N.dtype == torch.int64


@pytest.mark.parametrize("device", [CPU, META])
def test_a_draw_beyond_the_bound_is_refused(device: torch.device) -> None:
    with pytest.raises(InvalidConfig, match=str(MAX_GRID)):
        fourier_places(777, 2**14 + 1, 2**14, 1000, device)
