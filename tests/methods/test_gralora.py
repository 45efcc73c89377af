from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import GraloraConfig
from torch import Tensor, nn

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidConfig, InvalidTensors
from timbre_methods.program import Dense, LowRank, Part
from timbre_methods.registry import method_for

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

OPTIONS: dict[str, dict[str, Any]] = {
    "two blocks": {"r": 4, "gralora_k": 2, "alpha": 6},
    "one block is a LoRA": {"r": 3, "gralora_k": 1},
    "as a dense change": {"r": 16, "gralora_k": 2, "alpha": 6},
    "four blocks, as a dense change": {
        "r": 8,
        "gralora_k": 4,
        "target_modules": ["q_proj", "v_proj", "o_proj"],
    },
    "hybrid: the scale counts both ranks": {"r": 4, "gralora_k": 2, "hybrid_r": 3, "alpha": 6},
    "hybrid, as a dense change": {"r": 16, "gralora_k": 2, "hybrid_r": 3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gralora_gives_the_logits_of_peft(
    llama: nn.Module, agrees_with_peft: Callable[..., None], options: dict[str, Any]
) -> None:
    agrees_with_peft(llama, GraloraConfig(**{"target_modules": LAYERS, "alpha": 8, **options}), std=0.2)


def test_gralora_on_conv1d_gives_the_logits_of_peft(
    gpt2: nn.Module, agrees_with_peft: Callable[..., None]
) -> None:
    modules = ["c_attn", "c_proj", "c_fc"]
    agrees_with_peft(gpt2, GraloraConfig(r=4, alpha=4, target_modules=modules, fan_in_fan_out=True), std=0.2)


def test_gralora_on_a_bf16_base_is_as_near_as_peft(
    llama: nn.Module, agrees_in_bf16: Callable[..., None]
) -> None:
    agrees_in_bf16(llama, GraloraConfig(r=4, alpha=8, hybrid_r=1, target_modules=LAYERS), std=0.1)


RAW = {"peft_type": "GRALORA", "r": 4, "alpha": 4, "gralora_k": 2}
STEM = "base_model.model.model.layers.0.self_attn.q_proj"


def compiled(given: dict[str, Tensor], base: Site, **options: Any) -> Part:
    method = method_for(RAW)
    named = {f"{STEM}.gralora_{key}": t for key, t in given.items()}
    (part,) = method.compile(method.parse({**RAW, **options}), named, {base.path: base}).sites[base.path]
    return part


def blocks(k: int, r: int, out_features: int, in_features: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(k * r)
    return {
        "A": torch.randn(k, in_features // k, r, generator=generator),
        "B": torch.randn(k, r, out_features // k, generator=generator),
    }


@pytest.mark.parametrize(("size", "form"), [(20, LowRank), (12, Dense)])
def test_a_block_of_the_change_is_a_piece_of_a_times_a_piece_of_b(
    size: int, form: type[Part], site: Callable[..., Site]
) -> None:
    base, given = site(out_features=size, in_features=size + 2), blocks(2, 4, size, size + 2)
    part = compiled(given, base)
    assert isinstance(part, form)
    delta_OI = part.delta_OI if isinstance(part, Dense) else part.b_OR @ part.a_RI
    for j, rows in enumerate(delta_OI.chunk(2)):
        for i, block in enumerate(rows.chunk(2, dim=1)):
            own = given["A"][i][:, 2 * j : 2 * j + 2] @ given["B"][j][2 * i : 2 * i + 2]
            torch.testing.assert_close(block, own.T)


def test_many_blocks_never_grow_beyond_the_change_itself(site: Callable[..., Site]) -> None:
    """Factors of rank k r = 4096 x 4096 would need 64 GiB."""
    base = site(out_features=4096, in_features=4096)
    given = {"A": torch.ones(4096, 1, 4096, device="meta"), "B": torch.ones(4096, 4096, 1, device="meta")}
    part = compiled(given, Site(base.path, base.weight_OI.to("meta"), None), r=4096, gralora_k=4096)
    assert isinstance(part, Dense)


def test_sizes_that_k_does_not_divide_are_refused(site: Callable[..., Site]) -> None:
    with pytest.raises(InvalidConfig, match="r: found 3, expected a multiple of gralora_k=2"):
        method_for(RAW).parse({**RAW, "r": 3})
    with pytest.raises(InvalidTensors, match=r"gralora_A: found a layer of 6 x 5, expected multiples of"):
        compiled(blocks(2, 4, 6, 4), site())


def test_a_lora_beside_the_blocks_must_be_asked_for(site: Callable[..., Site]) -> None:
    base = site(out_features=20, in_features=22)
    given = {
        **blocks(2, 4, 20, 22),
        "A_general.weight": torch.ones(1, 22),
        "B_general.weight": torch.ones(20, 1),
    }
    assert isinstance(compiled(given, base, hybrid_r=1), LowRank)
    with pytest.raises(
        InvalidTensors, match=r"gralora_A_general.weight is surplus: the config says hybrid_r=0"
    ):
        compiled(given, base)
