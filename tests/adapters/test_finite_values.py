"""What a load looks for: values that overflowed where they were multiplied, or rounded to bfloat16."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from timbre_methods.contract import Site
from timbre_methods.program import owned_tensors, shared_tensors
from timbre_server.adapters.loader import AdapterLoader, LoadedAdapter, _is_finite
from timbre_server.adapters.placement import Layout
from timbre_server.errors import AdapterLoadFailed
from timbre_server.inspection import inspector
from timbre_server.native.library import library
from timbre_store.limits import StoreLimits
from timbre_store.store import Store

BASE = "sha256:" + "a" * 64
SIZE = 64
SITES = {"q": Site("q", torch.ones(SIZE, SIZE), None)}
ROUNDED = Layout(torch.bfloat16, in_slices=True, in_panels=True)
LARGE = torch.full((), 3.4e38)
"""float32 holds it, and bfloat16 does not."""
OWN = "base_model.model.q."
ONES_VERA = {
    "base_model.vera_A": torch.ones(SIZE, SIZE),
    "base_model.vera_B": torch.ones(SIZE, SIZE),
    f"{OWN}vera_lambda_b": torch.ones(SIZE),
    f"{OWN}vera_lambda_d": torch.ones(SIZE),
}


def load(folder: Path, config: Mapping[str, object], tensors: Mapping[str, Tensor]) -> LoadedAdapter:
    """An upload, and the load of it where values are rounded that may be."""
    library()
    inspect = inspector(SITES, budget_bytes=1 << 20, derive=lambda *_: None)
    with Store(folder, inspect=inspect, limits=StoreLimits()) as store:
        with store.begin_upload() as upload:
            digests = []
            for content in (json.dumps({"target_modules": ["q"], **config}).encode(), save(dict(tensors))):
                with upload.begin_blob() as writer:
                    writer.write(content)
                    digests.append(writer.commit())
            digest = store.register("large", *digests, BASE).digest
        return AdapterLoader(store.root, BASE, SITES, groups=[["q"]], layout=ROUNDED).load(digest)


@pytest.mark.cpp
@pytest.mark.parametrize("side", ["vera_A", "vera_B"])
def test_a_basis_that_bfloat16_does_not_hold_is_refused_each_time(tmp_path: Path, side: str) -> None:
    config = {"peft_type": "VERA", "r": SIZE, "save_projection": True}
    too_large = {**ONES_VERA, f"base_model.{side}": torch.eye(SIZE) * LARGE}
    for number in range(2):
        with pytest.raises(AdapterLoadFailed, match="basis that it uses come to more than bfloat16 holds"):
            load(tmp_path / str(number), config, too_large)
    (part,) = load(tmp_path / "ones", config, ONES_VERA).program.sites["q"]
    assert {tensor.dtype for tensor in shared_tensors(part)} == {torch.bfloat16}


@pytest.mark.cpp
def test_a_basis_that_multiplies_to_more_than_float32_holds_is_refused(tmp_path: Path) -> None:
    tensors = {
        "base_model.lorta_A": torch.ones(SIZE, 2),
        "base_model.lorta_B": torch.full((2, SIZE // 4), 1e20),
        "base_model.lorta_C_h": torch.full((4, 2), 1e20),
        f"{OWN}lorta_c": torch.ones(2),
    }
    config = {"peft_type": "LORTA", "r": 2, "lora_alpha": 2, "num_heads": 4}
    with pytest.raises(AdapterLoadFailed, match="basis that it uses come to more than float32 holds"):
        load(tmp_path, config, tensors)


@pytest.mark.cpp
def test_a_dense_change_that_bfloat16_does_not_hold_is_refused(tmp_path: Path) -> None:
    tensors = {f"{OWN}hira_A": LARGE.expand(1, SIZE).clone(), f"{OWN}hira_B": torch.ones(SIZE, 1)}
    with pytest.raises(AdapterLoadFailed, match="at q its values come to more than bfloat16 holds"):
        load(tmp_path, {"peft_type": "HIRA", "r": 1}, tensors)


@pytest.mark.cpp
@pytest.mark.parametrize(
    ("config", "tensors"),
    [
        (
            {"peft_type": "LORA", "r": 1, "lora_alpha": 1},
            {f"{OWN}lora_A.weight": LARGE.expand(1, SIZE), f"{OWN}lora_B.weight": LARGE.expand(SIZE, 1)},
        ),
        (
            {"peft_type": "SHIRA", "r": 1},
            {
                f"{OWN}shira_weight": LARGE.expand(SIZE),
                f"{OWN}shira_indices": torch.arange(SIZE, dtype=torch.int32).expand(2, SIZE),
            },
        ),
        (
            {"peft_type": "ROAD", "variant": "road_1", "group_size": SIZE},
            {f"{OWN}road_theta": torch.zeros(SIZE // 2), f"{OWN}road_alpha": LARGE.expand(SIZE // 2)},
        ),
    ],
    ids=["factors", "sparse", "rotation"],
)
def test_what_bfloat16_does_not_hold_elsewhere_stays_as_it_is(
    tmp_path: Path, config: Mapping[str, object], tensors: Mapping[str, Tensor]
) -> None:
    loaded = load(tmp_path, config, {name: values.contiguous() for name, values in tensors.items()})
    (part,) = loaded.program.sites["q"]
    values = [tensor for tensor in owned_tensors(part) if tensor.is_floating_point()]
    assert {tensor.dtype for tensor in values} == {torch.float32}
    assert any(LARGE in tensor for tensor in values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [1.0, 3e38, math.inf, -math.inf, math.nan])
def test_values_that_overflow_are_found(value: float, dtype: torch.dtype) -> None:
    """Also beside others of their sign: their sum is too large, and they are not."""
    numbers = torch.tensor([0.5, value, value, -2.0], dtype=dtype)
    assert _is_finite(numbers) == math.isfinite(value)


def test_infinities_of_both_signs_are_found() -> None:
    assert not _is_finite(torch.tensor([math.inf, 1.0, -math.inf]))


def test_whole_numbers_and_factors_without_ranks_are_finite() -> None:
    assert _is_finite(torch.tensor([1, 2]))
    assert _is_finite(torch.empty(0, 8))
