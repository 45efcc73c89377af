from __future__ import annotations

import gc
import weakref
from threading import Barrier, Thread

import torch
from torch import Tensor

from timbre_methods.bases import Matrix, basis_on, interned_basis, shared_basis
from timbre_methods.program import Basis

CPU, META = torch.device("cpu"), torch.device("meta")


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


def on_meta(side: Tensor) -> Tensor:
    return side.to(META)


def test_a_basis_is_moved_to_a_device_once() -> None:
    p_NPI, q_NOQ = matrices()
    basis = shared_basis(p_NPI, q_NOQ)
    assert basis_on(basis, CPU, Tensor.cpu) is basis
    there = basis_on(basis, META, on_meta)
    assert there.p_NPI.device == META
    assert basis_on(shared_basis(p_NPI, q_NOQ), META, on_meta) is there
    # One that a method made itself is known by its values.
    assert basis_on(Basis(p_NPI, q_NOQ), META, on_meta) is there


def test_on_meta_no_basis_is_shared() -> None:
    shapes = [side.to(META) for side in matrices()]
    first, second = shared_basis(*shapes), shared_basis(*shapes)
    assert first is not second
    assert first.p_NPI.shape == (1, 3, 5)


def test_one_block_lies_row_by_row_however_it_was_laid_out() -> None:
    turned, wide = torch.arange(12.0).view(1, 4, 3).transpose(1, 2), torch.arange(30.0).view(1, 5, 6)
    basis = shared_basis(turned, wide[:, :, :3])
    assert basis.p_NPI.is_contiguous()
    assert basis.q_NOQ.is_contiguous()
    assert torch.equal(basis.p_NPI, turned)
