"""Learned KV entries before a request's own, through the real engine, against PEFT."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig
from torch import nn
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig, MistralConfig, MistralForCausalLM

from timbre_methods.errors import AdapterMismatch, InvalidConfig, InvalidTensors

PROMPTS = [[7, 3, 20, 41], [9, 12, 6, 5, 17, 23, 30, 31, 2, 44, 51, 13, 8], [58]]
V = 6


def prefix_config(**options: Any) -> PrefixTuningConfig:
    return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=V, **options)


@pytest.fixture
def prefix(llama: nn.Module, write_with_peft: Callable[..., Any]) -> Any:
    return write_with_peft(llama, prefix_config(), std=1.0)


@pytest.fixture
def mistral() -> MistralForCausalLM:
    """All layers see 8 tokens back."""
    torch.manual_seed(13)
    config = MistralConfig(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=70,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.15,
        sliding_window=8,
    )
    return MistralForCausalLM(config).eval()


@pytest.mark.parametrize("budget", [64, 4, 1], ids="budget {}".format)
def test_greedy_text_is_peft_s_also_in_chunks_smaller_than_the_prefix(
    llama: nn.Module, engine_bench: ModuleType, prefix: Any, peft_greedy: Callable[..., Any], budget: int
) -> None:
    bench = engine_bench.EngineBench(llama, budget=budget)
    bench.put("x", prefix.config, prefix.tensors)
    ids = [bench.submit(prompt, "x") for prompt in PROMPTS]
    answers = bench.run()
    for prompt, request_id in zip(PROMPTS, ids, strict=True):
        tokens, logprobs = peft_greedy(llama, prefix.folder, prompt, 8)
        assert answers[request_id].token_ids == tokens
        assert answers[request_id].logprobs == pytest.approx(logprobs, abs=1e-4)
        assert tokens != bench.answer(prompt).token_ids


def test_a_projection_of_training_is_not_needed(
    llama: nn.Module,
    engine_bench: ModuleType,
    write_with_peft: Callable[..., Any],
    peft_greedy: Callable[..., Any],
) -> None:
    written = write_with_peft(llama, prefix_config(prefix_projection=True, encoder_hidden_size=20))
    bench = engine_bench.EngineBench(llama)
    bench.put("x", written.config, written.tensors)
    assert bench.answer(PROMPTS[0], "x").token_ids == peft_greedy(llama, written.folder, PROMPTS[0], 8)[0]


@pytest.mark.parametrize("budget", [64, 3], ids="budget {}".format)
def test_a_window_slides_off_the_prefix_as_peft_s_does(
    mistral: nn.Module,
    engine_bench: ModuleType,
    write_with_peft: Callable[..., Any],
    peft_greedy: Callable[..., Any],
    budget: int,
) -> None:
    written = write_with_peft(mistral, prefix_config(), std=1.0)
    bench = engine_bench.EngineBench(mistral, budget=budget)
    bench.put("x", written.config, written.tensors)
    for prompt in PROMPTS[:2]:
        tokens, logprobs = peft_greedy(mistral, written.folder, prompt, 8)
        answer = bench.answer(prompt, "x")
        assert answer.token_ids == tokens
        assert answer.logprobs == pytest.approx(logprobs, abs=1e-4)


def test_layers_without_keys_of_their_own_see_the_prefix_of_those_they_share(
    engine_bench: ModuleType, write_with_peft: Callable[..., Any], peft_greedy: Callable[..., Any]
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
        tokens, logprobs = peft_greedy(model, written.folder, PROMPTS[1], 4)
    bench = engine_bench.EngineBench(model, budget=4)
    assert [layer.shares_with for layer in bench.frame.attention] == [None, None, 0, 1]
    bench.put("x", written.config, written.tensors)
    answer = bench.answer(PROMPTS[1], "x", num_tokens=4)
    assert answer.token_ids == tokens
    assert answer.logprobs == pytest.approx(logprobs, abs=1e-4)


def test_requests_of_one_prefix_share_its_blocks(
    llama: nn.Module, engine_bench: ModuleType, prefix: Any
) -> None:
    bench = engine_bench.EngineBench(llama)
    bench.put("x", prefix.config, prefix.tensors)
    bench.put("y", prefix.config, {key: -tensor for key, tensor in prefix.tensors.items()})
    long, short = bench.submit(PROMPTS[1], "x"), bench.submit(PROMPTS[0], "x")
    first = bench.run()
    one, two = bench.submit(PROMPTS[1], "x"), bench.submit(PROMPTS[0], "x")
    bench.step()
    tables = [sequence.block_table for sequence in bench.scheduler._running]
    assert tables[0][0] == tables[1][0], "the block of the first 4 virtual tokens"
    answers = bench.run()
    assert len(first[long].token_ids) == 8
    assert (answers[one].cached_tokens, answers[two].cached_tokens) == (0, 0), "told with the first token"
    assert first[long].token_ids[1:] == answers[one].token_ids
    assert first[short].token_ids[1:] == answers[two].token_ids
    assert bench.answer(PROMPTS[1], "y").token_ids != first[long].token_ids


def test_every_kind_of_adapter_in_one_batch_and_through_preemption(
    llama: nn.Module,
    engine_bench: ModuleType,
    prefix: Any,
    write_with_peft: Callable[..., Any],
    peft_greedy: Callable[..., Any],
) -> None:
    written = {
        "prefix": prefix,
        "prompt": write_with_peft(llama, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
        "lora": write_with_peft(llama, LoraConfig(r=4, target_modules=["q_proj", "o_proj", "down_proj"])),
    }
    bench = engine_bench.EngineBench(llama, num_blocks=16, budget=9, max_len=40)
    for name, each in written.items():
        bench.put(name, each.config, each.tensors)
    asked = [(prompt, name) for prompt in PROMPTS for name in (*written, None)]
    ids = [bench.submit(prompt, name, 12) for prompt, name in asked]
    answers = bench.run()
    assert bench.num_preemptions > 0
    alone = engine_bench.EngineBench(llama)
    for (prompt, name), request_id in zip(asked, ids, strict=True):
        if name is None:
            expected = alone.answer(prompt, num_tokens=12).token_ids
        else:
            expected = peft_greedy(llama, written[name].folder, prompt, 12)[0]
        assert answers[request_id].token_ids == expected, (prompt, name)


def test_a_bf16_base_gives_what_peft_gives(
    llama: nn.Module, engine_bench: ModuleType, prefix: Any, peft_greedy: Callable[..., Any]
) -> None:
    rounded = copy.deepcopy(llama).to(torch.bfloat16)
    bench = engine_bench.EngineBench(rounded)
    bench.put("x", prefix.config, prefix.tensors)
    answer = bench.answer(PROMPTS[0], "x", num_tokens=1)
    assert answer.logprobs == pytest.approx(peft_greedy(rounded, prefix.folder, PROMPTS[0], 1)[1], abs=0.1)


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
