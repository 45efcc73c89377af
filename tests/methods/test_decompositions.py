"""The seeded factorisations are torch's own, without torch's shared generator."""

from __future__ import annotations

import pytest
import torch

from timbre_methods.decompositions import ldu, seeded_svd_lowrank, thin_svd


@pytest.mark.parametrize("shape", [(20, 9), (9, 20), (13, 13)])
@pytest.mark.parametrize(("rank", "num_iterations", "seed"), [(4, 2, 0), (9, 0, 5), (3, 10, 2**40)])
def test_the_seeded_svd_has_the_bits_of_torchs(
    shape: tuple[int, int], rank: int, num_iterations: int, seed: int
) -> None:
    weight_OI = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        u_OR, sigma_R, v_IR = torch.svd_lowrank(weight_OI.float(), q=rank, niter=num_iterations)
    before = torch.get_rng_state()
    found = seeded_svd_lowrank(weight_OI, rank, num_iterations, seed)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found.u_OR, u_OR)
    assert torch.equal(found.sigma_R, sigma_R)
    assert torch.equal(found.v_RI, v_IR.T)
    meta = seeded_svd_lowrank(weight_OI.to("meta"), rank, num_iterations, seed)
    assert [t.shape for t in meta] == [t.shape for t in found]


def test_first_and_last_triplets_add_up_to_the_matrix() -> None:
    weight_OI = torch.randn(5, 7, generator=torch.Generator().manual_seed(2))
    svd = thin_svd(weight_OI)
    pieces = [(t.u_OR * t.sigma_R) @ t.v_RI for t in (svd.first(2), svd.last(3))]
    torch.testing.assert_close(pieces[0] + pieces[1], weight_OI)
    assert svd.last(0).v_RI.shape == (0, 7)


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (6, 6), (1, 3)])
def test_the_ldu_factors_are_those_of_torch(shape: tuple[int, int]) -> None:
    weight_OI = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    permutation_OO, lower_OK, upper_KI = torch.linalg.lu(weight_OI)
    left_OK, pivots_K, right_KI = ldu(weight_OI)
    assert torch.equal(left_OK, permutation_OO @ lower_OK)
    assert torch.equal(pivots_K, upper_KI.diagonal())
    torch.testing.assert_close(left_OK @ pivots_K.diag() @ right_KI, weight_OI)
    assert [t.shape for t in ldu(weight_OI.to("meta"))] == [t.shape for t in (left_OK, pivots_K, right_KI)]
