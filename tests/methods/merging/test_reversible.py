"""A pool for a collection, against the paper's own statement of it: means and components at each place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from timbre_methods.contract import Site
from timbre_methods.errors import AdapterMismatch, InvalidRecipe
from timbre_methods.merging.changes import Ingredient
from timbre_methods.merging.compress import compress
from timbre_methods.merging.reversible import reversible_basis
from timbre_methods.program import AdapterProgram, LowRank, Projected
from timbre_methods.registry import compile_adapter

OUT, IN, RANK, COUNT = 26, 22, 3, 5


def loras(count: int = COUNT, rank: int = RANK) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(rank, IN, generator=generator), torch.randn(OUT, rank, generator=generator))
        for _ in range(count)
    ]


def rebuilt(vectors_KD: Tensor, components: int) -> Tensor:
    """Points by their mean and the eigenvectors of their covariance."""
    mean_D = vectors_KD.mean(0)
    centred_KD = vectors_KD - mean_D
    kept_DP = torch.linalg.eigh(centred_KD.T @ centred_KD).eigenvectors[:, -components:]
    return mean_D + centred_KD @ kept_DP @ kept_DP.T


@pytest.mark.parametrize("components", [1, 2])
def test_each_place_keeps_its_mean_and_its_first_components(components: int) -> None:
    pairs = loras()
    found = reversible_basis(pairs, components)
    a_KRI = torch.stack([a.double() for a, _ in pairs])
    b_KRO = torch.stack([b.double().T for _, b in pairs])
    for place in range(RANK):
        a_KRI[:, place] = rebuilt(a_KRI[:, place], components)
        b_KRO[:, place] = rebuilt(b_KRO[:, place], components)
    for k, (a, b) in enumerate(pairs):
        expected = b_KRO[k].T @ a_KRI[k]
        served = found.b_OR.double() @ found.s_KRR[k].double() @ found.a_RI.double()
        torch.testing.assert_close(served, expected, atol=1e-4, rtol=1e-4)
        whole = b.double() @ a.double()
        assert found.whole_K[k] == pytest.approx(float(whole.square().sum()), rel=1e-4)
        assert found.left_out_K[k] == pytest.approx(float((whole - expected).square().sum()), rel=1e-3)


@pytest.mark.parametrize("components", [COUNT - 1, COUNT + 2])
def test_with_as_many_components_as_the_adapters_span_nothing_is_lost(components: int) -> None:
    found = reversible_basis(loras(), components)
    assert found.a_RI.shape == (RANK * (1 + components), IN)
    for left_out, whole in zip(found.left_out_K, found.whole_K, strict=True):
        assert left_out < 1e-8 * whole


SITES = {path: Site(path, torch.empty(OUT, IN, device="meta"), None) for path in ("q", "v")}


def ingredients(*ranks: int) -> list[Ingredient]:
    return [
        Ingredient(
            f"lora{k}@1",
            "lora",
            AdapterProgram({path: (LowRank(*loras(1, rank)[0]),) for path in (("q", "v") if k else ("q",))}),
        )
        for k, rank in enumerate(ranks)
    ]


def test_members_are_served_from_the_pool() -> None:
    found = compress(ingredients(3, 3, 3), SITES, 2, "reversible").members
    programs = [compile_adapter(each.file.config, each.file.tensors, SITES) for each in found]
    assert [list(program.sites) for program in programs] == [["q"], ["q", "v"], ["q", "v"]]
    parts = [program.sites["q"][0] for program in programs]
    assert len({id(part.basis) for part in parts if isinstance(part, Projected)}) == 1
    assert programs[0].prepared_bytes == 4 * (3 * 3) ** 2
    assert all(each.relative_error < 1e-4 for each in found)  # All are equal.


def test_other_ranks_and_pools_wider_than_a_layer_are_refused_by_name() -> None:
    with pytest.raises(AdapterMismatch, match=r"lora1@1 \(lora\) has rank 2 at q, others have 3; kind 'rev"):
        compress(ingredients(3, 2), SITES, 1, "reversible")
    with pytest.raises(InvalidRecipe, match="basis would have rank 24, but at q at most 22 is possible"):
        compress(ingredients(3, 3), SITES, 7, "reversible")
