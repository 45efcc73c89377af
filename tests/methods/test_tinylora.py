from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import TinyLoraConfig
from torch import Tensor, nn

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidConfig, InvalidTensors
from timbre_methods.registry import check_adapter, derive, method_for

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

OPTIONS = {
    "plain": {},
    "a rank that some layers do not have": {"r": 30},
    "all layers share one vector": {"weight_tying": 1.0},
    "fourteen layers in seven groups": {"weight_tying": 0.5},
    "groups that do not divide the layers": {"weight_tying": 0.3},
    "with the head": {"target_modules": ["down_proj", "lm_head"], "weight_tying": 0.4},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_tinylora_gives_the_logits_of_peft(
    llama: nn.Module, agrees_with_peft: Callable[..., None], options: dict[str, Any]
) -> None:
    config = TinyLoraConfig(u=5, **{"r": 3, "target_modules": LAYERS, **options})
    agrees_with_peft(llama, config, save_embedding_layers=False)


@pytest.mark.parametrize(("r", "seed"), [(2, 42), (5, 7)])
@pytest.mark.filterwarnings("ignore:Specified to not:UserWarning")
def test_projections_are_drawn_again_where_the_file_has_none(
    llama: nn.Module, agrees_with_peft: Callable[..., None], r: int, seed: int
) -> None:
    config = TinyLoraConfig(
        r=r, u=9, weight_tying=0.2, projection_seed=seed, save_projection=False, target_modules=LAYERS
    )
    agrees_with_peft(llama, config)


def test_tinylora_on_conv1d_gives_the_logits_of_peft(
    gpt2: nn.Module, agrees_with_peft: Callable[..., None]
) -> None:
    modules = ["c_attn", "c_proj", "c_fc"]
    agrees_with_peft(gpt2, TinyLoraConfig(r=3, u=6, target_modules=modules, fan_in_fan_out=True), std=0.5)


@pytest.mark.parametrize("base", ["llama", "tied_llama", "gemma2"])
@pytest.mark.parametrize("save_projection", [True, False])
@pytest.mark.filterwarnings(
    "ignore:Specified to not:UserWarning", "ignore:Found missing adapter keys:UserWarning"
)
def test_tinylora_on_an_embedding_gives_the_logits_of_peft(
    base: str,
    save_projection: bool,
    request: pytest.FixtureRequest,
    agrees_with_peft: Callable[..., None],
) -> None:
    layers = ["embed_tokens", "q_proj", "down_proj"]
    config = TinyLoraConfig(
        r=3, u=5, target_modules=layers, weight_tying=0.4, save_projection=save_projection
    )
    agrees_with_peft(request.getfixturevalue(base), config)


@pytest.mark.parametrize("save_projection", [True, False])
@pytest.mark.filterwarnings("ignore:Specified to not:UserWarning")
def test_tinylora_on_a_bf16_base_is_as_near_as_peft(
    llama: nn.Module, agrees_in_bf16: Callable[..., None], save_projection: bool
) -> None:
    agrees_in_bf16(llama, TinyLoraConfig(u=5, save_projection=save_projection, target_modules=LAYERS))


RAW = {"peft_type": "TINYLORA", "r": 2, "u": 3, "weight_tying": 1.0, "projection_seed": 5}
STEM = "base_model.model.model.layers.0.self_attn.q_proj"


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        f"{STEM}.tinylora_A": torch.randn(2, 5, generator=generator),
        f"{STEM}.tinylora_B": torch.randn(6, 2, generator=generator),
        f"{STEM}.tinylora_P": torch.randn(3, 2, 2, generator=generator),
        "base_model.tinylora_v.0": torch.tensor([0.0, 2.0, 0.0]),
    }


def test_one_entry_of_the_vector_picks_one_matrix(site: Callable[..., Site]) -> None:
    base, given, method = site(), tensors(), method_for(RAW)
    (part,) = method.compile(method.parse(RAW), given, {base.path: base}).sites[base.path]
    expected = (
        given[f"{STEM}.tinylora_B"] @ (2 * given[f"{STEM}.tinylora_P"][1]) @ given[f"{STEM}.tinylora_A"]
    )
    torch.testing.assert_close(part.b_OR @ part.a_RI, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model.tinylora_v.1": torch.ones(3)}, r"tinylora_v\.1 is surplus.* 1 groups"),
        ({"base_model.tinylora_v.0": torch.ones(4)}, r"tinylora_v\.0: found shape \[4\], expected \[3\]"),
        ({"base_model.tinylora_v.00": torch.ones(3)}, r"tinylora_v\.00' is surplus"),
        ({f"{STEM}.tinylora_A": torch.ones(1, 5)}, r"tinylora_A: found shape \[1, 5\], expected \[2, 5\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    site: Callable[..., Site], change: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(InvalidTensors, match=message):
        check_adapter(RAW, {**tensors(), **change}, {site().path: site()})


def test_projections_are_in_the_file_exactly_if_the_config_says_so(site: Callable[..., Site]) -> None:
    sites, given = {site().path: site()}, tensors()
    with pytest.raises(InvalidTensors, match="tinylora_P is surplus: the config says save_projection=false"):
        check_adapter({**RAW, "save_projection": False}, given, sites)
    del given[f"{STEM}.tinylora_P"]
    with pytest.raises(InvalidTensors, match="tinylora_P is missing"):
        check_adapter(RAW, given, sites)


def test_what_is_too_large_to_draw_is_refused_before_anything_is_drawn(site: Callable[..., Site]) -> None:
    paths = ["q_proj", "k_proj"]
    sites = {path: site(path) for path in paths}
    given = {}
    for path in paths:
        given[f"base_model.model.{path}.tinylora_A"] = torch.empty(2, 5, device="meta")
        given[f"base_model.model.{path}.tinylora_B"] = torch.empty(6, 2, device="meta")
    for u, is_refused in ((2**23, False), (2**23 + 1, True)):
        raw = {**RAW, "u": u, "save_projection": False}
        given["base_model.tinylora_v.0"] = torch.empty(u, device="meta")
        on_meta = {path: Site(path, base.weight_OI.to("meta"), None) for path, base in sites.items()}
        if is_refused:
            message = "on 2 layers are not drawn: found 67108872 values, expected at most 67108864; save with"
            with pytest.raises(InvalidConfig, match=message):
                derive(raw, given, sites)
        else:
            assert len(derive(raw, given, on_meta)) == 2


def test_a_load_draws_nothing(site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> None:
    raw, given, sites = {**RAW, "save_projection": False}, tensors(), {site().path: site()}
    del given[f"{STEM}.tinylora_P"]
    derived = derive(raw, given, sites)
    assert {name: tuple(t.shape) for name, t in derived.items()} == {f"derived.{site().path}.core": (2, 2)}
    monkeypatch.delattr(torch, "normal")
    method = method_for(raw)
    (part,) = method.compile(method.parse(raw), {**given, **derived}, sites).sites[site().path]
    expected = given[f"{STEM}.tinylora_B"] @ derived[f"derived.{site().path}.core"]
    assert torch.equal(part.b_OR, expected)
