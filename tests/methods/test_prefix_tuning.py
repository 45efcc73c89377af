"""Learned KV entries before a request's own, through the real engine, against PEFT."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig
from torch import nn
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

from timbre_methods.errors import AdapterMismatch, InvalidConfig, InvalidTensors

V = 6


def prefix_config(**options: Any) -> PrefixTuningConfig:
    return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=V, **options)


@pytest.fixture
def prefix(llama: nn.Module, write_with_peft: Callable[..., Any]) -> Any:
    return write_with_peft(llama, prefix_config(), std=1.0)


@pytest.fixture
def mistral(tiny_models: ModuleType) -> nn.Module:
    model: nn.Module = tiny_models.mistral()
    return model


@pytest.mark.parametrize("budget", [64, 4, 1], ids="budget {}".format)
def test_greedy_text_is_peft_s_also_in_chunks_smaller_than_the_prefix(
    llama: nn.Module, prefix: Any, as_peft: Any, budget: int
) -> None:
    as_peft.serves(llama, prefix, budget=budget)


def test_a_projection_of_training_is_not_needed(
    llama: nn.Module, write_with_peft: Callable[..., Any], as_peft: Any
) -> None:
    config = prefix_config(prefix_projection=True, encoder_hidden_size=20)
    as_peft.serves(llama, write_with_peft(llama, config))


@pytest.mark.parametrize("budget", [64, 3], ids="budget {}".format)
def test_a_window_slides_off_the_prefix_as_peft_s_does(
    mistral: nn.Module, write_with_peft: Callable[..., Any], as_peft: Any, budget: int
) -> None:
    as_peft.serves(mistral, write_with_peft(mistral, prefix_config(), std=1.0), budget=budget)


def test_layers_without_keys_of_their_own_see_the_prefix_of_those_they_share(
    engine_bench: ModuleType, write_with_peft: Callable[..., Any], as_peft: Any
) -> None:
    torch.manual_seed(15)
    config = Gemma3nTextConfig(
        vocab_size=61,
        vocab_size_per_layer_input=61,
        hidden_size=32,
        hidden_size_per_layer_input=8,
        intermediate_size=48,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        max_position_embeddings=64,
        laurel_rank=4,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 4,
        initializer_range=0.2,
        pad_token_id=0,
    )
    model = Gemma3nForCausalLM(config).eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Prefix tuning injected into layers")
        written = write_with_peft(model, prefix_config(), std=1.0)
        as_peft.serves(model, written, budget=4, num_tokens=4)
    shared = [layer.shares_with for layer in engine_bench.EngineBench(model).frame.attention]
    assert shared == [None, None, 0, 1]


def test_requests_of_one_prefix_share_its_blocks(
    llama: nn.Module, engine_bench: ModuleType, prefix: Any, prompts: list[list[int]]
) -> None:
    bench = engine_bench.EngineBench(llama)
    bench.put("x", prefix.config, prefix.tensors)
    bench.put("y", prefix.config, {key: -tensor for key, tensor in prefix.tensors.items()})
    long, short = bench.submit(prompts[1], "x"), bench.submit(prompts[0], "x")
    first = bench.run()
    one, two = bench.submit(prompts[1], "x"), bench.submit(prompts[0], "x")
    bench.step()
    tables = [sequence.block_table for sequence in bench.scheduler._running]
    assert tables[0][0] == tables[1][0], "the block of the first 4 virtual tokens"
    answers = bench.run()
    assert len(first[long].token_ids) == 8
    assert (answers[one].cached_tokens, answers[two].cached_tokens) == (0, 0), "told with the first token"
    assert first[long].token_ids[1:] == answers[one].token_ids
    assert first[short].token_ids[1:] == answers[two].token_ids
    assert bench.answer(prompts[1], "y").token_ids != first[long].token_ids


def test_every_kind_of_adapter_in_one_batch_and_through_preemption(
    llama: nn.Module, prefix: Any, write_with_peft: Callable[..., Any], as_peft: Any
) -> None:
    written = {
        "prefix": prefix,
        "prompt": write_with_peft(llama, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
        "lora": write_with_peft(llama, LoraConfig(r=4, target_modules=["q_proj", "o_proj", "down_proj"])),
    }
    as_peft.serves_beside_the_base(llama, written, 16, budget=9, num_tokens=12)


def test_a_bf16_base_gives_what_peft_gives(llama: nn.Module, prefix: Any, as_peft: Any) -> None:
    as_peft.serves_in_bf16(llama, prefix)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"num_virtual_tokens": 5}, InvalidTensors, r"found shape \[6, 96\], expected \[5, 96\]"),
        ({"num_layers": 3}, AdapterMismatch, r"found \(3, 2, 24\), expected \(2, 2, 24\)"),
        ({"num_attention_heads": 4}, AdapterMismatch, r"found \(2, 4, 24\)"),
        ({"token_dim": 48}, AdapterMismatch, r"found \(2, 2, 48\)"),
        ({"num_layers": None}, InvalidConfig, "num_layers"),
    ],
)
def test_what_does_not_fit_is_refused(
    llama: nn.Module, engine_bench: ModuleType, prefix: Any, changes: Any, error: type[Exception], words: str
) -> None:
    bench = engine_bench.EngineBench(llama)
    with pytest.raises(error, match=words):
        bench.put("x", {**prefix.config, **changes}, prefix.tensors)
