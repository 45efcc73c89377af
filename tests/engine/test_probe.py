"""What the probe finds in models of known build, and whom it refuses with which reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import (
    DeepseekV3Config,
    FalconConfig,
    GPTJConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
)
from transformers.pytorch_utils import Conv1D

from timbre_server.adapters.groups import Block, LinearGroup, LoneLayer
from timbre_server.engine.attention import ATTENTION_NAME, install_attention
from timbre_server.engine.deny_list import refuse_by_config
from timbre_server.engine.linears import features, is_linear, weight_of
from timbre_server.engine.messages import SiteShape
from timbre_server.engine.probe import ProbeResult, probe
from timbre_server.errors import UnsupportedModel

TinyModel = Callable[[str], PreTrainedModel]
ModelOf = Callable[[PreTrainedConfig], PreTrainedModel]


def probed(model: PreTrainedModel) -> ProbeResult:
    install_attention(model)
    return probe(model)


def test_llama_reads_qkv_and_gate_up_in_groups_and_ends_in_the_head(tiny_model: TinyModel) -> None:
    result = probed(tiny_model("llama"))
    layer = "model.layers.1"
    assert result.groups[4:8] == (
        LinearGroup(tuple(f"{layer}.self_attn.{name}_proj" for name in "qkv")),
        LinearGroup((f"{layer}.self_attn.o_proj",)),
        LinearGroup((f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj")),
        LinearGroup((f"{layer}.mlp.down_proj",)),
    )
    assert result.groups[-1] == LinearGroup(("lm_head",), is_head=True)
    assert len(result.groups) == 13
    assert result.sites[0] == SiteShape("model.layers.0.self_attn.q_proj", 32, 32, False)
    linear = [site for site in result.sites if site.kind == "linear"]
    assert linear[-1] == SiteShape("lm_head", 131, 32, False, tied_to="model.embed_tokens")
    assert [(s.num_kv_heads, s.key_dim, s.value_dim) for s in result.kv_shapes] == [(2, 8, 8)] * 3


@pytest.mark.parametrize("family", ["llama", "phi3", "phi", "cohere", "gpt2", "gemma2", "qwen3_moe"])
def test_sites_are_in_the_order_in_which_the_model_defines_its_layers(
    family: str, tiny_model: TinyModel
) -> None:
    """Phi-3 defines an output projection before what it calls first, and Uni-LoRA counts layers."""
    model = tiny_model(family)
    found = [site.path for site in probed(model).sites if site.kind == "linear"]
    assert found == [path for path, _ in model.named_modules() if path in found]


@pytest.mark.parametrize(("family", "last"), [("phi", "fc1"), ("cohere", "up_proj")])
def test_a_group_ends_where_another_layer_is_called(family: str, last: str, tiny_model: TinyModel) -> None:
    """Parallel blocks read one tensor in attention and in the MLP after it."""
    attention, output, mlp, *_ = [group.paths for group in probed(tiny_model(family)).groups]
    assert [path.rpartition(".")[2] for path in attention] == ["q_proj", "k_proj", "v_proj"]
    assert len(output) == 1
    assert mlp[-1].endswith(last)


@pytest.mark.parametrize(
    ("family", "layers", "last"),
    [
        ("llama", "model.layers", "down_proj"),
        ("gemma2", "model.layers", "down_proj"),
        ("phi3", "model.layers", "down_proj"),
        ("gpt2", "transformer.h", "c_proj"),
    ],
)
def test_an_mlp_is_a_block_that_ends_in_its_last_layer(
    family: str, layers: str, last: str, tiny_model: TinyModel
) -> None:
    result = probed(tiny_model(family))
    paths = [f"{layers}.{number}.mlp" for number in range(3)]
    assert list(result.blocks) == [Block(path, 32, f"{path}.{last}") for path in paths]
    shapes = [site for site in result.sites if site.kind == "block"]
    assert shapes == [SiteShape(path, 32, 32, has_bias=False, kind="block") for path in paths]


def test_fused_models_have_groups_of_one(tiny_model: TinyModel) -> None:
    gpt2 = probed(tiny_model("gpt2"))
    assert [group.paths for group in gpt2.groups[:4]] == [
        ("transformer.h.0.attn.c_attn",),
        ("transformer.h.0.attn.c_proj",),
        ("transformer.h.0.mlp.c_fc",),
        ("transformer.h.0.mlp.c_proj",),
    ]
    assert gpt2.sites[0] == SiteShape("transformer.h.0.attn.c_attn", 96, 32, True, is_transposed=True)
    assert {len(group.paths) for group in probed(tiny_model("phi3")).groups} == {1}


def test_embeddings_of_tokens_and_norms_are_found_by_what_they_do(tiny_model: TinyModel) -> None:
    layers = [f"model.layers.{i}.{name}" for i in range(3) for name in ("input", "post_attention")]
    paths = [f"{layer}_layernorm" for layer in layers]
    llama = probed(tiny_model("llama"))
    assert llama.lone == (
        LoneLayer("model.embed_tokens", "embedding"),
        *(LoneLayer(path, "norm") for path in [*paths, "model.norm"]),
    )
    shapes = {site.path: site for site in llama.sites}
    assert shapes["model.embed_tokens"] == SiteShape(
        "model.embed_tokens", 32, 131, False, "embedding", is_transposed=True
    )
    assert shapes["model.norm"] == SiteShape("model.norm", 32, 32, False, "norm")
    gpt2 = probed(tiny_model("gpt2"))
    assert gpt2.lone[:2] == (
        LoneLayer("transformer.wte", "embedding"),
        LoneLayer("transformer.h.0.ln_1", "norm"),
    )
    assert not any("wpe" in layer.path for layer in gpt2.lone), "positions are no tokens"
    assert {site.has_bias for site in gpt2.sites if site.kind == "norm"} == {True}
    assert [layer.kind for layer in probed(tiny_model("gemma2")).lone] == ["embedding"] + ["norm"] * 13


def test_a_norm_of_each_head_sees_several_rows_for_a_token(tiny_model: TinyModel) -> None:
    rows = {layer.path: layer.rows_per_token for layer in probed(tiny_model("qwen3")).lone}
    assert rows["model.layers.0.self_attn.q_norm"] == 4
    assert rows["model.layers.0.self_attn.k_norm"] == 2
    assert rows["model.norm"] == 1


def test_a_head_with_a_weight_of_its_own_is_not_tied(tiny_model: TinyModel) -> None:
    assert [site.tied_to for site in probed(tiny_model("qwen2")).sites if site.path == "lm_head"] == [None]


def test_windows_and_soft_caps_are_found_layer_by_layer(tiny_model: TinyModel) -> None:
    layers = probed(tiny_model("gemma2")).layers
    assert [layer.window for layer in layers] == [8, None, 8]
    assert [layer.softcap for layer in layers] == [5.0, 5.0, 5.0]
    assert layers[0].scale == 256**-0.5


def test_sinks_are_found(model_of: ModelOf) -> None:
    config = GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1, pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    assert [layer.has_sinks for layer in probed(model_of(config)).layers] == [True, True]


def test_keys_and_values_of_different_size_are_found(model_of: ModelOf) -> None:
    config = DeepseekV3Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=6, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        first_k_dense_replace=1,
    )  # fmt: skip
    shape = probed(model_of(config)).kv_shapes[0]
    assert (shape.num_kv_heads, shape.key_dim, shape.value_dim) == (2, 12, 6)


def test_our_attention_gets_no_mask_from_transformers(tiny_model: TinyModel) -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    probed(tiny_model("gemma3"))
    assert ATTENTION_NAME not in ALL_MASK_ATTENTION_FUNCTIONS


def test_linears_are_known_by_their_features_and_read_in_one_orientation() -> None:
    conv, linear = Conv1D(5, 3), nn.Linear(3, 5)
    assert [is_linear(m) for m in (conv, linear, nn.Embedding(5, 3), nn.LayerNorm(3))] == [
        True,
        True,
        False,
        False,
    ]
    assert features(conv) == features(linear) == (3, 5)
    x_TI = torch.randn(4, 3)
    for module in (conv, linear):
        torch.testing.assert_close(x_TI @ weight_of(module).T + module.bias, module(x_TI))


def test_a_weight_that_is_no_float_matrix_is_not_read() -> None:
    linear = nn.Linear(3, 5)
    linear.weight = nn.Parameter(torch.zeros(5, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="no dense floating-point weight"):
        weight_of(linear)


REFUSED_BY_CONFIG = {
    "dynamic rope": (
        LlamaConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}),
        r"llama.*rotary embedding is of type dynamic",
    ),
    "longrope": (
        Phi3Config(
            hidden_size=32,
            num_attention_heads=4,
            pad_token_id=0,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 64,
            },
        ),
        r"phi3.*rotary embedding is of type longrope",
    ),
    "chunked": (Llama4TextConfig(num_hidden_layers=4), r"llama4_text.*chunked_attention"),
    "encoder-decoder": (T5Config(), r"t5.*encoder-decoder"),
}


@pytest.mark.parametrize("name", REFUSED_BY_CONFIG)
def test_a_config_that_cannot_be_served_is_refused_with_family_and_reason(name: str) -> None:
    config, message = REFUSED_BY_CONFIG[name]
    with pytest.raises(UnsupportedModel, match=message):
        refuse_by_config(config)


_SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
REFUSED_BY_PROBE = {
    "falcon": (
        FalconConfig(**_SMALL, num_attention_heads=4),
        r"falcon.*0 of 2 layers called transformers' attention interface",
    ),
    "gptj": (
        GPTJConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
        r"gptj.*0 of 2 layers called transformers' attention interface",
    ),
    "mamba": (MambaConfig(**_SMALL, state_size=4), r"mamba.*takes no position_ids"),
}


@pytest.mark.parametrize("name", REFUSED_BY_PROBE)
def test_a_model_without_paged_attention_is_refused_with_family_and_reason(
    name: str, model_of: ModelOf
) -> None:
    config, message = REFUSED_BY_PROBE[name]
    with pytest.raises(UnsupportedModel, match=message):
        probed(model_of(config))


def test_a_window_that_only_the_mask_knows_is_refused(tiny_model: TinyModel) -> None:
    model = tiny_model("gemma3")
    model.model.layers[0].self_attn.sliding_window = None
    with pytest.raises(UnsupportedModel, match="layer 0 is declared sliding_attention"):
        probed(model)
