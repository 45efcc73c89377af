from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidTensors
from timbre_methods.registry import check_adapter, derive, method_for

RAW = {"peft_type": "SVFIT"}
KEY = "base_model.model.model.layers.0.self_attn.q_proj.svfit_sigma"


def part(values: Tensor, base: Site, flip: float = 1.0) -> Any:
    sites, method, given = {base.path: base}, method_for(RAW), {KEY: values}
    check_adapter(RAW, given, sites)
    derived = derive(RAW, given, sites)
    derived = {name: t if name.endswith("sigma") else flip * t for name, t in derived.items()}
    (found,) = method.compile(method.parse(RAW), {**given, **derived}, sites).sites[base.path]
    return found


@pytest.mark.parametrize("flip", [1.0, -1.0])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_first_singular_values_are_replaced_and_no_other(
    site: Callable[..., Site], evaluate: Any, rank: int, flip: float
) -> None:
    base, values = site(), torch.tensor([9.0, -1.0, 0.0, 2.5, 7.0])[:rank]
    u_OK, s_K, v_KI = torch.linalg.svd(base.weight_OI.double(), full_matrices=False)
    new_K = torch.cat([values.double(), s_K[rank:]])
    x_TI = torch.eye(5, dtype=torch.float64)
    actual_TO = evaluate.run_parts(base, (part(values, base, flip),), x_TI)
    torch.testing.assert_close(actual_TO.T, u_OK @ new_K.diag() @ v_KI, rtol=0, atol=1e-5)


def test_a_diagonal_is_all_that_an_adapter_owns(site: Callable[..., Site]) -> None:
    first, second = part(torch.ones(3), site()), part(torch.zeros(3), site())
    assert first.core.shape == (1, 3)
    assert first.basis is second.basis


def test_more_values_than_the_layer_has_are_refused(site: Callable[..., Site]) -> None:
    with pytest.raises(InvalidTensors, match="found 6 values, expected at most 5"):
        part(torch.ones(6), site())
