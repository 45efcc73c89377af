from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import VeraConfig, get_peft_model
from torch import Tensor, nn

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidConfig, InvalidTensors
from timbre_methods.program import Projected
from timbre_methods.registry import check_adapter, derive, method_for

pytestmark = pytest.mark.filterwarnings("ignore:Specified to not (save|load) p?vera_A and:UserWarning")

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Q_PROJ = "model.layers.0.self_attn.q_proj"

OPTIONS = {
    "saved": {"r": 6},
    "regenerated": {"r": 6, "save_projection": False},
    "another seed": {"r": 5, "save_projection": False, "projection_prng_key": 2**40 + 3},
    "one kind of layer": {"r": 3, "save_projection": False, "target_modules": ["k_proj"]},
    "with the head": {"r": 4, "save_projection": False, "target_modules": ["down_proj", "lm_head"]},
    "more rows than the layers have": {"r": 100, "save_projection": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_vera_gives_the_logits_of_peft(
    llama: nn.Module, agrees_with_peft: Callable[..., None], options: dict[str, Any]
) -> None:
    config = VeraConfig(**{"target_modules": LAYERS, **options})
    agrees_with_peft(llama, config, std=1.0, save_embedding_layers=False)


@pytest.mark.parametrize("is_saved", [True, False])
def test_vera_on_conv1d_gives_the_logits_of_peft(
    gpt2: nn.Module, agrees_with_peft: Callable[..., None], is_saved: bool
) -> None:
    modules = ["c_attn", "c_proj", "c_fc"]
    config = VeraConfig(r=4, target_modules=modules, fan_in_fan_out=True, save_projection=is_saved)
    agrees_with_peft(gpt2, config, std=0.5)


def test_vera_on_a_bf16_base_is_as_near_as_peft(
    llama: nn.Module, agrees_in_bf16: Callable[..., None]
) -> None:
    agrees_in_bf16(llama, VeraConfig(r=6, target_modules=LAYERS), std=0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_regenerated_matrices_have_every_bit_of_pefts(
    dtype: torch.dtype, llama: nn.Module, evaluate: Any, quiet: Callable[..., Any]
) -> None:
    base = copy.deepcopy(llama).to(dtype)
    config = VeraConfig(r=6, target_modules=LAYERS, save_projection=False, projection_prng_key=9)
    with quiet():
        wrapped = get_peft_model(copy.deepcopy(base), config)
    sites = evaluate.linear_sites(base)
    chosen = {path: site for path, site in sites.items() if path != "lm_head"}
    raw = {"peft_type": "VERA", "r": 6, "projection_prng_key": 9, "save_projection": False}
    given = {}
    for path, site in chosen.items():
        given[f"base_model.model.{path}.vera_lambda_b"] = torch.ones(site.out_features)
        given[f"base_model.model.{path}.vera_lambda_d"] = torch.ones(6)
    method = method_for(raw)
    program = method.compile(method.parse(raw), given, sites)
    a_RI, b_OR = wrapped.base_model.vera_A["default"], wrapped.base_model.vera_B["default"]
    assert a_RI.shape == (6, 70)
    assert set(program.sites) == set(chosen)
    for path, (part,) in program.sites.items():
        site = chosen[path]
        assert torch.equal(part.basis.p_NPI[0], a_RI[:, : site.in_features].float())
        assert torch.equal(part.basis.q_NOQ[0], b_OR[: site.out_features].float())


RAW = {"peft_type": "VERA", "r": 2, "save_projection": False, "projection_prng_key": 4}
STEM = f"base_model.model.{Q_PROJ}"


def tensors(is_saved: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    given = {
        f"{STEM}.vera_lambda_b": torch.randn(6, generator=generator),
        f"{STEM}.vera_lambda_d": torch.randn(2, generator=generator),
    }
    if is_saved:
        given["base_model.vera_A"] = torch.randn(2, 5, generator=generator)
        given["base_model.vera_B"] = torch.randn(6, 2, generator=generator)
    return given


def compiled(raw: dict[str, Any], given: dict[str, Tensor], base: Site) -> Projected:
    method = method_for(raw)
    [part] = method.compile(method.parse(raw), given, {base.path: base}).sites[base.path]
    return part


def test_equal_adapters_share_their_basis_and_others_do_not(site: Callable[..., Site]) -> None:
    first = compiled(RAW, tensors(), site())
    assert compiled(RAW, tensors(), site()).basis is first.basis
    assert compiled({**RAW, "projection_prng_key": 5}, tensors(), site()).basis is not first.basis
    saved = compiled({**RAW, "save_projection": True}, tensors(is_saved=True), site())
    again = compiled({**RAW, "save_projection": True}, tensors(is_saved=True), site())
    assert again.basis is saved.basis


def test_layers_of_equal_width_share_one_matrix(llama: nn.Module, evaluate: Any) -> None:
    sites = evaluate.linear_sites(llama)
    paths = [f"model.layers.0.self_attn.{name}_proj" for name in "qk"]
    given = {}
    for path in paths:
        given[f"base_model.model.{path}.vera_lambda_b"] = torch.ones(sites[path].out_features)
        given[f"base_model.model.{path}.vera_lambda_d"] = torch.ones(2)
    method = method_for(RAW)
    program = method.compile(method.parse(RAW), given, sites)
    (q,), (k,) = (program.sites[path] for path in paths)
    assert q.basis.p_NPI is k.basis.p_NPI
    assert q.basis is not k.basis


def test_a_saved_projection_wins_over_the_seed(site: Callable[..., Site]) -> None:
    given = tensors(is_saved=True)
    for is_saved in (True, False):
        part = compiled({**RAW, "save_projection": is_saved}, given, site())
        assert torch.equal(part.basis.p_NPI[0], given["base_model.vera_A"])
        assert torch.equal(part.basis.q_NOQ[0], given["base_model.vera_B"])


def test_what_is_saved_is_not_rounded_to_the_base(site: Callable[..., Site]) -> None:
    base, given = site(), tensors(is_saved=True)
    rounded = Site(base.path, base.weight_OI.bfloat16(), None)
    part = compiled({**RAW, "save_projection": True}, given, rounded)
    assert torch.equal(part.basis.p_NPI[0], given["base_model.vera_A"])


def test_half_a_projection_is_refused(site: Callable[..., Site]) -> None:
    given = tensors(is_saved=True)
    del given["base_model.vera_B"]
    with pytest.raises(InvalidTensors, match=r"base_model\.vera_B is missing"):
        compiled(RAW, given, site())
    with pytest.raises(InvalidTensors, match=r"base_model\.vera_A is missing.*save_projection=true"):
        compiled({**RAW, "save_projection": True}, tensors(), site())


def test_a_draw_beyond_the_bound_is_refused_before_it_is_drawn() -> None:
    wide = Site("up", torch.empty(4, 2**17, device="meta"), None)
    given = {
        "base_model.model.up.vera_lambda_b": torch.ones(4),
        "base_model.model.up.vera_lambda_d": torch.ones(4096),
    }
    with pytest.raises(InvalidConfig, match=r"4096 x 131072 are not drawn.*save_projection=true"):
        compiled({**RAW, "r": 4096}, given, wide)


@pytest.mark.parametrize("is_saved", [True, False])
def test_nothing_is_derived(site: Callable[..., Site], is_saved: bool) -> None:
    base, raw = site(), {**RAW, "save_projection": is_saved}
    assert derive(raw, tensors(is_saved), {base.path: base}) == {}
    assert not check_adapter(raw, tensors(is_saved), {base.path: base}).derives


def test_a_file_that_peft_wrote_holds_what_is_read(
    llama: nn.Module, write_with_peft: Callable[..., Any], tmp_path: Path
) -> None:
    written = write_with_peft(llama, VeraConfig(r=3, target_modules=["q_proj"]))
    names = {name.split(".")[-1] for name in written.tensors}
    assert names == {"vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B"}
