from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from peft import FrodConfig
from torch import Tensor, nn

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidConfig, InvalidTensors
from timbre_methods.program import Projected
from timbre_methods.registry import check_adapter, derive, method_for
from timbre_methods.shared_basis.frod_projection import category_of, derived_right

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

OPTIONS = {
    "plain": {},
    "another seed, more values": {"projection_prng_key": 9, "sparse_rate": 0.1},
    "every cell": {"sparse_rate": 1.0, "target_modules": ["k_proj"]},
    "no values": {"sparse_rate": 0.0},
    "another ridge": {"regularization_alpha": 0.5},
    "with the head": {"target_modules": ["down_proj", "lm_head"]},
}
quiet_peft = pytest.mark.filterwarnings(
    "ignore:Specified to not load FRoD:UserWarning", "ignore:Sparse CSR tensor:UserWarning"
)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("save_projection", [True, False])
@quiet_peft
def test_frod_gives_the_logits_of_peft(
    llama: nn.Module, agrees_with_peft: Callable[..., None], options: dict[str, Any], save_projection: bool
) -> None:
    config = FrodConfig(
        save_projection=save_projection, progressbar=False, **{"target_modules": LAYERS, **options}
    )
    agrees_with_peft(llama, config, save_embedding_layers=False)


@quiet_peft
def test_frod_on_conv1d_gives_the_logits_of_peft(
    gpt2: nn.Module, agrees_with_peft: Callable[..., None]
) -> None:
    modules = ["c_attn", "c_fc", "mlp.c_proj"]
    agrees_with_peft(gpt2, FrodConfig(target_modules=modules, fan_in_fan_out=True, progressbar=False))


@quiet_peft
def test_frod_on_a_bf16_base_is_as_near_as_peft(
    llama: nn.Module, agrees_in_bf16: Callable[..., None]
) -> None:
    agrees_in_bf16(llama, FrodConfig(target_modules=["v_proj"], progressbar=False), std=0.1)


@pytest.mark.parametrize(
    ("path", "category"),
    [
        ("model.layers.3.self_attn.q_proj", "self_attn_q_proj"),
        ("encoder.layer.0.attention.output.dense", "attention_output"),
        ("encoder.layer.0.output.dense", "output_dense"),
        ("lm_head", "lm_head"),
        ("blocks.2.proj", "proj"),
    ],
)
def test_layers_are_in_categories_by_the_end_of_their_path(path: str, category: str) -> None:
    assert category_of(path) == category


RAW = {"peft_type": "FROD", "sparse_rate": 0.1}
STEM = "base_model.model.model.layers.0.self_attn.q_proj"
CATEGORY = "self_attn_q_proj"


def tensors(in_features: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        f"{STEM}.frod_lambda_l": torch.randn(in_features, generator=generator),
        f"{STEM}.frod_lambda_s_values": torch.tensor([0.5, -2.0]),
        f"base_model.frod_V.{CATEGORY}": torch.randn(in_features, in_features, generator=generator),
        f"base_model.frod_s_indices.{CATEGORY}": torch.tensor([[0, 3], [2, 1]]),
        f"base_model.frod_s_size.{CATEGORY}": torch.tensor([in_features, in_features]),
    }


def part(raw: Mapping[str, Any], given: dict[str, Tensor], base: Site) -> Projected:
    sites, method = {base.path: base}, method_for(raw)
    check_adapter(raw, given, sites)
    whole = {**given, **derive(raw, given, sites)}
    (found,) = method.compile(method.parse(raw), whole, sites).sites[base.path]
    return found


@pytest.mark.parametrize("flipped", [1.0, -1.0])
def test_u_follows_the_v_of_the_file_and_not_another_one(
    site: Callable[..., Site], evaluate: Any, flipped: float
) -> None:
    base, given = site(), tensors()
    v_II = given[f"base_model.frod_V.{CATEGORY}"]
    v_II[:, 1] *= flipped
    u_OI = torch.linalg.solve(v_II.double(), base.weight_OI.double().T).T
    core_II = given[f"{STEM}.frod_lambda_l"].double().diag()
    core_II[0, 2], core_II[3, 1] = 0.5, -2.0
    expected_OI = (u_OI / u_OI.norm(dim=0)) @ core_II @ v_II.double().T
    x_TI = torch.eye(5, dtype=torch.float64)
    actual_TO = evaluate.run_parts(base, (part(RAW, given, base),), x_TI)
    torch.testing.assert_close(actual_TO.T, expected_OI, rtol=0, atol=1e-4)


def test_adapters_of_equal_v_share_their_basis(site: Callable[..., Site]) -> None:
    base, given = site(), tensors()
    other = {**given, f"{STEM}.frod_lambda_l": torch.ones(5)}
    first, second = part(RAW, given, base), part(RAW, other, base)
    assert first.basis is second.basis
    assert first.core.shape == (5 + 2,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {f"base_model.frod_s_indices.{CATEGORY}": torch.tensor([[0, 5], [2, 1]])},
            "found place 5, expected 0 to 4",
        ),
        ({f"base_model.frod_s_indices.{CATEGORY}": torch.tensor([[0, -1], [2, 1]])}, "found place -1"),
        ({f"base_model.frod_s_size.{CATEGORY}": torch.tensor([5, 6])}, r"found \[5, 6\], expected \[5, 5\]"),
        ({"base_model.frod_V.mlp_up_proj": torch.eye(5)}, "is surplus: no adapted layer is of this category"),
        ({f"{STEM}.frod_lambda_s_values": torch.ones(3)}, r"found shape \[3\], expected \[2\]"),
        ({f"base_model.frod_V.{CATEGORY}": 1e-39 * torch.eye(5)}, "cannot be inverted"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    site: Callable[..., Site], change: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(InvalidTensors, match=message):
        part(RAW, {**tensors(), **change}, site())


def test_the_file_holds_the_projection_exactly_if_the_config_says_so(site: Callable[..., Site]) -> None:
    given = tensors()
    with pytest.raises(InvalidTensors, match=r"frod_V\.self_attn_q_proj is surplus"):
        part({**RAW, "save_projection": False}, given, site())
    own = {name: tensor for name, tensor in given.items() if name.startswith(STEM)}
    with pytest.raises(InvalidTensors, match=r"frod_V\.self_attn_q_proj is missing"):
        part(RAW, own, site())
    assert part({**RAW, "save_projection": False}, own, site()).core.shape == (7,)
    with pytest.raises(InvalidConfig, match="sparse_rate"):
        method_for(RAW).parse({**RAW, "sparse_rate": 1.1})


def test_a_basis_that_has_no_inverse_without_a_ridge_is_refused() -> None:
    weights = {0: torch.eye(5), 1: torch.zeros(6, 5)}
    members = {n: Site(f"model.layers.{n}.self_attn.q_proj", w_OI, None) for n, w_OI in weights.items()}
    assert derived_right(members, 1e-3).isfinite().all()
    with pytest.raises(InvalidConfig, match=r"regularization_alpha: found 0\.0, which is too small"):
        derived_right(members, 0.0)
