from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import RandLoraConfig, get_peft_model
from torch import Tensor, nn

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidTensors
from timbre_methods.program import Projected
from timbre_methods.registry import check_adapter, method_for

pytestmark = pytest.mark.filterwarnings(
    "ignore:Specified to not (save|load) (basis|randlora)_A and:UserWarning"
)

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

OPTIONS = {
    "saved": {"r": 8},
    "regenerated": {"r": 8, "save_projection": False},
    "rank that does not divide": {"r": 7, "save_projection": False, "projection_prng_key": 5},
    "one block": {"r": 60, "save_projection": False},
    "sparse": {"r": 8, "save_projection": False, "sparse": True},
    "very sparse": {"r": 8, "save_projection": False, "very_sparse": True},
    "both kinds of sparse": {"r": 8, "save_projection": False, "sparse": True, "very_sparse": True},
    "one tall layer": {"r": 8, "save_projection": False, "target_modules": ["down_proj"]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_randlora_gives_the_logits_of_peft(
    llama: nn.Module, agrees_with_peft: Callable[..., None], options: dict[str, Any]
) -> None:
    config = RandLoraConfig(**{"target_modules": LAYERS, "randlora_alpha": 2, **options})
    agrees_with_peft(llama, config, std=0.1)


@pytest.mark.parametrize("is_saved", [True, False])
def test_randlora_on_conv1d_gives_the_logits_of_peft(
    gpt2: nn.Module, agrees_with_peft: Callable[..., None], is_saved: bool
) -> None:
    modules = ["c_attn", "c_proj", "c_fc"]
    config = RandLoraConfig(
        r=10, randlora_alpha=2, target_modules=modules, fan_in_fan_out=True, save_projection=is_saved
    )
    agrees_with_peft(gpt2, config, std=0.1)


def test_randlora_on_a_bf16_base_is_as_near_as_peft(
    llama: nn.Module, agrees_in_bf16: Callable[..., None]
) -> None:
    agrees_in_bf16(llama, RandLoraConfig(r=8, randlora_alpha=2, target_modules=LAYERS), std=0.1)


@pytest.mark.parametrize("sparse", [None, "sparse", "very_sparse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_regenerated_matrices_have_every_bit_of_pefts(
    dtype: torch.dtype, sparse: str | None, llama: nn.Module, evaluate: Any, quiet: Callable[..., Any]
) -> None:
    base = copy.deepcopy(llama).to(dtype)
    options = {"r": 7, "projection_prng_key": 9, "save_projection": False}
    options |= {sparse: True} if sparse else {}
    with quiet():
        wrapped = get_peft_model(
            copy.deepcopy(base), RandLoraConfig(target_modules=["q_proj", "down_proj", "up_proj"], **options)
        )
    a, b = wrapped.base_model.randlora_A["default"], wrapped.base_model.randlora_B["default"]
    # The smaller of the largest out and the largest in, which are of different layers.
    assert a.shape == (7, 1, 70)
    assert b.shape == (70, 10, 7)

    raw = {"peft_type": "RANDLORA", **options}
    sites = {
        path: site
        for path, site in evaluate.linear_sites(base).items()
        if path.endswith(("0.self_attn.q_proj", "0.mlp.up_proj", "0.mlp.down_proj"))
    }
    given = {}
    for path in sites:
        given[f"base_model.model.{path}.randlora_lambda"] = torch.ones(7, 7)
        given[f"base_model.model.{path}.randlora_gamma"] = torch.ones(7, 48)
    method = method_for(raw)
    q, up, down = (part for [part] in method.compile(method.parse(raw), given, sites).sites.values())
    # Columns of the large matrix as the file has them, and where block n meets row j of A.
    small, flat = a[:, 0, :48].float(), b[:, :7].float().flatten(1)
    meets = torch.tensor([[j * 7 + n for j in range(7)] for n in range(7)])
    for part, high in ((q, 48), (up, 70)):
        assert torch.equal(part.basis.p_NPI[0], small)
        assert torch.equal(part.basis.q_NOQ, flat[:high][:, meets].transpose(0, 1))
    assert torch.equal(down.basis.q_NOQ[0], small.T)
    assert torch.equal(down.basis.p_NPI, flat[:, meets].permute(1, 2, 0))
    assert q.basis.p_NPI is up.basis.p_NPI


PATH = "model.layers.0.self_attn.q_proj"
STEM = f"base_model.model.{PATH}"
RAW = {"peft_type": "RANDLORA", "r": 2, "randlora_alpha": 3}


def tensors(site: Site) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    low, high = sorted(site.weight_OI.shape)
    num_blocks = math.ceil(low / 2)
    a, b = torch.randn(2, 1, low, generator=generator), torch.randn(high, num_blocks, 2, generator=generator)
    return {
        "base_model.randlora_A": a,
        "base_model.randlora_B": b,
        f"{STEM}.randlora_A": a.clone(),
        f"{STEM}.randlora_B": b.clone(),
        f"{STEM}.randlora_lambda": torch.randn(2, num_blocks, generator=generator),
        f"{STEM}.randlora_gamma": torch.randn(num_blocks, low, generator=generator),
    }


def compiled(given: dict[str, Tensor], base: Site) -> Projected:
    method = method_for(RAW)
    [part] = method.compile(method.parse(RAW), given, {base.path: base}).sites[base.path]
    return part


@pytest.mark.parametrize(("out_features", "in_features"), [(6, 5), (5, 5), (4, 7)])
def test_the_two_flattenings_differ_as_in_peft(
    out_features: int, in_features: int, site: Callable[..., Site], evaluate: Any
) -> None:
    """Row by row with plain loops: small rows in the order (j, n), columns of B in the order (n, j)."""
    base = site(out_features=out_features, in_features=in_features)
    given = tensors(base)
    low, high = sorted((out_features, in_features))
    num_blocks = math.ceil(low / 2)
    a, b = (given[f"base_model.randlora_{side}"].double() for side in "AB")
    small, big = [], []
    for j in range(2):
        for n in range(num_blocks):
            factor = given[f"{STEM}.randlora_lambda"][j, n] * given[f"{STEM}.randlora_gamma"][n]
            small.append(factor.double() * a[j, 0])
    for n in range(num_blocks):
        for j in range(2):
            big.append(b[:, n, j])
    delta_HL = 1.5 * sum(torch.outer(column, row) for column, row in zip(big, small, strict=True))
    delta_OI = delta_HL if out_features >= in_features else delta_HL.T
    assert delta_HL.shape == (high, low)
    x_TI = torch.randn(3, in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    actual = evaluate.projected(compiled(given, base), x_TI)
    torch.testing.assert_close(actual, x_TI @ delta_OI.T, rtol=1e-6, atol=1e-6)


def test_the_large_matrix_lies_as_the_operator_reads_it(site: Callable[..., Site]) -> None:
    wide, tall = site(out_features=6, in_features=5), site(out_features=5, in_features=6)
    assert compiled(tensors(wide), wide).basis.q_NOQ.transpose(0, 1).is_contiguous()
    assert compiled(tensors(tall), tall).basis.p_NPI.is_contiguous()


def test_equal_adapters_share_their_basis(site: Callable[..., Site]) -> None:
    base = site()
    assert compiled(tensors(base), base).basis is compiled(tensors(base), base).basis


def test_copies_that_layers_hold_may_be_left_out(site: Callable[..., Site]) -> None:
    base = site()
    given = tensors(base)
    with_copies = compiled(given, base)
    del given[f"{STEM}.randlora_A"], given[f"{STEM}.randlora_B"]
    check_adapter(RAW, given, {base.path: base})
    assert compiled(given, base).basis is with_copies.basis


def test_a_copy_that_is_another_matrix_is_refused(site: Callable[..., Site]) -> None:
    base = site()
    given = tensors(base)
    check_adapter(RAW, given, {base.path: base})
    given[f"{STEM}.randlora_B"] = given[f"{STEM}.randlora_B"] + 1
    with pytest.raises(InvalidTensors, match=r"q_proj\.randlora_B: found another matrix"):
        check_adapter(RAW, given, {base.path: base})


def test_matrices_that_are_drawn_need_nothing_derived(site: Callable[..., Site]) -> None:
    base, raw = site(), {**RAW, "save_projection": False}
    given = {name: t for name, t in tensors(base).items() if name.endswith(("lambda", "gamma"))}
    assert not check_adapter(raw, given, {base.path: base}).derives


def test_copies_without_the_matrices_themselves_are_refused(site: Callable[..., Site]) -> None:
    base = site()
    given = tensors(base)
    del given["base_model.randlora_A"], given["base_model.randlora_B"]
    with pytest.raises(InvalidTensors, match=r"base_model\.randlora_A is missing"):
        compiled(given, base)
    method = method_for(RAW)
    config = method.parse({**RAW, "save_projection": False})
    with pytest.raises(InvalidTensors, match=r"randlora_A is surplus"):
        method.compile(config, given, {base.path: base})
