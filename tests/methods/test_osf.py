from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import OSFConfig
from torch import Tensor, nn

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidConfig, InvalidTensors
from timbre_methods.program import Dense, LowRank
from timbre_methods.registry import check_adapter, derive, method_for

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

OPTIONS = {
    "half of each layer": {},
    "a number": {"effective_rank": 20},
    "a share": {"effective_rank": 0.8},
    "a number as a float": {"effective_rank": 20.0},
    "more than a layer has": {"effective_rank": 40},
    "patterns": {"effective_rank": 0.9, "rank_pattern": {"layers.1": 0.25, "mlp": 45}},
    "with the head": {"effective_rank": 30, "target_modules": ["down_proj", "lm_head"]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning")
def test_osf_gives_the_logits_of_peft(
    llama: nn.Module, agrees_with_peft: Callable[..., None], options: dict[str, Any]
) -> None:
    config = OSFConfig(**{"target_modules": LAYERS, **options})
    agrees_with_peft(llama, config, std=0.02, save_embedding_layers=False)


def test_osf_on_a_bf16_base_is_as_near_as_peft(llama: nn.Module, agrees_in_bf16: Callable[..., None]) -> None:
    agrees_in_bf16(llama, OSFConfig(effective_rank=40, target_modules=LAYERS), std=0.02)


RAW = {"peft_type": "OSF", "effective_rank": 4}
STEM = "base_model.model.model.layers.0.self_attn.q_proj.osf_svd_params"


def tensors(k: int, out_features: int = 6, in_features: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        f"{STEM}.U_low": torch.randn(out_features, k, generator=generator),
        f"{STEM}.S_low": torch.randn(k, generator=generator),
        f"{STEM}.V_low": torch.randn(k, in_features, generator=generator),
    }


def parts(raw: dict[str, Any], given: dict[str, Tensor], base: Site) -> tuple[Any, ...]:
    sites, method = {base.path: base}, method_for(raw)
    check_adapter(raw, given, sites)
    whole = {**given, **derive(raw, given, sites)}
    return method.compile(method.parse(raw), whole, sites).sites.get(base.path, ())


@pytest.mark.parametrize(("kept", "kind"), [(4, LowRank), (3, Dense), (1, Dense)])
def test_the_change_has_the_smaller_of_two_forms(
    site: Callable[..., Site], kept: int, kind: type[LowRank | Dense]
) -> None:
    base, given = site(), tensors(5 - kept)
    (part,) = parts({**RAW, "effective_rank": kept}, given, base)
    assert isinstance(part, kind)
    delta_OI = part.delta_OI if isinstance(part, Dense) else part.b_OR @ part.a_RI
    u_OK, s_K, v_KI = torch.linalg.svd(base.weight_OI.double(), full_matrices=False)
    first_OI = u_OK[:, kept:] @ s_K[kept:].diag() @ v_KI[kept:]
    low = {name.rpartition(".")[2]: tensor.double() for name, tensor in given.items()}
    expected_OI = low["U_low"] @ low["S_low"].diag() @ low["V_low"] - first_OI
    torch.testing.assert_close(delta_OI.double(), expected_OI, atol=1e-5, rtol=0)


def test_the_first_state_is_rounded_as_peft_keeps_it(site: Callable[..., Site]) -> None:
    base = Site(site().path, site().weight_OI.bfloat16(), None)
    derived = derive(RAW, tensors(1), {base.path: base})
    assert all(t.dtype == torch.float32 and torch.equal(t, t.bfloat16().float()) for t in derived.values())


def test_a_layer_whose_triplets_are_all_kept_is_left_alone(site: Callable[..., Site]) -> None:
    assert parts({**RAW, "effective_rank": 1.0}, tensors(0), site()) == ()


@pytest.mark.parametrize("number", [5000, 5000.0])
def test_more_triplets_stay_frozen_than_any_rank_is(number: float) -> None:
    wide = Site("q_proj", torch.empty(8192, 8192, device="meta"), None)
    given = {
        f"base_model.model.q_proj.osf_svd_params.{name}_low": torch.empty(shape, device="meta")
        for name, shape in {"U": (8192, 3192), "S": (3192,), "V": (3192, 8192)}.items()
    }
    raw, sites = {**RAW, "effective_rank": number}, {wide.path: wide}
    method = method_for(raw)
    program = method.compile(method.parse(raw), {**given, **derive(raw, given, sites)}, sites)
    assert list(program.sites) == [wide.path]
    pattern = {**raw, "effective_rank": 1, "rank_pattern": {"q_proj": number}}
    assert method.parse(pattern).rank_pattern == {"q_proj": number}


def test_a_number_of_triplets_that_the_config_does_not_name_is_refused(site: Callable[..., Site]) -> None:
    with pytest.raises(InvalidTensors, match=r"S_low: found 2 triplets, the config says \[1\]"):
        parts(RAW, tensors(2), site())
    with pytest.raises(InvalidConfig, match="effective_rank"):
        method_for(RAW).parse({**RAW, "effective_rank": 0})
