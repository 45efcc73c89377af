"""LoRTA against numbers worked out here; PEFT does not have it."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidTensors
from timbre_methods.registry import check_adapter, method_for

Q, K, V = (f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
RAW = {"peft_type": "LORTA", "r": 3, "lora_alpha": 6, "num_heads": 2}


def tensors(*paths: str) -> dict[str, Tensor]:
    """For layers of 5 x 8: two heads of 4."""
    generator = torch.Generator().manual_seed(1)
    whole = {
        "base_model.lorta_A": torch.randn(5, 3, generator=generator),
        "base_model.lorta_B": torch.randn(3, 4, generator=generator),
        "base_model.lorta_C_h": torch.randn(2, 3, generator=generator),
    }
    return whole | {f"base_model.model.{path}.lorta_c": torch.randn(3, generator=generator) for path in paths}


def test_heads_split_the_input_and_a_is_on_the_output(
    site: Callable[..., Site], evaluate: ModuleType
) -> None:
    base, given, method = site(Q, 5, 8), tensors(Q), method_for(RAW)
    [part] = method.compile(method.parse(RAW), given, {Q: base}).sites[Q]
    a, b, heads = (given[f"base_model.lorta_{name}"].double() for name in ("A", "B", "C_h"))
    c = given[f"base_model.model.{Q}.lorta_c"].double()
    delta_OI = torch.zeros(5, 8, dtype=torch.float64)
    for out in range(5):
        for head in range(2):
            for inside in range(4):
                for rank in range(3):
                    entry = a[out, rank] * c[rank] * heads[head, rank] * b[rank, inside]
                    delta_OI[out, 4 * head + inside] += 2 * entry
    x_TI = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(evaluate.projected(part, x_TI), x_TI @ delta_OI.T, rtol=1e-6, atol=1e-6)


def test_all_layers_of_an_adapter_share_one_basis(site: Callable[..., Site]) -> None:
    sites, method = {path: site(path, 5, 8) for path in (Q, K, V)}, method_for(RAW)
    program = method.compile(method.parse(RAW), tensors(Q, K, V), sites)
    bases = {id(part.basis) for [part] in program.sites.values()}
    assert len(bases) == 1
    assert program.prepared_bytes == 3 * 3 * 4


def test_layers_of_several_shapes_are_refused(site: Callable[..., Site]) -> None:
    sites = {Q: site(Q, 5, 8), K: site(K, 2, 8)}
    with pytest.raises(InvalidTensors, match=r"k_proj: found a layer of \[2, 8\], expected all of one shape"):
        check_adapter(RAW, tensors(Q, K), sites)


def test_heads_that_do_not_divide_the_input_are_refused(site: Callable[..., Site]) -> None:
    with pytest.raises(InvalidTensors, match="found 8 in features, expected a multiple of 3 heads"):
        check_adapter({**RAW, "num_heads": 3}, tensors(Q), {Q: site(Q, 5, 8)})
