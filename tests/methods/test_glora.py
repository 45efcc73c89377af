from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import GloraConfig
from torch import Tensor, nn

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidConfig, InvalidTensors
from timbre_methods.program import Dense, Diagonal, LowRank, Part
from timbre_methods.registry import check_adapter, method_for

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

FORMS = [
    ("lora", "lora", "constant"),
    ("vector", "vector", "vector"),
    ("constant", "none", "none"),
    ("constant", "lora", "vector"),
    ("none", "vector", "constant"),
    ("none", "none", "vector"),
]


@pytest.mark.parametrize(("a_b", "c", "d_e"), FORMS)
def test_glora_gives_the_logits_of_peft(
    llama: nn.Module, agrees_with_peft: Callable[..., None], a_b: str, c: str, d_e: str
) -> None:
    """The attention has biases and the MLP has none, so one file holds paths and zeros for both."""
    config = GloraConfig(r=3, config_A_B=a_b, config_C=c, config_D_E=d_e, target_modules=LAYERS)
    agrees_with_peft(llama, config, std=0.1)


@pytest.mark.parametrize("a_b", ["lora", "vector"])
def test_glora_on_a_bf16_base_is_as_near_as_peft(
    a_b: str, llama: nn.Module, agrees_in_bf16: Callable[..., None]
) -> None:
    agrees_in_bf16(llama, GloraConfig(r=3, config_A_B=a_b, target_modules=LAYERS), std=0.05)


RAW = {"peft_type": "GLORA", "r": 2, "config_A_B": "vector", "config_C": "none", "config_D_E": "none"}
STEM = "base_model.model.model.layers.0.self_attn.q_proj"


def tensors() -> dict[str, Tensor]:
    return {
        f"{STEM}.glora_A.X": torch.full((6, 1), 0.5),
        f"{STEM}.glora_B.X": torch.arange(6.0)[:, None],
        f"{STEM}.glora_C.zeros": torch.zeros(5, 1),
        f"{STEM}.glora_D.zeros": torch.zeros(6),
        f"{STEM}.glora_E.zeros": torch.zeros(6),
    }


def compiled(given: dict[str, Tensor], base: Site, **options: Any) -> tuple[Part, ...]:
    raw, method = {**RAW, **options}, method_for(RAW)
    check_adapter(raw, given, {base.path: base})
    return method.compile(method.parse(raw), given, {base.path: base}).sites.get(base.path, ())


def test_a_gain_leaves_the_bases_bias_alone(site: Callable[..., Site]) -> None:
    base = site(bias=True)
    factors, gain = compiled(tensors(), base)
    assert isinstance(factors, LowRank)
    torch.testing.assert_close(factors.b_OR @ factors.a_RI, torch.arange(6.0)[:, None].expand(6, 5))
    assert isinstance(gain, Diagonal)
    assert base.bias_O is not None
    torch.testing.assert_close(gain.gain, torch.full((6,), 1.5))
    torch.testing.assert_close(gain.shift, -0.5 * base.bias_O)


def test_paths_that_are_absent_leave_the_layer_as_it_is(site: Callable[..., Site]) -> None:
    given = {key.replace(".X", ".zeros"): t for key, t in tensors().items()}
    given |= {f"{STEM}.glora_{path}.zeros": torch.zeros(6, 5) for path in "AB"}
    assert compiled(given, site(), config_A_B="none") == ()


def test_factors_make_one_dense_change(site: Callable[..., Site]) -> None:
    base, given = site(), tensors()
    for path in "AB":
        del given[f"{STEM}.glora_{path}.X"]
        given |= {f"{STEM}.glora_{path}.Xd": torch.ones(6, 2), f"{STEM}.glora_{path}.Xu": torch.ones(2, 5)}
    (part,) = compiled(given, base, config_A_B="lora")
    assert isinstance(part, Dense)
    torch.testing.assert_close(part.delta_OI, 2 * base.weight_OI + 2)


def test_zeros_must_be_there_and_zero(site: Callable[..., Site]) -> None:
    name = f"{STEM}.glora_D.zeros"
    with pytest.raises(InvalidTensors, match=r"glora_D.zeros: found a value that is not zero"):
        compiled({**tensors(), name: torch.full((6,), 0.1)}, site())
    rest = {key: t for key, t in tensors().items() if key != name}
    with pytest.raises(InvalidTensors, match=r"glora_D.zeros is missing"):
        compiled(rest, site())


def test_a_path_that_the_config_does_not_name_is_refused(site: Callable[..., Site]) -> None:
    with pytest.raises(
        InvalidTensors, match=r"glora_D.X is surplus: the config and the layer's bias ask for"
    ):
        compiled({**tensors(), f"{STEM}.glora_D.X": torch.ones(1)}, site())
    with pytest.raises(InvalidConfig, match="config_C"):
        method_for(RAW).parse({**RAW, "config_C": "constant"})
