from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import ShiraConfig
from torch import Tensor, nn

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidTensors
from timbre_methods.program import Sparse
from timbre_methods.registry import check_adapter, method_for
from timbre_methods.sparse.places import sparse_cells

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    "options", [{"r": 1}, {"r": 4, "random_seed": 9}, {"r": 2, "target_modules": ["k_proj"]}]
)
def test_shira_gives_the_logits_of_peft(
    llama: nn.Module, agrees_with_peft: Callable[..., None], options: dict[str, object]
) -> None:
    agrees_with_peft(llama, ShiraConfig(task_type="CAUSAL_LM", **{"target_modules": LAYERS, **options}))


def test_shira_on_a_bf16_base_is_as_near_as_peft(
    llama: nn.Module, agrees_in_bf16: Callable[..., None]
) -> None:
    agrees_in_bf16(llama, ShiraConfig(r=2, target_modules=LAYERS), std=0.1)


RAW = {"peft_type": "SHIRA", "r": 1}
STEM = "base_model.model.model.layers.0.self_attn.q_proj"


def tensors(places: list[tuple[float, float]], dtype: torch.dtype = torch.int32) -> dict[str, Tensor]:
    """Values 1, 2, 3, ... at these places of a 6 x 5 layer."""
    return {
        f"{STEM}.shira_weight": torch.arange(1.0, len(places) + 1),
        f"{STEM}.shira_indices": torch.tensor(places).T.to(dtype),
    }


def compiled(given: dict[str, Tensor], base: Site) -> Sparse:
    check_adapter(RAW, given, {base.path: base})
    method = method_for(RAW)
    (part,) = method.compile(method.parse(RAW), given, {base.path: base}).sites[base.path]
    return part


def test_places_become_rows(site: Callable[..., Site]) -> None:
    part = compiled(tensors([(0, 1), (0, 4), (3, 0), (5, 4)]), site())
    assert part.row_ends.tolist() == [0, 2, 2, 2, 3, 3, 4]
    assert part.columns_N.tolist() == [1, 4, 0, 4]
    assert part.values_N.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert (part.row_ends.dtype, part.columns_N.dtype) == (torch.int64, torch.int32)
    assert part.in_features == 5


def test_places_may_come_in_any_order(site: Callable[..., Site]) -> None:
    part = compiled(tensors([(5, 4), (0, 4), (3, 0), (0, 1)]), site())
    assert part.row_ends.tolist() == [0, 2, 2, 2, 3, 3, 4]
    assert part.columns_N.tolist() == [4, 1, 0, 4]
    assert part.values_N.tolist() == [2.0, 4.0, 3.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_indices_of_another_type_mean_the_same(dtype: torch.dtype, site: Callable[..., Site]) -> None:
    places: list[tuple[float, float]] = [(0, 1), (2, 3), (5, 4)]
    expected, actual = compiled(tensors(places), site()), compiled(tensors(places, dtype), site())
    assert torch.equal(actual.row_ends, expected.row_ends)
    assert torch.equal(actual.columns_N, expected.columns_N)


@pytest.mark.parametrize(
    ("places", "problem"),
    [
        ([(0, 1), (6, 0)], "found the row 6, expected 0 to 5"),
        ([(0, 1), (-1, 0)], "found the row -1, expected 0 to 5"),
        ([(0, 5), (1, 0)], "found the column 5, expected 0 to 4"),
        ([(0, -3), (1, 0)], "found the column -3, expected 0 to 4"),
        ([(0, 1), (4, 2), (3, 3), (4, 2)], r"found the place \(4, 2\) twice"),
    ],
)
def test_impossible_places_are_refused_by_value(
    places: list[tuple[float, float]], problem: str, site: Callable[..., Site]
) -> None:
    for dtype in (torch.int32, torch.float32):
        with pytest.raises(InvalidTensors, match=rf"shira_indices: {problem}"):
            compiled(tensors(places, dtype), site())


def test_a_broken_index_is_refused(site: Callable[..., Site]) -> None:
    with pytest.raises(InvalidTensors, match=r"found the index 2\.5, expected whole numbers"):
        compiled(tensors([(0, 1), (2.5, 3)], torch.float32), site())


def test_as_many_places_as_values_are_needed(site: Callable[..., Site]) -> None:
    given = tensors([(0, 1), (2, 3)])
    given[f"{STEM}.shira_weight"] = torch.ones(3)
    with pytest.raises(InvalidTensors, match=r"shira_indices: found shape \[2, 2\], expected \[2, 3\]"):
        compiled(given, site())


def test_the_masks_seed_is_of_no_account() -> None:
    raw = {**RAW, "r": "many", "random_seed": -3, "mask_type": "of my own"}
    assert method_for(raw).parse(raw) == method_for(RAW).parse(RAW)


def test_places_in_any_order_give_the_same_matrix() -> None:
    site = Site("q", torch.empty(6, 5, device="meta"), None)
    cells_N = torch.randperm(30, generator=torch.Generator().manual_seed(1))[:12]
    values_N = torch.arange(1.0, 13.0)
    order_N = cells_N.argsort()
    expected = torch.zeros(30).index_put((cells_N,), values_N).view(6, 5)
    for part in (
        sparse_cells(site, cells_N, values_N),
        sparse_cells(site, cells_N[order_N], values_N[order_N]),
    ):
        rows_N = torch.repeat_interleave(torch.arange(6), part.row_ends.diff())
        found = torch.zeros(6, 5).index_put((rows_N, part.columns_N.long()), part.values_N)
        assert torch.equal(found, expected)
