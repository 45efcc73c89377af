"""Merges against their formulas, entry by entry, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from timbre_methods.contract import Site
from timbre_methods.errors import AdapterMismatch, InvalidRecipe, MethodError
from timbre_methods.merging import merge as merging
from timbre_methods.merging import task_vectors
from timbre_methods.merging.changes import Ingredient
from timbre_methods.merging.compress import compress
from timbre_methods.merging.merge import MERGE_KINDS, Merged, MergeNumbers, merge
from timbre_methods.program import AdapterProgram, Dense, Diagonal, LowRank, Part
from timbre_methods.registry import check_adapter, compile_adapter


def site(path: str = "q", out_features: int = 9, in_features: int = 7) -> Site:
    return Site(path, torch.empty(out_features, in_features, device="meta"), None)


def random_pair(rank: int, shape: tuple[int, int], seed: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    a_RI = torch.randn(rank, shape[1], generator=generator)
    return LowRank(a_RI, torch.randn(shape[0], rank, generator=generator))


def ingredient(*parts: Part, weight: float = 1.0, label: str = "pirate@1", path: str = "q") -> Ingredient:
    return Ingredient(label, "lora", AdapterProgram({path: parts}), weight)


def two(ranks: tuple[int, int] = (2, 3), weights: tuple[float, float] = (0.7, -0.4)) -> list[Ingredient]:
    pairs = zip(ranks, weights, ("one@1", "two@1"), strict=True)
    return [
        ingredient(random_pair(rank, (9, 7), seed), weight=weight, label=label)
        for seed, (rank, weight, label) in enumerate(pairs)
    ]


def delta_of(found: Merged, sites: Mapping[str, Site], path: str = "q") -> Tensor:
    """ΔW of the file, read back as any upload is."""
    check_adapter(found.file.config, found.file.tensors, sites)
    (part,) = compile_adapter(found.file.config, found.file.tensors, sites).sites[path]
    assert isinstance(part, LowRank)
    return part.b_OR.double() @ part.a_RI.double()


def whole(each: Ingredient) -> Tensor:
    (part,) = each.program.sites["q"]
    assert isinstance(part, LowRank)
    return part.b_OR.double() @ part.a_RI.double()


def literal_ties(deltas: list[Tensor], weights: list[float], density: float) -> Tensor:
    """Entry by entry, in Python's own numbers."""
    kept = []
    for delta in deltas:
        ordered = sorted((abs(value) for value in delta.flatten().tolist()), reverse=True)
        least = ordered[int(density * delta.numel()) - 1]
        kept.append([[value if abs(value) >= least else 0.0 for value in row] for row in delta.tolist()])
    rows, columns = deltas[0].shape
    out = torch.zeros(rows, columns, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            values = [each[row][column] for each in kept]
            sign = 1 if sum(values) >= 0 else -1
            agreeing = [w * v for w, v in zip(weights, values, strict=True) if v * sign > 0]
            out[row, column] = sum(agreeing) / max(1, len(agreeing))
    return out


def test_ties_is_its_formula_where_the_rank_suffices_and_says_what_a_small_rank_costs() -> None:
    sites, found = {"q": site()}, two()
    expected = literal_ties([whole(each) for each in found], [0.7, -0.4], 0.4)
    full = merge(MergeNumbers("ties", rank=7, density=0.4), found, sites)
    torch.testing.assert_close(delta_of(full, sites), expected, atol=1e-5, rtol=1e-5)
    assert full.relative_error < 1e-6
    cut = merge(MergeNumbers("ties", rank=2, density=0.4), found, sites)
    s = torch.linalg.svdvals(expected)
    best = float((s[2:].square().sum() / s.square().sum()).sqrt())
    assert cut.relative_error == pytest.approx(best, rel=1e-4)
    assert (delta_of(cut, sites) - expected).norm() / expected.norm() == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties"])
def test_dare_keeps_entries_whole_or_not_at_all(kind: str) -> None:
    sites = {"q": site()}
    found = [ingredient(random_pair(7, (9, 7), 5), weight=-0.5)]
    delta = delta_of(merge(MergeNumbers(kind, rank=7, density=0.25, seed=3), found, sites), sites)
    ratio = (delta / (-0.5 * whole(found[0]) / 0.25)).flatten()
    kept = (ratio - 1).abs() < 1e-3
    assert bool((kept | (ratio.abs() < 1e-3)).all())
    assert 0.05 < float(kept.double().mean()) < 0.5


def test_the_sum_s_svd_is_exact_where_the_rank_suffices() -> None:
    sites, found = {"q": site()}, two()
    expected = 0.7 * whole(found[0]) - 0.4 * whole(found[1])
    full = merge(MergeNumbers("svd", rank=5), found, sites)
    torch.testing.assert_close(delta_of(full, sites), expected, atol=1e-5, rtol=1e-5)
    assert full.relative_error < 1e-7
    own = merge(MergeNumbers("svd"), found, sites)
    assert own.rank == 3
    s = torch.linalg.svdvals(expected)
    assert own.relative_error == pytest.approx(
        float((s[3:].square().sum() / s.square().sum()).sqrt()), rel=1e-4
    )


def test_a_wide_site_is_cut_nearly_as_well_as_possible() -> None:
    generator = torch.Generator().manual_seed(1)
    sites = {"q": site("q", 1100, 1090)}
    u, v = (torch.linalg.qr(torch.randn(n, 60, generator=generator)).Q for n in (1100, 1090))
    delta = (u * torch.logspace(1, -1, 60)) @ v.T
    found = merge(MergeNumbers("svd", rank=20), [ingredient(Dense(delta))], sites)
    s = torch.logspace(1, -1, 60)
    best = float((s[20:].square().sum() / s.square().sum()).sqrt())
    assert found.relative_error == pytest.approx(best, rel=1e-3)


def test_lorahub_adds_the_factors_as_its_authors_do() -> None:
    sites, found = {"q": site()}, two(ranks=(3, 3))
    (one,), (other,) = (each.program.sites["q"] for each in found)
    merged = merge(MergeNumbers("lorahub"), found, sites)
    b = 0.7 * one.b_OR.double() - 0.4 * other.b_OR.double()
    a = 0.7 * one.a_RI.double() - 0.4 * other.a_RI.double()
    torch.testing.assert_close(delta_of(merged, sites), b @ a, atol=1e-5, rtol=1e-5)
    exact = 0.7 * whole(found[0]) - 0.4 * whole(found[1])
    assert merged.relative_error == pytest.approx(float((b @ a - exact).norm() / exact.norm()), rel=1e-5)


def test_lego_with_a_cluster_for_each_unit_is_the_scaled_sum() -> None:
    sites, found = {"q": site()}, two()
    merged = merge(MergeNumbers("lego", rank=5, seed=2), found, sites)
    exact = 0.7 * whole(found[0]) - 0.4 * whole(found[1])
    torch.testing.assert_close(delta_of(merged, sites), exact * math.sqrt(2.5 / 5), atol=1e-5, rtol=1e-5)


def test_lego_finds_the_units_that_belong_together_and_keeps_their_length() -> None:
    sites, base = {"q": site()}, random_pair(4, (9, 7), 8)
    order = torch.tensor([2, 0, 3, 1])
    noise = torch.Generator().manual_seed(4)
    near = [
        LowRank(
            base.a_RI[turn] + 0.01 * torch.randn(4, 7, generator=noise),
            base.b_OR[:, turn] + 0.01 * torch.randn(9, 4, generator=noise),
        )
        for turn in (torch.arange(4), order, order.flip(0))
    ]
    merged = merge(MergeNumbers("lego", rank=4, seed=9), [ingredient(part) for part in near], sites)
    expected = base.b_OR.double() @ base.a_RI.double()
    assert (delta_of(merged, sites) - expected).norm() < 0.02 * expected.norm()
    # Opposite units average to nothing in direction, and what is left has the members' mean length again.
    pair = random_pair(1, (9, 7), 1)
    far = LowRank(-0.5 * pair.a_RI, -0.5 * pair.b_OR)
    one = merge(MergeNumbers("lego", rank=1), [ingredient(pair), ingredient(far)], sites)
    length = float(torch.cat([pair.a_RI.flatten(), pair.b_OR.flatten()]).norm()) * 0.75
    found = torch.cat([tensor.flatten() for tensor in one.file.tensors.values()]).norm()
    assert float(found) == pytest.approx(length, rel=1e-5)


@pytest.mark.parametrize("kind", ["dare_linear", "dare_ties", "lego"])
def test_a_seed_gives_one_file_and_another_seed_another(kind: str) -> None:
    sites, found = {"q": site()}, two(ranks=(4, 5))

    def bytes_of(seed: int) -> list[list[float]]:
        torch.rand(3)  # What else the process draws is of no account.
        merged = merge(MergeNumbers(kind, rank=3, density=0.5, seed=seed), found, sites)
        return [tensor.flatten().tolist() for tensor in merged.file.tensors.values()]

    assert bytes_of(1) == bytes_of(1)
    assert any(bytes_of(1) != bytes_of(seed) for seed in (2, 3, 4))


def test_an_absent_adapter_takes_no_part_and_ranks_may_differ_by_site() -> None:
    sites = {path: site(path) for path in ("k", "q", "v")}
    one = Ingredient(
        "one", "lora", AdapterProgram({p: (random_pair(r, (9, 7), r),) for p, r in (("q", 2), ("v", 1))})
    )
    other = Ingredient("two", "lora", AdapterProgram({"k": (random_pair(3, (9, 7), 4),)}), 2.0)
    merged = merge(MergeNumbers("lorahub"), [one, other], sites)
    assert merged.file.config["target_modules"] == ["k", "q", "v"]
    (v,), (k,) = one.program.sites["v"], other.program.sites["k"]
    assert isinstance(v, LowRank)
    assert isinstance(k, LowRank)
    torch.testing.assert_close(delta_of(merged, sites, "v"), (v.b_OR @ v.a_RI).double(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        delta_of(merged, sites, "k"), 4 * (k.b_OR @ k.a_RI).double(), atol=1e-4, rtol=1e-4
    )


def stopping() -> None:
    raise InterruptedError


GAIN = Diagonal(side="output", gain=torch.full((9,), 1.5))
ON_META = Dense(torch.empty(9, 7, device="meta"))


WHOLE = Dense(torch.ones(9, 7))
OF_2, OF_3 = random_pair(2, (9, 7), 1), random_pair(3, (9, 7), 1)
REFUSED: list[tuple[MergeNumbers, Part, type[MethodError], str]] = [
    (MergeNumbers("ties", rank=8), OF_2, InvalidRecipe, r"rank is 8, but at q at most 7"),
    (MergeNumbers("lego", rank=6), OF_3, InvalidRecipe, r"rank is 6, but at q at most 5"),
    (MergeNumbers("lorahub"), OF_3, AdapterMismatch, r"at q good@1 has rank 2 and odd@1 has rank 3"),
    (MergeNumbers("svd"), WHOLE, InvalidRecipe, r"odd@1 \(lora\) has none of its own at q"),
    (MergeNumbers("lego", rank=1), WHOLE, AdapterMismatch, r"odd@1 \(lora\) has no low-rank form at q"),
    (MergeNumbers("lorahub"), WHOLE, AdapterMismatch, r"odd@1 \(lora\) has no low-rank form at q"),
    (MergeNumbers("ties", rank=1), GAIN, AdapterMismatch, r"odd@1 \(lora\) at q has a Diagonal part"),
    (MergeNumbers("ties", rank=1), ON_META, AdapterMismatch, r"odd@1 \(lora\) at q is made of the base's"),
]


@pytest.mark.parametrize(("numbers", "odd", "error", "words"), REFUSED, ids=lambda each: str(each)[:60])
def test_what_cannot_be_merged_is_named_before_anything_is_computed(
    numbers: MergeNumbers, odd: Part, error: type[MethodError], words: str
) -> None:
    good = ingredient(random_pair(2, (9, 7), 0), label="good@1")
    with pytest.raises(error, match=words):
        merge(numbers, [good, ingredient(odd, label="odd@1")], {"q": site()}, stopping)


@pytest.mark.parametrize("kind", MERGE_KINDS)
def test_what_acts_beside_weights_is_refused_by_every_kind(kind: str) -> None:
    part = random_pair(2, (9, 7), 0)
    waiting = Ingredient("wait@1", "alora", AdapterProgram({"q": (part,)}, invocation_tokens=(5,)))
    with pytest.raises(AdapterMismatch, match=r"wait@1 .alora. acts only from its invocation"):
        merge(MergeNumbers(kind), [ingredient(part), waiting], {"q": site()})
    norm = Site("q", torch.empty(9, device="meta"), None, "norm")
    with pytest.raises(AdapterMismatch, match="changes the norm q"):
        merge(MergeNumbers(kind), [ingredient(part)], {"q": norm})


def test_a_site_whose_changes_would_fill_the_memory_is_refused() -> None:
    wide = {"q": site("q", 2**15, 2**14)}
    found = [ingredient(random_pair(1, (2**15, 2**14), seed)) for seed in (0, 1)]
    with pytest.raises(InvalidRecipe, match="at q the changes of 2 adapters have 1073741824 numbers"):
        merge(MergeNumbers("ties", rank=1), found, wide, stopping)
    with pytest.raises(InterruptedError):
        merge(MergeNumbers("svd", rank=1), found, wide, stopping)


@pytest.mark.parametrize("kind", MERGE_KINDS)
def test_weights_of_nothing_make_no_adapter(kind: str) -> None:
    with pytest.raises(InvalidRecipe, match="nothing is left of the adapters"):
        merge(MergeNumbers(kind), two((2, 2), weights=(0.0, 0.0)), {"q": site()})


@pytest.mark.parametrize("kind", task_vectors.KINDS)
def test_a_density_that_keeps_no_value_makes_no_adapter(kind: str) -> None:
    with pytest.raises(InvalidRecipe, match="nothing is left of the adapters"):
        merge(MergeNumbers(kind, density=1e-9), two(), {"q": site()})


def test_no_more_is_made_than_can_be_held_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    sites = {"q": site()}
    monkeypatch.setattr(merging, "MAX_RESULT_CELLS", 5 * 16)
    merge(MergeNumbers("svd", rank=5), two(), sites)
    with pytest.raises(InvalidRecipe, match="the result would have 96 numbers, but at most 80"):
        merge(MergeNumbers("svd", rank=6), two(), sites, stopping)
    with pytest.raises(InvalidRecipe, match="at most 80"):
        compress(two(), sites, 3, "full", stopping)


def test_lego_compares_no_more_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    sites = {"q": site()}
    monkeypatch.setattr(merging, "MAX_DISTANCES", 5 * 3)
    merge(MergeNumbers("lego"), two(), sites)
    with pytest.raises(InvalidRecipe, match="at q 5 units of the adapters in 4 clusters are more"):
        merge(MergeNumbers("lego", rank=4), two(), sites, stopping)
