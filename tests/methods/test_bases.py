from __future__ import annotations

import gc
import weakref
from threading import Barrier, Thread

import pytest
import torch
from torch import Tensor

from timbre_methods.bases import MAX_GRID, Matrix, basis_on, fourier_places, interned_basis, shared_basis
from timbre_methods.errors import InvalidConfig
from timbre_methods.program import Basis

CPU, META = torch.device("cpu"), torch.device("meta")


def test_the_default_seed_gives_the_places_that_peft_draws() -> None:
    places = fourier_places(777, 8, 6, 5, CPU)
    cells = torch.randperm(48, generator=torch.Generator().manual_seed(777))[:5]
    assert (places.rows_N * 6 + places.columns_N).tolist() == cells.tolist()
    # Literals from torch 2.13; another draw would misread every FourierFT file.
    assert cells.tolist() == [23, 22, 33, 26, 47]


def test_equal_adapters_share_one_object_and_others_do_not() -> None:
    places = fourier_places(1, 8, 6, 5, CPU)
    assert fourier_places(1, 8, 6, 5, CPU) is places
    assert fourier_places(2, 8, 6, 5, CPU) is not places
    assert fourier_places(1, 6, 8, 5, CPU) is not places


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


def matrices() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(8)
    return torch.randn(1, 3, 5, generator=generator), torch.randn(1, 4, 3, generator=generator)


def test_equal_matrices_make_one_basis_of_their_own_memory() -> None:
    p_NPI, q_NOQ = matrices()
    basis = shared_basis(p_NPI, q_NOQ)
    assert shared_basis(p_NPI.clone(), q_NOQ.double()) is basis
    assert torch.equal(basis.p_NPI, p_NPI)
    assert torch.equal(basis.q_NOQ, q_NOQ)
    assert basis.p_NPI.data_ptr() != p_NPI.data_ptr()
    assert basis.q_NOQ.dtype == torch.float32


def test_another_value_or_shape_makes_another_basis_that_shares_the_equal_side() -> None:
    p_NPI, q_NOQ = matrices()
    basis = shared_basis(p_NPI, q_NOQ)
    other = shared_basis(p_NPI, q_NOQ + 1)
    assert other is not basis
    assert other.p_NPI is basis.p_NPI
    assert shared_basis(p_NPI.transpose(1, 2).reshape(1, 3, 5), q_NOQ).p_NPI is not basis.p_NPI
    assert shared_basis(p_NPI.reshape(1, 5, 3), q_NOQ).p_NPI is not basis.p_NPI


def test_a_layout_that_the_operator_reads_best_is_kept() -> None:
    q_ONQ = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(9))
    basis = shared_basis(matrices()[0], q_ONQ.transpose(0, 1))
    assert basis.q_NOQ.transpose(0, 1).is_contiguous()


def test_a_basis_goes_with_the_last_that_uses_it() -> None:
    basis = shared_basis(*matrices())
    matrix = weakref.ref(basis.p_NPI)
    del basis
    gc.collect()
    assert matrix() is None


def test_a_matrix_that_somebody_holds_is_not_made_again() -> None:
    made = []

    def make(name: str, *shape: int) -> Matrix:
        return Matrix((test_a_matrix_that_somebody_holds_is_not_made_again, name), lambda: drawn(name, shape))

    def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
        made.append(name)
        return torch.ones(shape)

    wide = interned_basis(make("p", 1, 2, 5), make("q", 1, 7, 2), CPU)
    tall = interned_basis(make("p", 1, 2, 5), make("q of 9", 1, 9, 2), CPU)
    assert interned_basis(make("p", 1, 2, 5), make("q", 1, 7, 2), CPU) is wide
    assert tall.p_NPI is wide.p_NPI
    assert made == ["p", "q", "q of 9"]


def test_threads_get_one_basis() -> None:
    p_NPI, q_NOQ = matrices()
    together, found = Barrier(4), []

    def take() -> None:
        together.wait()
        found.append(shared_basis(p_NPI, q_NOQ))

    threads = [Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(basis) for basis in found}) == 1


def test_a_basis_is_moved_to_a_device_once() -> None:
    p_NPI, q_NOQ = matrices()
    basis = shared_basis(p_NPI, q_NOQ)
    assert basis_on(basis, CPU) is basis
    there = basis_on(basis, META)
    assert there.p_NPI.device == META
    assert basis_on(shared_basis(p_NPI, q_NOQ), META) is there
    # One that a method made itself is known by its values.
    assert basis_on(Basis(p_NPI, q_NOQ), META) is there


def test_on_meta_no_basis_is_shared() -> None:
    shapes = [side.to(META) for side in matrices()]
    first, second = shared_basis(*shapes), shared_basis(*shapes)
    assert first is not second
    assert first.p_NPI.shape == (1, 3, 5)
