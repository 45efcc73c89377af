from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from timbre_methods import beside
from timbre_methods.contract import Site
from timbre_methods.errors import AdapterMismatch, InvalidConfig, InvalidTensors
from timbre_methods.program import Dense, TokenRows
from timbre_methods.registry import check_adapter, compile_adapter, derive

TABLE = torch.arange(28.0).view(7, 4)
SITES = {
    "embed": Site("embed", TABLE.T, None, "embedding", is_transposed=True),
    "q": Site("q", torch.eye(4), torch.zeros(4)),
    "norm": Site("norm", torch.ones(4), None, "norm"),
    "head": Site("head", TABLE, None, tied_to="embed"),
}
RAW = {"peft_type": "IA3"}
GAIN = {"base_model.model.q.ia3_l": torch.ones(4, 1)}
LORA = {"peft_type": "LORA", "r": 1}
FACTORS = {
    "base_model.model.embed.lora_embedding_A": torch.ones(1, 7),
    "base_model.model.embed.lora_embedding_B": torch.ones(4, 1),
}


@pytest.mark.parametrize("base", ["llama", "tied_llama", "gemma2"])
@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"modules_to_save": ["norm"]},
        {"modules_to_save": ["gate_proj", "layers.1.input_layernorm"]},
    ],
    ids=["head", "embedding", "embedding and tied head", "every norm", "linear"],
)
def test_replaced_layers_give_the_logits_of_peft(
    base: str, options: Any, request: pytest.FixtureRequest, agrees_with_peft: Callable[..., None]
) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], **options)
    agrees_with_peft(request.getfixturevalue(base), config)


@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], modules_to_save=["lm_head"]),
        peft.FourierFTConfig(n_frequency=9, target_modules=["q_proj"], modules_to_save=["norm", "o_proj"]),
        peft.ShiraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
        peft.LoraConfig(use_dora=True, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        peft.LNTuningConfig(target_modules=["norm"], modules_to_save=["lm_head"]),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_layers_replaced_beside_any_method_give_the_logits_of_peft(
    config: peft.PeftConfig, llama: nn.Module, agrees_with_peft: Callable[..., None]
) -> None:
    agrees_with_peft(llama, config)


def test_replaced_layers_that_are_stored_transposed_give_the_logits_of_peft(
    gpt2: nn.Module, agrees_with_peft: Callable[..., None]
) -> None:
    names = ["wte", "attn.c_proj", "c_fc", "ln_f"]
    agrees_with_peft(
        gpt2, peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=names)
    )


def test_replaced_layers_on_a_bf16_base_are_as_near_as_peft(
    llama: nn.Module, agrees_in_bf16: Callable[..., None]
) -> None:
    names = ["lm_head", "embed_tokens", "norm"]
    agrees_in_bf16(llama, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=names), std=0.1)


def test_embeddings_that_were_saved_untrained_change_nothing(
    llama: nn.Module, agrees_with_peft: Callable[..., None]
) -> None:
    agrees_with_peft(llama, peft.LoraConfig(r=2, target_modules=["q_proj"]), save_embedding_layers=True)


@pytest.mark.parametrize(
    ("option", "value", "error", "message"),
    [
        (
            "modules_to_save",
            ["head"],
            InvalidTensors,
            r"head\.weight is missing, while modules_to_save names",
        ),
        ("modules_to_save", ["q"], InvalidTensors, r"q\.weight is missing"),
        ("modules_to_save", "head", InvalidConfig, "modules_to_save"),
        ("modules_to_save", [1], InvalidConfig, "modules_to_save"),
        ("trainable_token_indices", [1], InvalidTensors, "trainable_tokens_delta is missing"),
        ("trainable_token_indices", {"embed": [-1]}, InvalidConfig, "trainable_token_indices"),
        ("trainable_token_indices", 5, InvalidConfig, "trainable_token_indices"),
    ],
)
def test_an_option_that_the_file_does_not_keep_is_refused(
    option: str, value: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        compile_adapter({**RAW, option: value}, GAIN, SITES)


def test_a_layer_that_the_base_lacks_may_be_named_and_may_not_be_brought() -> None:
    named = {**RAW, "modules_to_save": ["classifier"]}
    assert list(compile_adapter(named, GAIN, SITES).sites) == ["q"]
    for layer in ("classifier", "q_norm"):
        raw = {**RAW, "modules_to_save": ["classifier", "norm"]}
        brought = {**GAIN, "base_model.model.norm.weight": torch.ones(4)}
        brought |= {f"base_model.model.{layer}.weight": torch.ones(2, 4)}
        with pytest.raises(
            AdapterMismatch, match=rf"no .* '{layer}' that can be adapted here; below '' it has"
        ):
            compile_adapter(raw, brought, SITES)
    with pytest.raises(InvalidTensors, match=r"classifier\.weight' is surplus"):
        compile_adapter(RAW, {**GAIN, "base_model.model.classifier.weight": torch.ones(2, 4)}, SITES)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("head.weight", torch.ones(8, 4), r"head\.weight: found shape \[8, 4\], expected \[7, 4\]"),
        ("embed.weight", torch.ones(4, 7), r"embed\.weight: found shape \[4, 7\], expected \[7, 4\]"),
        ("head.bias", torch.ones(7), r"head\.bias is surplus: this layer of the base has no bias"),
        ("norm.weight", torch.ones(4, dtype=torch.int8), r"norm\.weight: found dtype int8"),
        ("q.weight", torch.ones(4, 4), "replaces values of 'q' and adapts it, too"),
        ("embed.token_adapter.trainable_tokens_delta", torch.ones(1, 4), "is surplus"),
    ],
)
def test_a_layer_that_does_not_fit_is_refused(name: str, tensor: Tensor, message: str) -> None:
    with pytest.raises(InvalidTensors, match=message):
        check_adapter(RAW, {**GAIN, f"base_model.model.{name}": tensor}, SITES)


def test_lists_of_tokens_that_contradict_each_other_are_refused() -> None:
    rows = {"base_model.model.embed.token_adapter.trainable_tokens_delta": torch.ones(1, 4)}
    for listed in ({"embed": [1], "bed": [2]}, {"other": [1]}):
        with pytest.raises(InvalidConfig, match=r"trainable_token_indices: found . lists for 'embed'"):
            compile_adapter({**RAW, "trainable_token_indices": listed}, {**GAIN, **rows}, SITES)


def test_a_parameter_that_is_brought_whole_is_refused_with_the_option_that_brought_it() -> None:
    sites = {**SITES, "mlp.gate.weight": Site("mlp.gate.weight", torch.ones(3, 4), None, "parameter")}
    with pytest.raises(
        AdapterMismatch, match=r"is a parameter, and none is replaced here; .* modules_to_save"
    ):
        compile_adapter(
            {**RAW, "modules_to_save": ["gate"]}, {**GAIN, "base_model.model.mlp.gate.weight": TABLE}, sites
        )


def test_tokens_of_an_embedding_that_is_not_adapted_here_are_refused_by_its_name() -> None:
    rows = {"base_model.model.wpe.token_adapter.trainable_tokens_delta": torch.ones(1, 4)}
    with pytest.raises(
        AdapterMismatch, match="no embedding or linear layer or norm 'wpe' that can be adapted"
    ):
        compile_adapter({**RAW, "trainable_token_indices": {"wpe": [1]}}, {**GAIN, **rows}, SITES)


def test_tokens_of_a_table_and_an_adapter_on_the_head_that_is_tied_to_it_are_refused() -> None:
    raw = {**LORA, "trainable_token_indices": [1]}
    given = {
        "base_model.model.embed.token_adapter.trainable_tokens_delta": torch.ones(1, 4),
        "base_model.model.head.lora_A.weight": torch.ones(1, 4),
        "base_model.model.head.lora_B.weight": torch.ones(7, 1),
    }
    with pytest.raises(
        InvalidTensors, match="adapts 'head', which multiplies by the table of 'embed', and repl"
    ):
        compile_adapter(raw, given, SITES)


def test_a_head_with_a_weight_of_its_own_does_not_follow_the_tokens_of_its_embedding() -> None:
    raw = {**RAW, "trainable_token_indices": [1], "modules_to_save": ["head"]}
    tensors = {
        **GAIN,
        "base_model.model.embed.token_adapter.trainable_tokens_delta": torch.ones(1, 4),
        "base_model.model.head.weight": torch.zeros(7, 4),
    }
    sites = compile_adapter(raw, tensors, SITES).sites
    assert [type(part) for part in sites["embed"]] == [TokenRows]
    assert [type(part) for part in sites["head"]] == [Dense]


def test_token_rows_of_a_layer_that_is_replaced_as_a_whole_are_refused() -> None:
    raw = {**RAW, "trainable_token_indices": [1]}
    rows = {"base_model.model.embed.token_adapter.trainable_tokens_delta": torch.ones(1, 4)}
    with pytest.raises(InvalidTensors, match="the file replaces this layer's whole weight; leave one"):
        compile_adapter(raw, {**GAIN, **rows, "base_model.model.embed.weight": torch.ones(7, 4)}, SITES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_copy_of_the_bases_own_weight_is_accepted_in_any_precision(dtype: torch.dtype) -> None:
    table = torch.randn(7, 4)
    sites = {**SITES, "embed": Site("embed", table.T, None, "embedding", is_transposed=True)}
    tensors = {**FACTORS, "base_model.model.embed.base_layer.weight": table.to(dtype)}
    inspection = check_adapter(LORA, tensors, sites)
    assert derive(LORA, tensors, sites) == {}
    assert list(compile_adapter(LORA, tensors, sites).sites) == ["embed"]
    assert inspection.parameters == 11, "the copy is not learned"


@pytest.mark.parametrize("cells", [2**22, 5])
def test_a_copy_of_another_bases_weight_is_refused(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "CELLS_AT_ONCE", cells)
    other = TABLE.clone()
    other[6, 3] += 1e-3
    tensors = {**FACTORS, "base_model.model.embed.base_layer.weight": other}
    with pytest.raises(
        AdapterMismatch, match=r"embed\.base_layer\.weight: found other values than this base"
    ):
        derive(LORA, tensors, SITES)
    with pytest.raises(InvalidTensors, match=r"found shape \[4, 7\], expected \[7, 4\]"):
        check_adapter(LORA, {**tensors, "base_model.model.embed.base_layer.weight": other.T}, SITES)


@pytest.mark.parametrize(
    ("raw", "tensors", "message"),
    [
        (
            {"peft_type": "FOURIERFT"},
            {"base_model.model.embed.fourierft_spectrum": torch.ones(1000)},
            r"'embed' is an embedding, and fourierft adapts linear layers alone",
        ),
        (
            LORA,
            {"base_model.model.norm.lora_A.weight": torch.ones(1, 4)},
            "'norm' is a norm, and lora adapts",
        ),
    ],
)
def test_a_method_says_by_name_which_layers_it_adapts(
    raw: dict[str, Any], tensors: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(AdapterMismatch, match=message):
        check_adapter(raw, tensors, SITES)
