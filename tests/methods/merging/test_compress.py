"""Collections in one basis, against exact recovery, independent optima and the adapters themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from timbre_methods.contract import Site
from timbre_methods.errors import AdapterMismatch, InvalidRecipe
from timbre_methods.merging.changes import Ingredient
from timbre_methods.merging.compress import Compressed, compress
from timbre_methods.merging.joint_basis import Form, joint_basis
from timbre_methods.program import AdapterProgram, Dense, LowRank, Part, Projected
from timbre_methods.registry import check_adapter, compile_adapter

SHAPE = (14, 11)
SITES = {path: Site(path, torch.empty(SHAPE, device="meta"), None) for path in ("q", "v")}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loras(count: int = 5, rank: int = 2) -> list[tuple[Tensor, Tensor]]:
    """Independent ones, of very different sizes."""
    return [
        (10.0**k * random(rank, SHAPE[1], seed=2 * k), random(SHAPE[0], rank, seed=2 * k + 1))
        for k in range(count)
    ]


def in_one_basis(count: int, rank: int, form: Form) -> list[tuple[Tensor, Tensor]]:
    """LoRAs that have a basis of this rank in common."""
    b, a = random(SHAPE[0], rank, seed=1), random(rank, SHAPE[1], seed=2)
    cores = [random(rank, rank, seed=10 + k) for k in range(count)]
    if form == "diagonal":
        cores = [core.diagonal().diag() for core in cores]
    return [(core @ a, b) for core in cores]


def errors(pairs: list[tuple[Tensor, Tensor]], rank: int, form: Form) -> Tensor:
    """Relative errors of the changes as they come out, not as they are reported."""
    found = joint_basis(pairs, rank, form)
    reported = torch.tensor(found.left_out_K) / torch.tensor(found.whole_K)
    exact = []
    for (a, b), s_RR in zip(pairs, found.s_KRR, strict=True):
        delta, back = b.double() @ a.double(), found.b_OR.double() @ s_RR.double() @ found.a_RI.double()
        exact.append(float((delta - back).norm() / delta.norm()))
    torch.testing.assert_close(reported.sqrt(), torch.tensor(exact), atol=1e-5, rtol=1e-3)
    return torch.tensor(exact, dtype=torch.float64)


@pytest.mark.parametrize("form", ["full", "diagonal"])
def test_a_basis_that_there_is_is_found(form: Form) -> None:
    assert float(errors(in_one_basis(4, 3, form), 3, form).max()) < 1e-5
    assert float(errors(in_one_basis(4, 3, form), 2, form).max()) > 1e-2


def test_a_basis_as_wide_as_all_factors_is_exact_and_a_wider_one_is_filled_up() -> None:
    pairs = loras(3, 2)
    assert float(errors(pairs, 6, "full").max()) < 1e-5
    assert float(errors(pairs, 9, "full").max()) < 1e-5
    assert joint_basis(pairs, 9, "full").a_RI.shape == (9, SHAPE[1])


def test_one_adapter_alone_is_cut_as_well_as_possible() -> None:
    (pair,) = loras(1, 6)
    s = torch.linalg.svdvals(pair[1].double() @ pair[0].double())
    best = float((s[3:].square().sum() / s.square().sum()).sqrt())
    for form in ("full", "diagonal"):
        assert float(errors([pair], 3, form)) == pytest.approx(best, rel=1e-4)


def test_full_is_no_worse_than_any_basis_near_it_and_than_diagonal() -> None:
    pairs = loras()
    total = float(errors(pairs, 4, "full").square().sum())
    assert total <= float(errors(pairs, 4, "diagonal").square().sum()) + 1e-9
    found = joint_basis(pairs, 4, "full")
    deltas = [b.double() @ a.double() for a, b in pairs]
    for seed in range(20):
        u = torch.linalg.qr(found.b_OR.double() + 0.05 * random(SHAPE[0], 4, seed=seed).double()).Q
        v = torch.linalg.qr(found.a_RI.double().T + 0.05 * random(SHAPE[1], 4, seed=seed + 50).double()).Q
        near = [1 - float((u.T @ d @ v).square().sum() / d.square().sum()) for d in deltas]
        assert total <= sum(near) + 1e-9


def test_every_adapter_counts_alike_however_large() -> None:
    pairs = loras()
    scaled = [(a, b * 100.0 ** (k % 2)) for k, (a, b) in enumerate(pairs)]
    torch.testing.assert_close(errors(pairs, 4, "full"), errors(scaled, 4, "full"), atol=1e-5, rtol=1e-4)


def ingredients() -> list[Ingredient]:
    """Three; the second adapts one of the two sites."""
    programs: list[dict[str, tuple[Part, ...]]] = [
        {path: (LowRank(*pair),) for path, pair in zip(sites, loras(2, 2), strict=False)}
        for sites in (("q", "v"), ("v",), ("q", "v"))
    ]
    labels = ("one@1", "two@1", "three@1")
    return [
        Ingredient(label, "lora", AdapterProgram(program))
        for label, program in zip(labels, programs, strict=True)
    ]


def read_back(each: Compressed) -> AdapterProgram:
    check_adapter(each.file.config, each.file.tensors, SITES)
    return compile_adapter(each.file.config, each.file.tensors, SITES)


def test_members_are_adapters_that_share_one_basis_in_memory() -> None:
    found = compress(ingredients(), SITES, 4, "full").members
    programs = [read_back(each) for each in found]
    assert [list(program.sites) for program in programs] == [["q", "v"], ["v"], ["q", "v"]]
    parts = [program.sites["v"][0] for program in programs]
    assert all(isinstance(part, Projected) for part in parts)
    assert len({id(part.basis) for part in parts if isinstance(part, Projected)}) == 1
    assert programs[1].prepared_bytes == 4 * 4 * 4
    assert sum(programs[1].shared_bytes.values()) == 4 * 4 * sum(SHAPE)
    for each, own in zip(found, ingredients(), strict=True):
        whole = rest = 0.0
        for path, (part,) in own.program.sites.items():
            (core,) = read_back(each).sites[path]
            assert isinstance(part, LowRank)
            assert isinstance(core, Projected)
            delta = part.b_OR.double() @ part.a_RI.double()
            back = core.basis.q_NOQ[0].double() @ core.core.double() @ core.basis.p_NPI[0].double()
            whole += float(delta.square().sum())
            rest += float((delta - back).square().sum())
        assert each.relative_error == pytest.approx((rest / whole) ** 0.5, rel=1e-3, abs=1e-6)


def test_the_same_collection_gives_the_same_bytes() -> None:
    first, second = (compress(ingredients(), SITES, 3, "diagonal").members for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert one.file.config == other.file.config
        assert all(torch.equal(one.file.tensors[name], other.file.tensors[name]) for name in one.file.tensors)


def stopping() -> None:
    raise InterruptedError


def test_what_does_not_fit_is_named_before_anything_is_computed() -> None:
    dense = Ingredient("odd@1", "loha", AdapterProgram({"q": (Dense(torch.ones(SHAPE)),)}))
    with pytest.raises(AdapterMismatch, match=r"odd@1 \(loha\) has no low-rank form at q"):
        compress([*ingredients(), dense], SITES, 2, "full", stopping)
    with pytest.raises(InvalidRecipe, match="basis would have rank 12, but at q at most 11"):
        compress(ingredients(), SITES, 12, "full", stopping)
    table = {**SITES, "v": Site("v", torch.empty(SHAPE, device="meta"), None, "embedding")}
    with pytest.raises(AdapterMismatch, match=r"one@1 \(lora\) adapts v"):
        compress(ingredients(), table, 2, "full", stopping)
    many = [
        Ingredient(
            f"{n}@1", "lora", AdapterProgram({"q": (LowRank(torch.ones(99, 2048), torch.ones(2048, 99)),)})
        )
        for n in range(40)
    ]
    wide = {"q": Site("q", torch.empty(2048, 2048, device="meta"), None)}
    with pytest.raises(InvalidRecipe, match="at q 40 adapters of 3960 ranks together"):
        compress(many, wide, 2, "full", stopping)
    with pytest.raises(InterruptedError):
        compress(ingredients(), SITES, 2, "full", stopping)
