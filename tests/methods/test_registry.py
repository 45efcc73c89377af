from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch

from timbre_methods import registry
from timbre_methods.contract import Site
from timbre_methods.errors import AdapterMismatch, InvalidConfig, InvalidTensors, UnsupportedMethod
from timbre_methods.registry import derivations, inspect_adapter, method_for, methods

LORA = {"peft_type": "LORA", "r": 2}
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"
HEADER = {
    f"{Q_PROJ}.lora_A.weight": ("F32", [2, 5]),
    f"{Q_PROJ}.lora_B.weight": ("BF16", [6, 2]),
}


def test_the_four_first_families_are_found() -> None:
    assert {"fourierft", "ia3", "lora", "shira"} <= set(methods())
    assert list(methods()) == sorted(methods())


def test_the_methods_found_are_the_same_each_time_and_cannot_be_changed() -> None:
    assert methods() is methods()
    with pytest.raises(TypeError):
        methods()["stray"] = methods()["lora"]  # type: ignore[index]


def test_methods_that_derive_otherwise_than_once_are_told() -> None:
    assert derivations() == {"tinylora": 2, "unilora": 2}


def test_a_peft_type_is_looked_up_and_never_imported() -> None:
    sys.modules.pop("antigravity", None)
    for peft_type in ("antigravity", "timbre_methods.low_rank.lora", "lora", "LORA ", ""):
        with pytest.raises(UnsupportedMethod, match=r"the nearest of \d+ methods are \w+, "):
            method_for({"peft_type": peft_type})
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("peft_type", [None, 7, ["LORA"], {}])
def test_a_config_without_a_peft_type_is_refused(peft_type: object) -> None:
    with pytest.raises(InvalidConfig, match="peft_type: expected a string"):
        method_for({"peft_type": peft_type})
    with pytest.raises(InvalidConfig, match="peft_type"):
        method_for({"r": 8})


def test_a_variant_that_no_method_reads_is_named() -> None:
    with pytest.raises(UnsupportedMethod, match=r"'LORA' with 'arrow_config' on .*without it lora would"):
        method_for({**LORA, "arrow_config": {"top_k": 2}})


def test_a_config_of_endless_keys_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="at most 512"):
        method_for({**LORA, **{f"key{i}": None for i in range(600)}})


def test_two_claimants_are_a_fault_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    twice = {"lora": methods()["lora"], "twin": methods()["lora"]}
    monkeypatch.setattr(registry, "_readers", lambda: twice)
    with pytest.raises(RuntimeError, match="claim the same adapter"):
        method_for(LORA)


def test_an_inspection_counts_from_the_header_alone(site: Callable[..., Site]) -> None:
    inspection = inspect_adapter(LORA, HEADER, {site().path: site()})
    assert inspection.method == "lora"
    assert inspection.sites == ("model.layers.0.self_attn.q_proj",)
    assert inspection.parameters == 2 * 5 + 6 * 2
    assert inspection.prepared_bytes == 4 * (2 * 5 + 6 * 2)


def test_an_inspection_allocates_nothing(site: Callable[..., Site]) -> None:
    huge = Site(site().path, torch.empty(2**20, 2**20, device="meta"), None)
    header = {
        f"{Q_PROJ}.lora_A.weight": ("F32", [2, 2**20]),
        f"{Q_PROJ}.lora_B.weight": ("F32", [2**20, 2]),
    }
    assert inspect_adapter(LORA, header, {huge.path: huge}).prepared_bytes == 2 * 2 * 2**20 * 4


@pytest.mark.parametrize(
    ("entry", "problem"),
    [(("F8", [2, 5]), "dtype"), (("F32", [-2, 5]), "shape"), (("F32", [2**40, 2**40]), "shape")],
)
def test_an_impossible_header_is_refused(
    entry: tuple[str, list[int]], problem: str, site: Callable[..., Site]
) -> None:
    with pytest.raises(InvalidTensors, match=problem):
        inspect_adapter(LORA, {**HEADER, f"{Q_PROJ}.lora_A.weight": entry}, {site().path: site()})


def test_an_adapter_for_another_model_says_what_this_one_has(site: Callable[..., Site]) -> None:
    other = site(path="transformer.h.0.attn.c_attn")
    with pytest.raises(AdapterMismatch, match=r"no linear layer 'model\.layers.*it has transformer"):
        inspect_adapter(LORA, HEADER, {other.path: other})
    with pytest.raises(AdapterMismatch, match=r"below 'model\.layers\.0' it has mlp"):
        inspect_adapter(LORA, HEADER, {"model.layers.0.mlp.up_proj": site(path="model.layers.0.mlp.up_proj")})
