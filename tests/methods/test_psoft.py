from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PsoftConfig
from torch import Tensor, nn

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidConfig, InvalidTensors
from timbre_methods.registry import check_adapter, derive, method_for

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

OPTIONS = {
    "plain": {},
    "another alpha": {"psoft_alpha": 3},
    "symmetric factors": {"ab_svd_init": "pissa_init", "psoft_alpha": 5},
    "a random SVD": {"psoft_svd": "lowrank", "random_seed": 12},
    "a random SVD of few steps": {"psoft_svd": "lowrank", "psoft_svd_lowrank_niter": 1},
    "a free matrix": {"psoft_orth": False},
    "no gains": {"psoft_mag_a": False, "psoft_mag_b": False},
    "a gain on one side": {"psoft_mag_a": False},
    "rank 1": {"r": 1},
    "with the head": {"target_modules": ["down_proj", "lm_head"]},
}
SERIES = [{"num_cayley_neumann_terms": terms} for terms in (1, 2, 3, 4, 5, 7)]
SERIES += [{"cayley_neumann_eps": 0.5}, {"cayley_neumann_eps": 0.01, "num_cayley_neumann_terms": 6}]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.filterwarnings("ignore:`psoft_svd_lowrank_niter` is only used:UserWarning")
def test_psoft_gives_the_logits_of_peft(
    llama: nn.Module, agrees_with_peft: Callable[..., None], options: dict[str, Any]
) -> None:
    config = PsoftConfig(**{"r": 6, "target_modules": LAYERS, **options})
    agrees_with_peft(llama, config, save_embedding_layers=False)


@pytest.mark.parametrize("options", SERIES, ids=str)
def test_the_series_gives_the_logits_of_peft(
    llama: nn.Module, agrees_with_peft: Callable[..., None], options: dict[str, Any]
) -> None:
    config = PsoftConfig(r=6, use_cayley_neumann=True, target_modules=["v_proj", "up_proj"], **options)
    agrees_with_peft(llama, config)


def test_psoft_on_a_bf16_base_is_as_near_as_peft(
    llama: nn.Module, agrees_in_bf16: Callable[..., None]
) -> None:
    agrees_in_bf16(llama, PsoftConfig(r=6, psoft_mag_a=False, psoft_mag_b=False, target_modules=LAYERS))


RAW = {"peft_type": "PSOFT", "r": 3, "psoft_alpha": 6, "psoft_mag_a": False, "psoft_mag_b": False}
STEM = "base_model.model.model.layers.0.self_attn.q_proj.psoft_R"


def delta(raw: dict[str, Any], given: dict[str, Tensor], base: Site) -> Tensor:
    sites, method = {base.path: base}, method_for(raw)
    check_adapter(raw, given, sites)
    whole = {**given, **derive(raw, given, sites)}
    (part,) = method.compile(method.parse(raw), whole, sites).sites[base.path]
    return part.b_OR @ part.a_RI


def test_a_quarter_turn_exchanges_two_singular_directions(site: Callable[..., Site]) -> None:
    base = site()
    u_OK, s_K, v_KI = torch.linalg.svd(base.weight_OI, full_matrices=False)
    # K = [[0, 1], [-1, 0]] has the Cayley transform [[0, 1], [-1, 0]].
    turn_RR = torch.tensor([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    expected_OI = u_OK[:, :3] @ s_K[:3].diag() @ (turn_RR - torch.eye(3)) @ v_KI[:3]
    given = {f"{STEM}.weight": torch.tensor([1.0, 0.0, 0.0])}
    torch.testing.assert_close(delta(RAW, given, base), expected_OI)


def test_the_scale_cancels_and_has_to_be_positive(site: Callable[..., Site]) -> None:
    given, base = {f"{STEM}.weight": torch.tensor([0.3, -0.2, 0.1])}, site()
    changes = [delta({**RAW, "psoft_alpha": alpha}, given, base) for alpha in (6, 0.5)]
    torch.testing.assert_close(changes[0], changes[1])
    with pytest.raises(InvalidConfig, match=r"psoft_alpha: found 0\.0, expected more than 0"):
        delta({**RAW, "psoft_alpha": 0}, given, base)


@pytest.mark.parametrize(
    "options", [{}, {"use_cayley_neumann": True, "num_cayley_neumann_terms": 6}], ids=["solved", "series"]
)
@pytest.mark.parametrize("angle", [1e8, 1e20])
def test_angles_that_give_no_orthogonal_matrix_are_refused(
    site: Callable[..., Site], options: dict[str, Any], angle: float
) -> None:
    base, raw, given = site(), {**RAW, **options}, {f"{STEM}.weight": torch.full((3,), angle)}
    if not options or angle > 1e8:
        with pytest.raises(InvalidTensors, match=r"found angles up to 1e\+\d+, of which float32 gives no"):
            check_adapter(raw, given, {base.path: base})
    method = method_for(raw)
    whole = {**given, **derive(raw, given, {base.path: base})}
    method.compile(method.parse(raw), whole, {base.path: base})  # nothing but a MethodError may leave it


def layers_of_8b() -> dict[str, Site]:
    shapes = {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096)}
    shapes |= {"gate": (14336, 4096), "up": (14336, 4096), "down": (4096, 14336)}
    return {
        f"{layer}.{name}": Site(f"{layer}.{name}", torch.empty(shape, device="meta"), None)
        for layer in range(32)
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize(("r", "niter", "is_served"), [(32, 10, True), (128, 10, True), (1024, 10, False)])
def test_a_randomised_svd_beyond_the_bound_is_refused_before_it_is_begun(
    r: int, niter: int, is_served: bool
) -> None:
    sites = layers_of_8b()
    raw = {**RAW, "r": r, "psoft_svd": "lowrank", "psoft_svd_lowrank_niter": niter}
    angles = torch.empty(r * (r - 1) // 2, device="meta")
    given = {f"base_model.model.{path}.psoft_R.weight": angles for path in sites}
    if is_served:
        assert len(derive(raw, given, sites)) == 3 * len(sites)
    else:
        with pytest.raises(InvalidConfig, match=r"found \d+ products .* expected at most 10000000000000:"):
            derive(raw, given, sites)
        assert derive({**raw, "psoft_svd": "full"}, given, sites)


def test_what_the_config_does_not_name_is_refused(site: Callable[..., Site]) -> None:
    base, given = site(), {f"{STEM}.weight": torch.ones(3)}
    with pytest.raises(InvalidTensors, match="vector_a is surplus: the config says psoft_mag_a=false"):
        delta(RAW, {**given, f"{STEM}.vector_a": torch.ones(3)}, base)
    with pytest.raises(InvalidTensors, match=r"psoft_R\.weight: found shape \[3\], expected \[3, 3\]"):
        delta({**RAW, "psoft_orth": False}, given, base)
    with pytest.raises(InvalidConfig, match="r: found 9, expected at most 5"):
        delta({**RAW, "r": 9}, {f"{STEM}.weight": torch.ones(36)}, base)
    with pytest.raises(InvalidConfig, match="psoft_svd"):
        method_for(RAW).parse({**RAW, "psoft_svd": "exact"})
