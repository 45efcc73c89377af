"""Adapters bound into one mixture of experts: as the exporter binds them, and by the formula."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save
from torch import Tensor

from timbre_client.export.mixtures import arrow
from timbre_methods.contract import Site
from timbre_methods.errors import AdapterMismatch, InvalidRecipe, MethodError
from timbre_methods.merging import bind
from timbre_methods.merging.bind import ArrowChoice, RouterChoice, bind_arrow, bind_routed
from timbre_methods.merging.changes import Ingredient
from timbre_methods.merging.lora_file import AdapterFile
from timbre_methods.program import AdapterProgram, Dense, LowRank
from timbre_methods.registry import check_adapter, compile_adapter, derive
from timbre_methods.site_tensors import PREFIX

Q, K, DOWN = "layers.0.attn.q", "layers.0.attn.k", "layers.0.mlp.down"
SITES = {
    path: Site(path, torch.randn(shape, generator=torch.Generator().manual_seed(number)), None)
    for number, (path, shape) in enumerate(((Q, (9, 7)), (K, (5, 7)), (DOWN, (7, 11))))
}
BOTH = (Q, DOWN)


def tensors_of(paths: Sequence[str], rank: int, seed: int) -> dict[str, Tensor]:
    generator, found = torch.Generator().manual_seed(seed), {}
    for path in paths:
        site = SITES[path]
        found[f"{PREFIX}{path}.lora_A.weight"] = torch.randn(rank, site.in_features, generator=generator)
        found[f"{PREFIX}{path}.lora_B.weight"] = torch.randn(site.out_features, rank, generator=generator)
    return found


def lora(
    seed: int, rank: int = 2, alpha: float = 3, paths: Sequence[str] = BOTH, weight: float = 1, **more: Any
) -> Ingredient:
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, **more}
    program = compile_adapter(config, tensors_of(paths, rank, seed), SITES)
    return Ingredient(f"lora{seed}@1", "lora", program, weight, config)


def compiled(config: dict[str, Any], tensors: dict[str, Tensor]) -> AdapterProgram:
    check_adapter(config, tensors, SITES)
    return compile_adapter(config, {**tensors, **derive(config, tensors, SITES)}, SITES)


def rows(path: str) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(20, SITES[path].in_features, dtype=torch.float64, generator=generator)


def outputs(evaluate: Any, program: AdapterProgram) -> dict[str, Tensor]:
    return {path: evaluate.run_parts(SITES[path], parts, rows(path)) for path, parts in program.sites.items()}


@pytest.mark.parametrize("num_general", [0, 2])
def test_arrow_is_what_the_exporter_binds(evaluate: Any, tmp_path: Path, num_general: int) -> None:
    ranks = (2, 2, 2) if num_general else (2, 1, 3)
    alphas, seeds = (3, 5, 1, 4, 7)[: 3 + num_general], range(3 + num_general)
    together = [
        lora(seed, rank, alpha) for seed, rank, alpha in zip(seeds, (*ranks, 2, 2), alphas, strict=False)
    ]
    files = [tensors_of(BOTH, rank, seed) for seed, rank in zip(seeds, (*ranks, 2, 2), strict=False)]
    layers = {
        path: [tuple(file[f"{PREFIX}{path}.lora_{side}.weight"].numpy() for side in "AB") for file in files]
        for path in BOTH
    }
    folder = arrow(
        tmp_path,
        {path: pairs[:3] for path, pairs in layers.items()},
        {path: pairs[3:] for path, pairs in layers.items()} if num_general else None,
        scales=[alpha / rank for alpha, rank in zip(alphas, ranks, strict=False)],
        top_k=2,
        router_temperature=0.7,
    )
    exported = compiled(
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )

    file = bind_arrow(together[:3], together[3:], SITES, ArrowChoice(top_k=2, temperature=0.7))

    bound = outputs(evaluate, compiled(file.config, file.tensors))
    for path, expected in outputs(evaluate, exported).items():
        torch.testing.assert_close(bound[path], expected, rtol=1e-5, atol=1e-5)


def test_a_weight_multiplies_its_expert_and_leaves_the_choice(evaluate: Any) -> None:
    def found(weight: float) -> Tensor:
        file = bind_arrow([lora(1, weight=weight), lora(2)], [], SITES, ArrowChoice(1, 1.0))
        return (
            outputs(evaluate, compiled(file.config, file.tensors))[Q]
            - rows(Q) @ SITES[Q].weight_OI.double().T
        )

    plain, double, triple = found(1.0), found(2.0), found(3.0)
    is_first = (double != plain).any(dim=1)
    assert 0 < int(is_first.sum()) < 20
    for weight, weighted in ((2, double), (3, triple)):
        expected = torch.where(is_first.unsqueeze(1), weight * plain, plain)
        torch.testing.assert_close(weighted, expected, atol=1e-6, rtol=1e-6)


def test_an_adapter_does_nothing_at_a_layer_that_it_does_not_adapt(evaluate: Any) -> None:
    one, other = lora(1, paths=(Q, K)), lora(2, rank=3, paths=(K, DOWN))
    file = bind_arrow([one, other], [], SITES, ArrowChoice(1, 1.0))
    program = compiled(file.config, file.tensors)
    assert list(program.sites) == [Q, K, DOWN]
    (part,) = one.program.sites[Q]
    expected = evaluate.run_parts(SITES[Q], (part,), rows(Q))
    torch.testing.assert_close(outputs(evaluate, program)[Q], expected, atol=1e-6, rtol=1e-6)


def router(*names: str, num_experts: int = 3, bias: Sequence[str] = ()) -> dict[str, Tensor]:
    """Of these modules, each as wide as the first layer below it."""
    generator, found = torch.Generator().manual_seed(9), {}
    for name in names:
        width = next(site.in_features for path, site in SITES.items() if path.startswith(name))
        stem = f"{name}." if name else ""
        found[f"{stem}router.weight"] = torch.randn(num_experts, width, generator=generator)
        if name in bias:
            found[f"{stem}router.bias"] = torch.randn(num_experts, generator=generator)
    return found


@pytest.mark.parametrize("renormalised", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_a_trained_router_mixes_as_its_formula_says(evaluate: Any, top_k: int, renormalised: bool) -> None:
    experts = [lora(1, weight=0.5), lora(2, rank=3, alpha=1), lora(3, use_rslora=True, paths=(Q,))]
    given = router("layers.0.attn", DOWN, bias=["layers.0.attn"])
    file = bind_routed(experts, given, SITES, RouterChoice(top_k, renormalised))
    actual = outputs(evaluate, compiled(file.config, file.tensors))
    for path, owner in ((Q, "layers.0.attn"), (DOWN, DOWN)):
        weight = given[f"{owner}.router.weight"].double()
        bias = given.get(f"{owner}.router.bias", torch.zeros(3)).tolist()
        for x, y in zip(rows(path), actual[path], strict=True):
            shares = [math.exp(float(row @ x) + c) for row, c in zip(weight, bias, strict=True)]
            kept = sorted(range(3), key=lambda e: -shares[e])[:top_k]
            total = sum(shares[e] for e in (kept if renormalised else range(3)))
            expected = SITES[path].weight_OI.double() @ x
            for e in kept:
                for part in experts[e].program.sites.get(path, ()):
                    assert isinstance(part, LowRank)
                    change = part.b_OR.double() @ (part.a_RI.double() @ x)
                    expected = expected + experts[e].weight * shares[e] / total * change
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_a_layer_s_router_is_the_nearest() -> None:
    def bound(given: dict[str, Tensor]) -> AdapterFile:
        experts = [lora(e, paths=(Q, K)) for e in range(3)]
        file = bind_routed(experts, given, SITES, RouterChoice(1, True))
        check_adapter(file.config, load(save(file.tensors)), SITES)
        return file

    bound(router(""))
    bound(router("", bias=[""]))
    given = router("", Q)
    file = bound(given)
    assert torch.equal(file.tensors[f"{PREFIX}{Q}.router.weight"], given[f"{Q}.router.weight"])
    assert torch.equal(file.tensors[f"{PREFIX}{K}.router.weight"], given["router.weight"])


ROUTERS: list[tuple[Mapping[str, Tensor], str]] = [
    (router("layers.0.attn"), rf"no router for {DOWN}, which the adapters change; give it '{DOWN}.router.w"),
    (router(""), rf"router\.weight: found shape \[3, 7\], expected \[3, 11\]: .* input of {DOWN}"),
    (router(*BOTH, num_experts=2), rf"{Q}\.router\.weight: found shape \[2, 7\], expected \[3, 7\]: a row"),
    (router(*BOTH) | {"layers.7.router.weight": torch.ones(3, 7)}, r"layers\.7\.router\.weight, but this"),
    (router(*BOTH, K), rf"{K}\.router\.weight, but none of the adapters changes a layer there"),
    (router(*BOTH, "layers.0"), r"has layers\.0\.router\.weight, but each layer below has a nearer router"),
    (router(*BOTH) | {"gate.weight": torch.ones(3, 7)}, r"has 'gate\.weight'; expected 'router\.weight'"),
    (router(*BOTH) | {"router.bias": torch.ones(3)}, r"has router\.bias, but no router\.weight"),
    (router(*BOTH) | {f"{Q}.router.bias": torch.ones(2)}, r"router\.bias: found shape \[2\], expected \[3\]"),
    (router(Q) | {f"{DOWN}.router.weight": torch.ones(3, 11, dtype=torch.int64)}, r"found dtype int64"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "words"), ROUTERS, ids=lambda each: str(each)[:40])
def test_a_router_that_does_not_fit_is_told_where(given: dict[str, Tensor], words: str) -> None:
    with pytest.raises(InvalidRecipe, match=words):
        bind_routed([lora(e) for e in range(3)], given, SITES, RouterChoice(1, True))


NO_FACTORS = Ingredient("odd@1", "shira", AdapterProgram({Q: (Dense(torch.ones(9, 7)),)}))
GENERAL: list[tuple[Ingredient, type[MethodError], str]] = [
    (lora(2, rank=3), AdapterMismatch, rf"at {Q} lora1@1 has rank 2 and lora2@1 has rank 3"),
    (lora(2, paths=(Q,)), AdapterMismatch, rf"lora2@1 does not adapt {DOWN}, as another does"),
    (lora(2, paths=(Q, K, DOWN)), AdapterMismatch, rf"lora1@1 does not adapt {K}, as another does"),
    (lora(2, alpha=0), AdapterMismatch, rf"lora2@1 has the scale 0 at {Q}"),
    (Ingredient("vera@1", "vera", lora(2).program), AdapterMismatch, r"vera@1 is of the method vera"),
]


@pytest.mark.parametrize(("general", "error", "words"), GENERAL, ids=lambda each: str(each)[:40])
def test_a_general_adapter_must_be_like_the_others(
    general: Ingredient, error: type[MethodError], words: str
) -> None:
    with pytest.raises(error, match=words):
        bind_arrow([lora(1)], [general], SITES, ArrowChoice(1, 1.0))


def test_what_is_no_low_rank_change_of_a_linear_layer_is_no_expert() -> None:
    with pytest.raises(AdapterMismatch, match=rf"odd@1 \(shira\) has no low-rank form at {Q}"):
        bind_arrow([lora(1), NO_FACTORS], [], SITES, ArrowChoice(1, 1.0))
    table = {"embed": Site("embed", torch.empty(4, 30), None, "embedding")}
    (part,) = lora(1).program.sites[Q]
    on_table = Ingredient("words@1", "lora", AdapterProgram({"embed": (part,)}))
    with pytest.raises(AdapterMismatch, match=r"words@1 \(lora\) adapts embed, and only linear layers"):
        bind_arrow([on_table], [], table, ArrowChoice(1, 1.0))
    large = Ingredient(
        "large@1", "lora", AdapterProgram({Q: (LowRank(torch.ones(2, 7), torch.full((9, 2), math.inf)),)})
    )
    with pytest.raises(InvalidRecipe, match=rf"at {Q} the adapters' values multiply to more"):
        bind_arrow([large], [], SITES, ArrowChoice(1, 1.0))


def test_an_expert_that_does_nothing_is_refused_by_name() -> None:
    with pytest.raises(InvalidRecipe, match="lora2@1 has the weight 0"):
        bind_arrow([lora(1), lora(2, weight=0)], [], SITES, ArrowChoice(1, 1.0))
    with pytest.raises(InvalidRecipe, match="nothing is left of lora1@1 once the general adapters are taken"):
        bind_arrow([lora(1), lora(2)], [lora(1)], SITES, ArrowChoice(1, 1.0))


def test_a_mixture_is_given_up_at_a_layer() -> None:
    def stopping() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        bind_arrow([lora(1)], [], SITES, ArrowChoice(1, 1.0), stopping)


def test_a_mixture_is_counted_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bind, "MAX_CELLS", 2 * 3 * (9 + 7 + 7 + 11))
    bind_arrow([lora(e) for e in range(3)], [], SITES, ArrowChoice(1, 1.0))
    for experts in ([lora(1), lora(2), lora(3, rank=3)], [lora(e) for e in range(4)]):
        with pytest.raises(InvalidRecipe, match="would have more than 204 numbers; bind fewer adapters"):
            bind_arrow(experts, [], SITES, ArrowChoice(1, 1.0))
