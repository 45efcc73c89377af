from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidConfig, InvalidTensors, UnsupportedMethod
from timbre_methods.program import Diagonal, LowRank, Part
from timbre_methods.registry import method_for, methods

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

OPTIONS = {
    "plain": {"r": 4, "lora_alpha": 8},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "fractional alpha": {"r": 3, "lora_alpha": 1.5},
    "rank pattern": {"r": 4, "rank_pattern": {"v_proj": 2, "layers.1.mlp.down_proj": 7}},
    "alpha pattern": {"r": 4, "alpha_pattern": {"q_proj": 1, "^model.layers.0.self_attn.k_proj": 20}},
    "alpha expression": {"r": 4, "alpha_pattern": {r"layers\.[01]\.(mlp|x).*": 2, ".*_proj": 16}},
    "lora bias": {"r": 4, "lora_bias": True, "target_modules": ["q_proj", "k_proj", "v_proj"]},
    "gaussian": {"r": 4, "init_lora_weights": "gaussian"},
    "orthogonal": {"r": 4, "init_lora_weights": "orthogonal"},
    "with the head": {"r": 4, "target_modules": ["q_proj", "lm_head"]},
    "all linear": {"r": 2, "target_modules": "all-linear"},
    "a regex": {"r": 2, "target_modules": r".*layers\.1.*_proj"},
    "some layers": {"r": 2, "layers_to_transform": [0]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_lora_gives_the_logits_of_peft(
    llama: nn.Module, agrees_with_peft: Callable[..., None], options: dict[str, object]
) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", **{"target_modules": LAYERS, **options})
    agrees_with_peft(llama, config, std=0.2, save_embedding_layers=False)


@pytest.mark.parametrize("modules", [["c_attn"], ["c_attn", "c_proj", "c_fc"]])
def test_lora_on_conv1d_gives_the_logits_of_peft(
    gpt2: nn.Module, agrees_with_peft: Callable[..., None], modules: list[str]
) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=modules, fan_in_fan_out=True)
    agrees_with_peft(gpt2, config, std=0.2)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_lora_on_a_bf16_base_is_as_near_as_peft(
    llama: nn.Module, agrees_in_bf16: Callable[..., None], use_rslora: bool
) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=LAYERS, use_rslora=use_rslora)
    agrees_in_bf16(llama, config, std=0.1)


def test_two_patterns_for_one_layer_are_read_as_peft_reads_the_file(
    llama: nn.Module, agrees_with_peft: Callable[..., None]
) -> None:
    # The file is sorted, so the long key comes first there although the short one was first in training.
    alphas = {"v_proj": 1, "layers.0.self_attn.v_proj": 30}
    agrees_with_peft(llama, LoraConfig(r=4, target_modules=["v_proj"], alpha_pattern=alphas))


@pytest.mark.parametrize("initialiser", ["pissa", "olora"])
def test_a_converted_adapter_gives_the_logits_of_the_moved_base(
    llama: nn.Module,
    initialiser: str,
    tmp_path: Path,
    token_ids: Tensor,
    timbre_logits: Callable[..., Tensor],
    written: Callable[[Path], Any],
    quiet: Callable[[], Any],
) -> None:
    torch.manual_seed(8)
    config = LoraConfig(
        r=3, lora_alpha=6, target_modules=["q_proj", "up_proj"], init_lora_weights=initialiser
    )
    with quiet(), torch.no_grad():
        trained = peft.get_peft_model(copy.deepcopy(llama), config)
        trained.peft_config["default"].init_lora_weights = True
        trained.save_pretrained(tmp_path / "initial")
        trained.peft_config["default"].init_lora_weights = initialiser
        for name, parameter in trained.named_parameters():
            if "lora_" in name:
                parameter.data += torch.randn_like(parameter) * 0.1
        expected = trained.eval()(token_ids).logits
        warnings.filterwarnings("ignore", ".*changes the base weights of the model", UserWarning)
        trained.save_pretrained(
            tmp_path / "final", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
        )
    actual = timbre_logits(llama, written(tmp_path / "final"), token_ids)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-4)


RAW = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


def tensors(rank: int = 2, out_features: int = 6, in_features: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        f"{Q_PROJ}.lora_A.weight": torch.randn(rank, in_features, generator=generator),
        f"{Q_PROJ}.lora_B.weight": torch.randn(out_features, rank, generator=generator),
    }


def compiled(raw: dict[str, Any], given: dict[str, Tensor], base: Site) -> tuple[Part, ...]:
    method = method_for(raw)
    return method.compile(method.parse(raw), given, {base.path: base}).sites[base.path]


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({}, 2.0),
        ({"use_rslora": True}, 4 / 2**0.5),
        ({"lora_alpha": 1}, 0.5),
        ({"lora_alpha": -3.0}, -1.5),
        ({"alpha_pattern": {"q_proj": 10}}, 5.0),
        ({"alpha_pattern": {"k_proj": 10}}, 2.0),
        ({"alpha_pattern": {"self_attn.*": 10, "q_proj": 1}}, 5.0),
        ({"alpha_pattern": {"q_proj": 0}}, 0.0),
        ({"alpha_pattern": None, "rank_pattern": None}, 2.0),
    ],
)
def test_the_scale_is_folded_into_b(options: dict[str, Any], scale: float, site: Callable[..., Site]) -> None:
    given = tensors()
    (part,) = compiled({**RAW, **options}, given, site())
    assert isinstance(part, LowRank)
    torch.testing.assert_close(part.b_OR, given[f"{Q_PROJ}.lora_B.weight"] * scale)
    assert torch.equal(part.a_RI, given[f"{Q_PROJ}.lora_A.weight"])


def test_peft_defaults_stand_in_for_keys_that_an_old_file_lacks(site: Callable[..., Site]) -> None:
    given = tensors(rank=8)
    (part,) = compiled({"peft_type": "LORA"}, given, site())
    assert isinstance(part, LowRank)
    assert torch.equal(part.b_OR, given[f"{Q_PROJ}.lora_B.weight"])


def test_a_rank_that_the_config_does_not_name_is_refused(site: Callable[..., Site]) -> None:
    with pytest.raises(InvalidTensors, match=r"found rank 3, the config says \[2, 5\]"):
        compiled({**RAW, "rank_pattern": {"anything": 5}}, tensors(rank=3), site())
    assert len(compiled({**RAW, "rank_pattern": {"anything": 3}}, tensors(rank=3), site())) == 1


def test_a_bias_of_b_is_a_scaled_shift_and_leaves_the_bases_bias_alone(site: Callable[..., Site]) -> None:
    bias_O = torch.arange(6.0)
    given = {**tensors(), f"{Q_PROJ}.lora_B.bias": bias_O}
    _, shift = compiled({**RAW, "lora_bias": True}, given, site(bias=True))
    assert isinstance(shift, Diagonal)
    assert shift.side == "output"
    assert shift.shift is not None
    assert torch.equal(shift.gain, torch.ones(6))
    assert torch.equal(shift.shift, 2 * bias_O)
    with pytest.raises(InvalidTensors, match=r"lora_B\.bias is surplus: the config says lora_bias=false"):
        compiled(RAW, given, site())
    with pytest.raises(InvalidTensors, match=r"lora_B\.bias is missing"):
        compiled({**RAW, "lora_bias": True}, tensors(), site())


@pytest.mark.parametrize("initialiser", [True, False, None, "gaussian", "orthogonal", "eva", "mica", "EVA"])
def test_an_initialiser_that_leaves_the_base_alone_is_accepted(initialiser: object) -> None:
    extras = {"eva_config": {"rho": 2.0}, "loftq_config": {"loftq_bits": 4}}
    raw = {**RAW, **extras, "init_lora_weights": initialiser}
    assert method_for(raw).parse(raw).r == 2


@pytest.mark.parametrize(
    ("initialiser", "reason"),
    [
        ("pissa_niter_16", "unseeded random SVD"),
        ("corda", "training data"),
        ("lora_ga", "gradients"),
        ("loftq", "quantised base"),
        ("something_new", "no such initialiser is known"),
    ],
)
def test_an_initialiser_that_moves_the_base_is_refused_with_advice(initialiser: str, reason: str) -> None:
    raw = {**RAW, "init_lora_weights": initialiser}
    with pytest.raises(UnsupportedMethod, match=f"init_lora_weights='{initialiser}' .*{reason}") as refusal:
        method_for(raw).parse(raw)
    convertible = initialiser not in ("something_new", "loftq")
    assert ("path_initial_model_for_weight_conversion" in str(refusal.value)) == convertible


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("alora_invocation_tokens", [5, 6]),
        ("arrow_config", {"top_k": 2}),
        ("kasa_config", {"beta": 1e-4}),
        ("use_dora", True),
    ],
)
def test_a_variant_of_lora_is_never_read_as_lora(option: str, value: object) -> None:
    raw = {**RAW, option: value}
    lora = methods()["lora"]
    assert not lora.claims(raw)
    with pytest.raises(UnsupportedMethod, match=f"'{option}' is on"):
        lora.parse(raw)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 0),
        ("r", 5000),
        ("r", 8.0),
        ("lora_alpha", None),
        ("lora_alpha", 1e300),
        ("use_rslora", "yes"),
        ("use_rslora", 1),
        ("alpha_pattern", {"q_proj": float("nan")}),
        ("alpha_pattern", {"(a+)+": 1}),
        ("alpha_pattern", ["q_proj"]),
        ("rank_pattern", {"q_proj": -1}),
        ("rank_pattern", {"q_proj": [True, False]}),
        ("init_lora_weights", 3),
        ("init_lora_weights", "x" * 100),
    ],
)
def test_a_value_out_of_bounds_is_refused_with_its_key(key: str, value: object) -> None:
    with pytest.raises(InvalidConfig, match=key):
        method_for(RAW).parse({**RAW, key: value})


def test_a_catastrophic_pattern_that_is_not_needed_is_not_read() -> None:
    raw = {**RAW, "rank_pattern": {"(a+)+$": 4}, "target_modules": "(a+)+$"}
    assert method_for(raw).parse(raw).r == 2
