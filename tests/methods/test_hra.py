from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import HRAConfig
from torch import Tensor, nn

from timbre_methods.base_products import ROWS_AT_ONCE
from timbre_methods.contract import Site
from timbre_methods.errors import InvalidTensors
from timbre_methods.program import LowRank
from timbre_methods.registry import check_adapter, method_for

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

OPTIONS = {
    "chain": {"r": 4},
    "one reflection": {"r": 1},
    "long chain": {"r": 60},
    "orthonormal": {"r": 5, "apply_GS": True},
}


@pytest.mark.filterwarnings("ignore:The symmetric initialization can NOT be performed")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_hra_gives_the_logits_of_peft(
    llama: nn.Module, agrees_with_peft: Callable[..., None], options: dict[str, Any]
) -> None:
    agrees_with_peft(llama, HRAConfig(target_modules=LAYERS, **options))


def test_hra_on_a_bf16_base_is_as_near_as_peft(llama: nn.Module, agrees_in_bf16: Callable[..., None]) -> None:
    agrees_in_bf16(llama, HRAConfig(r=2, target_modules=["q_proj", "v_proj"]))


RAW: dict[str, Any] = {"peft_type": "HRA", "r": 2}
NAME = "base_model.model.model.layers.0.self_attn.q_proj.hra_u"


def compiled(u_IR: Tensor, base: Site, **options: object) -> LowRank:
    raw = {**RAW, "r": u_IR.shape[1], **options}
    method = method_for(raw)
    [part] = method.compile(method.parse(raw), {NAME: u_IR}, {base.path: base}).sites[base.path]
    return part


def test_two_equal_reflections_undo_each_other(site: Callable[..., Site]) -> None:
    base, u_I = site(), torch.tensor([3.0, 0, 4, 0, 0])
    part = compiled(torch.stack([u_I, 2 * u_I], dim=1), base)
    torch.testing.assert_close(part.b_OR @ part.a_RI, torch.zeros(6, 5), atol=1e-6, rtol=0)


def test_the_last_column_reflects_first(site: Callable[..., Site]) -> None:
    base = site(in_features=2)
    u_IR = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    first, second = torch.diag(torch.tensor([-1.0, 1.0])), torch.tensor([[0.0, -1.0], [-1.0, 0.0]])
    part = compiled(u_IR, base)
    torch.testing.assert_close(base.weight_OI + part.b_OR @ part.a_RI, base.weight_OI @ first @ second)


def test_the_weight_is_read_in_pieces_without_a_seam(site: Callable[..., Site]) -> None:
    base, u_IR = site(out_features=2 * ROWS_AT_ONCE + 3), torch.tensor([[1.0], [2], [0], [0], [2]])
    expected_O1 = -2 * base.weight_OI @ u_IR / 3
    torch.testing.assert_close(compiled(u_IR, base).b_OR, expected_O1)


def test_vectors_without_a_direction_are_refused(site: Callable[..., Site]) -> None:
    base, u_IR = site(), torch.eye(5)[:, :2]
    sites = {base.path: base}
    with pytest.raises(InvalidTensors, match=r"hra_u: found a column of zeros"):
        check_adapter(RAW, {NAME: u_IR * torch.tensor([1.0, 0.0])}, sites)
    pair_IR = u_IR[:, [0, 0]]
    check_adapter(RAW, {NAME: pair_IR}, sites)
    with pytest.raises(InvalidTensors, match=r"hra_u: found columns that depend on each other"):
        check_adapter({**RAW, "apply_GS": True}, {NAME: pair_IR}, sites)
    with pytest.raises(InvalidTensors, match=r"hra_u: found columns that depend on each other"):
        check_adapter({**RAW, "apply_GS": True, "r": 6}, {NAME: torch.ones(5, 6)}, sites)


def test_what_hra_does_not_have_is_refused(site: Callable[..., Site]) -> None:
    method, base = method_for(RAW), site()
    with pytest.raises(InvalidTensors, match=r"found shape \[5, 2\], expected \[5, 3\]"):
        method.compile(method.parse({**RAW, "r": 3}), {NAME: torch.ones(5, 2)}, {base.path: base})
