from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import UniLoraConfig, get_peft_model
from torch import Tensor, nn

from timbre_methods.contract import Site
from timbre_methods.errors import AdapterMismatch, InvalidConfig, InvalidTensors, UnsupportedMethod
from timbre_methods.registry import check_adapter, derive, method_for

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

OPTIONS = {
    "theta alone": {"r": 4},
    "saved": {"r": 4, "save_indices": True},
    "another seed and length": {"r": 3, "proj_seed": 7, "theta_d_length": 100},
    "a length that divides": {"r": 2, "theta_d_length": 32, "target_modules": ["o_proj"]},
    "more entries than places": {"r": 1, "theta_d_length": 500, "target_modules": ["0.self_attn.q_proj"]},
    "an expression": {"target_modules": r".*\.1\..*(q|down)_proj"},
    "chosen layers, saved": {"layers_to_transform": [1], "save_indices": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_unilora_gives_the_logits_of_peft(
    llama: nn.Module, agrees_with_peft: Callable[..., None], options: dict[str, Any]
) -> None:
    agrees_with_peft(llama, UniLoraConfig(**{"target_modules": LAYERS, **options}), std=3.0)


@pytest.mark.parametrize(
    "saved_whole",
    [
        ["k_proj"],
        ["self_attn.k_proj", "lm_head"],
        ["model.layers.0"],
        ["0.self.attn.k_proj"],
        ["mlp"],
    ],
    ids=str,
)
@pytest.mark.parametrize("save_indices", [False, True])
def test_modules_that_are_saved_whole_have_no_indices(
    llama: nn.Module, quiet: Callable[..., Any], saved_whole: list[str], save_indices: bool, evaluate: Any
) -> None:
    config = UniLoraConfig(
        target_modules=["q_proj", "k_proj"], modules_to_save=saved_whole, save_indices=save_indices
    )
    with quiet():
        wrapped = get_peft_model(copy.deepcopy(llama), config)
    expected = {
        name.removeprefix("base_model.model."): module.unilora_indices_A["default"]
        for name, module in wrapped.named_modules()
        if hasattr(module, "unilora_indices_A")
    }
    raw = {"peft_type": "UNILORA", "target_modules": ["q_proj", "k_proj"], "modules_to_save": saved_whole}
    given = {"base_model.unilora_theta_d": torch.zeros(256)}
    method, sites = method_for(raw), evaluate.linear_sites(llama)
    derived = method.derive(method.parse(raw), given, sites)
    indices = {name.split(".", 1)[1]: t.long() for name, t in derived.items() if "indices_A" in name}
    assert indices.keys() == {f"{path}.unilora_indices_A" for path in expected}
    assert all(torch.equal(indices[f"{path}.unilora_indices_A"], wanted) for path, wanted in expected.items())


@pytest.mark.parametrize("save_indices", [False, True])
def test_unilora_beside_a_layer_that_is_saved_whole_gives_the_logits_of_peft(
    llama: nn.Module, agrees_with_peft: Callable[..., None], save_indices: bool
) -> None:
    config = UniLoraConfig(
        target_modules=["q_proj", "k_proj"], modules_to_save=["k_proj"], save_indices=save_indices
    )
    agrees_with_peft(llama, config, std=1.0)


@pytest.mark.parametrize("name", ["(a+)+", "q" * 513, "a|b"])
def test_a_name_of_a_saved_module_that_is_no_name_is_refused(name: str, site: Callable[..., Site]) -> None:
    with pytest.raises(InvalidConfig, match="modules_to_save: found"):
        check_adapter({**RAW, "modules_to_save": [name]}, THETA, {site().path: site()})


@pytest.mark.parametrize("is_saved", [True, False])
def test_unilora_on_conv1d_gives_the_logits_of_peft(
    gpt2: nn.Module, agrees_with_peft: Callable[..., None], is_saved: bool
) -> None:
    modules = ["c_attn", "c_proj", "c_fc"]
    config = UniLoraConfig(target_modules=modules, fan_in_fan_out=True, save_indices=is_saved)
    agrees_with_peft(gpt2, config, std=3.0)


def test_unilora_on_a_bf16_base_is_as_near_as_peft(
    llama: nn.Module, agrees_in_bf16: Callable[..., None]
) -> None:
    agrees_in_bf16(llama, UniLoraConfig(target_modules=LAYERS), std=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_derived_has_every_bit_of_pefts(
    dtype: torch.dtype, llama: nn.Module, evaluate: Any, quiet: Callable[..., Any]
) -> None:
    base = copy.deepcopy(llama).to(dtype)
    with quiet():
        wrapped = get_peft_model(copy.deepcopy(base), UniLoraConfig(target_modules=LAYERS))
    raw = {"peft_type": "UNILORA", "target_modules": LAYERS}
    theta_D = torch.randn(256, generator=torch.Generator().manual_seed(1))
    given = {"base_model.unilora_theta_d": theta_D}
    sites = evaluate.linear_sites(base)
    derived = derive(raw, given, sites)
    method = method_for(raw)
    program = method.compile(method.parse(raw), {**given, **derived}, sites)
    assert len(program.sites) == 14
    for path, (part,) in program.sites.items():
        layer = wrapped.base_model.model.get_submodule(path)
        for side, factor in (("A", part.a_RI), ("B", part.b_OR)):
            indices = getattr(layer, f"unilora_indices_{side}")["default"]
            scales = getattr(layer, f"unilora_scales_{side}")["default"]
            assert torch.equal(derived[f"derived.{path}.unilora_indices_{side}"].long(), indices)
            assert torch.equal(factor, theta_D[indices] * scales.float())


PATH = "model.layers.0.self_attn.q_proj"
STEM = f"base_model.model.{PATH}"
RAW = {"peft_type": "UNILORA", "r": 2, "theta_d_length": 3, "target_modules": ["q_proj"]}
THETA = {"base_model.unilora_theta_d": torch.tensor([1.0, 2.0, 4.0])}


def saved() -> dict[str, Tensor]:
    return {
        **THETA,
        f"{STEM}.unilora_indices_A": torch.tensor([[0, 1, 2, 0, 1], [2, 2, 2, 2, 2]]),
        f"{STEM}.unilora_indices_B": torch.zeros(6, 2, dtype=torch.int64),
        f"{STEM}.unilora_scales_A": torch.full((2, 5), 0.5),
        f"{STEM}.unilora_scales_B": torch.ones(6, 2),
    }


@pytest.mark.parametrize("save_indices", [True, False])
def test_saved_indices_win_over_the_seed(save_indices: bool, site: Callable[..., Site]) -> None:
    base, raw = site(), {**RAW, "save_indices": save_indices}
    assert derive(raw, saved(), {base.path: base}) == {}
    method = method_for(raw)
    [part] = method.compile(method.parse(raw), saved(), {base.path: base}).sites[base.path]
    assert part.a_RI.tolist() == [[0.5, 1.0, 2.0, 0.5, 1.0], [2.0] * 5]
    assert part.b_OR.tolist() == [[1.0, 1.0]] * 6


@pytest.mark.parametrize("index", [-1, 3])
def test_an_index_out_of_range_is_refused(index: int, site: Callable[..., Site]) -> None:
    base, given = site(), saved()
    check_adapter(RAW, given, {base.path: base})
    given[f"{STEM}.unilora_indices_A"][1, 2] = index
    with pytest.raises(InvalidTensors, match=r"unilora_indices_A: found indices .*expected 0 to 2"):
        check_adapter(RAW, given, {base.path: base})


def test_a_list_names_whole_paths_or_their_ends(site: Callable[..., Site]) -> None:
    base = site()
    for names, is_found in (([PATH], True), (["self_attn.q_proj"], True), (["proj"], False)):
        raw = {**RAW, "target_modules": names}
        if is_found:
            assert check_adapter(raw, THETA, {base.path: base}).sites == (base.path,)
        else:
            with pytest.raises(AdapterMismatch, match="no linear layer that target_modules names"):
                check_adapter(raw, THETA, {base.path: base})


def test_layers_that_nothing_names_are_refused(site: Callable[..., Site]) -> None:
    base = site()
    with pytest.raises(InvalidConfig, match="target_modules: expected names"):
        check_adapter({**RAW, "target_modules": None}, THETA, {base.path: base})
    with pytest.raises(InvalidConfig, match=r"target_modules: .*inside"):
        check_adapter({**RAW, "target_modules": "(a+)+"}, THETA, {base.path: base})
    with pytest.raises(UnsupportedMethod, match=r"'layers_to_transform' .*save_indices=true"):
        method_for(RAW).parse({**RAW, "layers_to_transform": 1})


def test_more_indices_than_the_bound_are_refused() -> None:
    wide = Site("q_proj", torch.empty(2**17, 2**17, device="meta"), None)
    with pytest.raises(InvalidConfig, match=r"are not dealt out.*save_indices=true"):
        check_adapter({**RAW, "r": 4096}, THETA, {wide.path: wide})
