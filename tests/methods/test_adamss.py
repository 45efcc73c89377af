from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import AdamssConfig
from torch import Tensor, nn

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidTensors, UnsupportedMethod
from timbre_methods.program import LowRank
from timbre_methods.registry import check_adapter, derive, method_for

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

OPTIONS = {
    "more rank inside the clusters than in N": {"r": 6, "num_subspaces": 4, "subspace_rank": 3},
    "less rank inside the clusters than in N": {"r": 20, "num_subspaces": 3, "subspace_rank": 2},
    "a rank that no layer has": {"r": 100},
    "another seed": {"r": 8, "random_seed": 5},
    "one cluster": {"r": 8, "num_subspaces": 1},
    "as many clusters as rows": {"r": 8, "num_subspaces": 30, "target_modules": ["k_proj"]},
    "ranks by threshold": {"r": 12, "subspace_rank": 4, "use_dynamic_rank": True, "svd_threshold": 0.3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_adamss_gives_the_logits_of_peft(
    llama: nn.Module, agrees_with_peft: Callable[..., None], options: dict[str, Any]
) -> None:
    agrees_with_peft(llama, AdamssConfig(**{"target_modules": LAYERS, **options}))


def test_adamss_on_a_bf16_base_is_as_near_as_peft(
    llama: nn.Module, agrees_in_bf16: Callable[..., None]
) -> None:
    agrees_in_bf16(llama, AdamssConfig(r=8, target_modules=LAYERS), std=0.1)


RAW = {"peft_type": "ADAMSS", "r": 2, "num_subspaces": 2, "subspace_rank": 1}
STEM = "base_model.model.model.layers.0.self_attn.q_proj.adamss"


@pytest.fixture
def base() -> Site:
    """Rows 0, 2 and 5 are far from the other three, whose cluster is the one or the other."""
    weight_OI = torch.tensor([[9.0, 0, 0], [0, 4, 0], [9, 0, 0.1], [0, 4, 0.1], [0, 4.2, 0], [9.1, 0.1, 0]])
    return Site("model.layers.0.self_attn.q_proj", weight_OI, torch.zeros(6))


def tensors(sizes: tuple[int, int] = (3, 3)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = {"newB": (2, 4), "A.0": (1, 2), "A.1": (1, 2), "B.0": (sizes[0], 1), "B.1": (sizes[1], 1)}
    return {f"{STEM}_{key}": torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def test_rows_that_are_alike_are_a_cluster_and_the_last_column_is_a_bias(base: Site, evaluate: Any) -> None:
    sites, given, method = {base.path: base}, tensors(), method_for(RAW)
    check_adapter(RAW, given, sites)
    derived = derive(RAW, given, sites)
    (rows_O,) = derived.values()
    assert sorted([rows_O[:3].tolist(), rows_O[3:].tolist()]) == [[0, 2, 5], [1, 3, 4]]
    parts = method.compile(method.parse(RAW), {**given, **derived}, sites).sites[base.path]
    x_I = torch.tensor([1.0, -2.0, 0.5])
    z_R = given[f"{STEM}_newB"] @ torch.cat([x_I, torch.ones(1)])
    expected_O = base.weight_OI @ x_I
    for number, rows in enumerate((rows_O[:3], rows_O[3:])):
        expected_O[rows] += given[f"{STEM}_B.{number}"] @ (given[f"{STEM}_A.{number}"] @ z_R)
    torch.testing.assert_close(evaluate.run_parts(base, parts, x_I.unsqueeze(0))[0], expected_O)


def test_the_inner_size_is_the_smaller_of_two(base: Site) -> None:
    sites, given, method = {base.path: base}, tensors(), method_for(RAW)
    given[f"{STEM}_newB"] = torch.randn(4, 4)
    given |= {f"{STEM}_A.{n}": torch.randn(1, 4) for n in (0, 1)}
    raw = {**RAW, "r": 4}
    whole = {**given, **derive(raw, given, sites)}
    factors, _ = method.compile(method.parse(raw), whole, sites).sites[base.path]
    assert isinstance(factors, LowRank)
    assert factors.a_RI.shape == (2, 3)


def test_clusters_of_other_sizes_are_refused(base: Site) -> None:
    sites, given = {base.path: base}, tensors((4, 2))
    check_adapter(RAW, given, sites)
    with pytest.raises(InvalidTensors, match=r"found clusters of \[4, 2\] rows, expected \[3, 3\]"):
        derive(RAW, given, sites)
    with pytest.raises(InvalidTensors, match="found 7 rows in all clusters, expected 6"):
        check_adapter(RAW, tensors((4, 3)), sites)


def test_surplus_clusters_and_ranks_are_refused(base: Site) -> None:
    sites, given = {base.path: base}, tensors()
    with pytest.raises(InvalidTensors, match=r"adamss_A\.2' is surplus"):
        check_adapter(RAW, {**given, f"{STEM}_A.2": torch.ones(1, 2)}, sites)
    with pytest.raises(InvalidTensors, match=r"A\.1: found rank 2, the config says at most 1"):
        check_adapter(RAW, {**given, f"{STEM}_A.1": torch.ones(2, 2)}, sites)


def test_without_scikit_learn_the_upload_is_refused_by_name(
    base: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(
        UnsupportedMethod, match=r"ADAMSS: .* scikit-learn, .* pip install 'timbre\[adamss\]'"
    ):
        check_adapter(RAW, tensors(), {base.path: base})
