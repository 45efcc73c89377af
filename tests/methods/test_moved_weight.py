"""PiSSA, OLoRA, KaSA: what PEFT computes after moving its base, over a base that stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.config import KasaConfig
from torch import Tensor, nn

from timbre_methods.contract import Site
from timbre_methods.errors import AdapterMismatch, InvalidTensors, UnsupportedMethod
from timbre_methods.registry import check_adapter, derive, method_for

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "kasa": {"kasa_config": KasaConfig()},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "patterns": {"r": 4, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 1}},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_are_those_of_peft(
    llama: nn.Module, agrees_with_peft: Callable[..., None], kind: str, options: dict[str, Any]
) -> None:
    agrees_with_peft(llama, LoraConfig(target_modules=LAYERS, **KINDS[kind], **options), std=0.2)


def test_pissa_on_conv1d_gives_the_logits_of_peft(
    gpt2: nn.Module, agrees_with_peft: Callable[..., None]
) -> None:
    layers = ["c_fc", "attn.c_proj"]
    config = LoraConfig(r=3, target_modules=layers, fan_in_fan_out=True, init_lora_weights="pissa")
    agrees_with_peft(gpt2, config, std=0.2)


def test_olora_on_a_square_conv1d_gives_the_logits_of_peft(
    gpt2: nn.Module, agrees_with_peft: Callable[..., None]
) -> None:
    """PEFT decomposes the stored matrix, which lies transposed there."""
    config = LoraConfig(
        r=3, lora_alpha=6, target_modules=["attn.c_proj"], fan_in_fan_out=True, init_lora_weights="olora"
    )
    agrees_with_peft(gpt2, config, std=0.2)


@pytest.mark.parametrize("shapes", [((2, 6), (7, 2)), ((2, 7), (6, 2))], ids=["fitting", "as PEFT's"])
def test_olora_on_a_conv1d_that_is_not_square_is_refused(
    shapes: tuple[tuple[int, int], tuple[int, int]], site: Callable[..., Site]
) -> None:
    base = replace(site(out_features=7, in_features=6), is_transposed=True)
    stem = f"base_model.model.{base.path}"
    given = {f"{stem}.lora_{key}.weight": torch.ones(shape) for key, shape in zip("AB", shapes, strict=True)}
    raw = {"peft_type": "LORA", "r": 2, "init_lora_weights": "olora"}
    with pytest.raises(InvalidTensors, match=r"OLoRA on a Conv1D of 6 x 7 is not served: PEFT's factors fit"):
        check_adapter(raw, given, {base.path: base})


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_moved_does_not_depend_on_signs(kind: str, site: Callable[..., Site]) -> None:
    """The product alone matters, and it is the part of W that the paper says."""
    base = site(out_features=7, in_features=6)
    raw = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **KINDS[kind]}
    raw = {**raw, "kasa_config": {"beta": 1.0}} if kind == "kasa" else raw
    stem = f"base_model.model.{base.path}"
    given = {f"{stem}.lora_A.weight": torch.zeros(2, 6), f"{stem}.lora_B.weight": torch.zeros(7, 2)}
    if kind == "kasa":
        given[f"{stem}.lora_diag"] = torch.ones(2)
    found = derive(raw, given, {base.path: base})
    a_RI, b_OR = (found[f"derived.{base.path}.{key}"].double() for key in ("moved_A", "moved_B"))
    u, s, v = torch.linalg.svd(base.weight_OI.double(), full_matrices=False)
    q, r = torch.linalg.qr(base.weight_OI.double())
    expected = {
        "pissa": u[:, :2] @ s[:2].diag() @ v[:2],
        "olora": 2 * q[:, :2] @ r[:2],
        "kasa": u[:, -2:] @ s[-2:].diag() @ v[-2:],
    }[kind]
    torch.testing.assert_close(b_OR @ a_RI, expected, atol=1e-5, rtol=1e-5)


def test_kasa_needs_a_rank_below_the_layers(site: Callable[..., Site]) -> None:
    base = site(out_features=3, in_features=5)
    stem = f"base_model.model.{base.path}"
    given: dict[str, Tensor] = {
        f"{stem}.lora_A.weight": torch.zeros(3, 5),
        f"{stem}.lora_B.weight": torch.zeros(3, 3),
        f"{stem}.lora_diag": torch.ones(3),
    }
    raw = {"peft_type": "LORA", "r": 3, "kasa_config": {"beta": 1.0}}
    with pytest.raises(InvalidTensors, match=r"rank 3 for a layer of \[3, 5\], expected less than 3"):
        derive(raw, given, {base.path: base})


@pytest.mark.parametrize(
    ("initialiser", "reason"),
    [
        ("pissa_niter_4", "unseeded random SVD"),
        ("corda", "training data that is not in the file"),
        ("lora_ga", "training gradients"),
        ("loftq", "quantised base"),
        ("surprise", "no such initialiser"),
    ],
)
def test_what_cannot_be_made_again_is_refused(initialiser: str, reason: str) -> None:
    raw = {"peft_type": "LORA", "init_lora_weights": initialiser}
    with pytest.raises(UnsupportedMethod, match=reason):
        method_for(raw).parse(raw)


def test_dora_over_a_moved_weight_is_refused() -> None:
    raw = {"peft_type": "LORA", "init_lora_weights": "pissa", "use_dora": True}
    with pytest.raises(UnsupportedMethod, match="made good for plain LoRA alone"):
        method_for(raw).parse(raw)


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_that_is_tied_to_its_embedding_is_refused(
    kind: str, tied_llama: nn.Module, evaluate: ModuleType, write_with_peft: Callable[..., Any]
) -> None:
    """PEFT moves the table that both multiply by, so its embedding moves, too."""
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], **KINDS[kind])
    written = write_with_peft(tied_llama, config, save_embedding_layers=False)
    with pytest.raises(
        InvalidTensors, match=r"lm_head: this layer multiplies by the table of 'model.embed_to"
    ):
        check_adapter(written.config, written.tensors, evaluate.all_sites(tied_llama))


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_whose_moved_weight_was_saved_gives_the_logits_of_peft(
    kind: str, llama: nn.Module, agrees_with_peft: Callable[..., None]
) -> None:
    """PEFT saves the weights of an adapted head of its own accord, without what it took out."""
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], **KINDS[kind])
    agrees_with_peft(llama, config, std=0.2)


@pytest.mark.parametrize("is_moved", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_must_be_the_base_without_what_was_taken_out(
    dtype: torch.dtype, is_moved: bool, site: Callable[..., Site]
) -> None:
    base = site(path="lm_head", out_features=7, in_features=6)
    base = replace(base, weight_OI=base.weight_OI.to(dtype))
    raw = {"peft_type": "LORA", "r": 2, "init_lora_weights": "pissa"}
    stem = "base_model.model.lm_head"
    given = {f"{stem}.lora_A.weight": torch.ones(2, 6), f"{stem}.lora_B.weight": torch.ones(7, 2)}
    u_OK, s_K, v_KI = torch.linalg.svd(base.weight_OI.double(), full_matrices=False)
    rest_OI = u_OK[:, 2:] @ s_K[2:].diag() @ v_KI[2:]
    copy_OI = rest_OI.to(dtype) if is_moved else base.weight_OI
    check_adapter(raw, {**given, f"{stem}.base_layer.weight": copy_OI}, {base.path: base})
    if is_moved:
        derived = derive(raw, {**given, f"{stem}.base_layer.weight": copy_OI}, {base.path: base})
        assert set(derived) == {"derived.lm_head.moved_A", "derived.lm_head.moved_B"}
        copy_OI = copy_OI + copy_OI.abs().max() / 50 * torch.ones(7, 6, dtype=dtype).tril()
    with pytest.raises(AdapterMismatch, match="found other values than this base has there"):
        derive(raw, {**given, f"{stem}.base_layer.weight": copy_OI}, {base.path: base})
