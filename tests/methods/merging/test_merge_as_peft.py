"""Merges of adapters that PEFT saved against PEFT's own ``add_weighted_adapter``."""

from __future__ import annotations

import copy
import warnings
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from torch import nn

from timbre_methods.contract import Site
from timbre_methods.merging.changes import Ingredient
from timbre_methods.merging.merge import MergeNumbers, merge
from timbre_methods.registry import compile_adapter

WEIGHTS = {"one": 0.7, "two": -0.4, "three": 1.3}
CONFIGS = {
    "one": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "two": {"r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"]},
    "three": {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
}


@pytest.fixture(scope="module")
def wrapped(llama: nn.Module) -> Any:
    """Three random LoRAs on the tiny model, in PEFT."""
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = None
        for name, options in CONFIGS.items():
            config = peft.LoraConfig(**options)
            if model is None:
                model = peft.get_peft_model(copy.deepcopy(llama), config, adapter_name=name)
            else:
                model.add_adapter(name, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape)
    return model


@pytest.fixture(scope="module")
def saved(wrapped: Any, evaluate: ModuleType) -> tuple[list[Ingredient], dict[str, Site]]:
    """The same adapters as PEFT saves them, compiled."""
    sites = evaluate.linear_sites(wrapped.get_base_model())
    sites = {path.replace(".base_layer", ""): each for path, each in sites.items() if "lora_" not in path}
    sites = {path: Site(path, each.weight_OI, each.bias_O) for path, each in sites.items()}
    found = []
    for name, weight in WEIGHTS.items():
        config = wrapped.peft_config[name].to_dict() | {"peft_type": "LORA", "task_type": None}
        config["target_modules"] = sorted(config["target_modules"])
        tensors = peft.get_peft_model_state_dict(wrapped, adapter_name=name)
        found.append(Ingredient(name, "lora", compile_adapter(config, tensors, sites), weight))
    return found, sites


@pytest.mark.parametrize(
    ("kind", "theirs", "density"),
    [
        ("svd", "svd", 1.0),
        ("ties", "ties_svd", 0.3),
        ("ties", "ties_svd", 1.0),
        ("magnitude_prune", "magnitude_prune_svd", 0.3),
        ("dare_linear", "dare_linear_svd", 0.3),
        ("dare_ties", "dare_ties_svd", 0.6),
    ],
)
def test_a_merge_is_peft_s(
    wrapped: Any,
    saved: tuple[list[Ingredient], dict[str, Site]],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    theirs: str,
    density: float,
) -> None:
    ingredients, sites = saved
    ours = merge(MergeNumbers(kind, rank=5, density=density, seed=17), ingredients, sites)
    program = compile_adapter(ours.file.config, ours.file.tensors, sites)
    generator, bernoulli = torch.Generator().manual_seed(17), torch.bernoulli
    # PEFT draws from the process's generator, after it has drawn new factors from it.
    monkeypatch.setattr(torch, "bernoulli", lambda input: bernoulli(input, generator=generator))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names, weights = list(WEIGHTS), list(WEIGHTS.values())
        wrapped.add_weighted_adapter(
            names, weights, "merged", combination_type=theirs, svd_rank=5, density=density
        )
    try:
        adapted = {
            name.removeprefix("base_model.model."): module
            for name, module in wrapped.named_modules()
            if hasattr(module, "lora_A") and "merged" in module.lora_A
        }
        assert len(adapted) == 6
        for path, module in adapted.items():
            expected = module.get_delta_weight("merged")
            assert expected.norm() > 0.5
            (part,) = program.sites[path]
            torch.testing.assert_close(part.b_OR @ part.a_RI, expected, atol=2e-5, rtol=1e-4)
    finally:
        wrapped.delete_adapter("merged")
