"""Virtual tokens by their embeddings, through the real engine, against PEFT."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig
from torch import nn

from timbre_methods.errors import InvalidConfig, InvalidTensors, UnsupportedMethod
from timbre_methods.registry import method_for
from timbre_server.engine.messages import AdapterUse

V = 6


def prompt_tuning(count: int = V) -> PromptTuningConfig:
    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=count)


@pytest.fixture
def tuned(llama: nn.Module, write_with_peft: Callable[..., Any]) -> Any:
    return write_with_peft(llama, prompt_tuning())


@pytest.mark.parametrize("budget", [64, 4, 1], ids="budget {}".format)
def test_greedy_text_is_peft_s_also_in_chunks_smaller_than_the_prompt(
    llama: nn.Module, tuned: Any, as_peft: Any, budget: int
) -> None:
    as_peft.serves(llama, tuned, budget=budget)


def test_prompt_logprobs_are_those_of_the_request_s_own_tokens(
    llama: nn.Module,
    engine_bench: ModuleType,
    tuned: Any,
    peft_logits: Callable[..., Any],
    prompts: list[list[int]],
) -> None:
    prompt = prompts[1]
    expected_TV = peft_logits(llama, tuned.folder, torch.tensor([prompt]))[0, V:].log_softmax(1)
    wanted = [float(expected_TV[at, token]) for at, token in enumerate(prompt[1:])]
    for budget in (64, 5, 1):
        bench = engine_bench.EngineBench(llama, budget=budget)
        bench.put("x", tuned.config, tuned.tensors)
        for count in (0, 1):
            found = bench.answer(prompt, "x", num_tokens=count, prompt_logprobs=0).prompt_logprobs
            assert found == pytest.approx(wanted, abs=1e-4)


def test_requests_of_one_adapter_share_its_blocks_and_are_not_told_of_them(
    llama: nn.Module, engine_bench: ModuleType, tuned: Any, prompts: list[list[int]]
) -> None:
    bench = engine_bench.EngineBench(llama)
    bench.put("x", tuned.config, tuned.tensors)
    bench.put("y", tuned.config, {key: -tensor for key, tensor in tuned.tensors.items()})
    first = bench.answer(prompts[1], "x")
    bench.submit(prompts[0], "x")
    bench.step()
    assert bench.scheduler.counts.prefix_hit_tokens == 4  # One block of 4 of the 6 virtual tokens.
    bench.run()
    again = bench.answer(prompts[1], "x")
    assert (again.token_ids, again.cached_tokens) == (first.token_ids, 16 - V)
    other = bench.answer(prompts[1], "y")
    base = bench.answer([0] * V + prompts[1])
    assert (other.cached_tokens, base.cached_tokens) == (0, 0)
    assert first.token_ids != other.token_ids != base.token_ids


def test_text_survives_preemption_beside_base_and_lora_rows(
    llama: nn.Module, tuned: Any, write_with_peft: Callable[..., Any], as_peft: Any
) -> None:
    lora = write_with_peft(llama, LoraConfig(r=4, target_modules=["q_proj", "o_proj", "down_proj"]))
    as_peft.serves_beside_the_base(llama, {"x": tuned, "lora": lora}, 14, budget=7, num_tokens=12)


def test_penalties_and_bias_see_the_request_s_own_tokens_alone(
    llama: nn.Module, engine_bench: ModuleType, tuned: Any
) -> None:
    bench = engine_bench.EngineBench(llama)
    bench.put("x", tuned.config, tuned.tensors)
    options = {"repetition_penalty": 1.0 + 1e-6, "logit_bias": {0: 100.0}}
    assert bench.answer([7, 3], "x", num_tokens=2, **options).token_ids == [0, 0]
    wide = {"repetition_penalty": 1e6, "logit_bias": {0: 1e3}, "num_tokens": 1}
    assert bench.answer([7, 3], "x", **wide).token_ids == [0], (
        "no placeholder counts as a token of the prompt"
    )


def test_lengths_count_the_virtual_tokens(llama: nn.Module, engine_bench: ModuleType, tuned: Any) -> None:
    bench = engine_bench.EngineBench(llama, max_len=16)
    bench.put("x", tuned.config, tuned.tensors)
    assert len(bench.answer([1] * 5, "x", num_tokens=50).token_ids) == 16 - V - 5
    refused = bench.answer([1] * 10, "x")
    assert "10 tokens beside 6 virtual ones" in refused.error
    assert bench.answer([1] * 9, "x").error is None


def test_a_prompt_in_a_mix_is_refused(llama: nn.Module, engine_bench: ModuleType, tuned: Any) -> None:
    bench = engine_bench.EngineBench(llama)
    bench.put("x", tuned.config, tuned.tensors)
    assert "no sum" in bench.answer([1], AdapterUse("x", 0.5, virtual_tokens=V)).error


def test_a_bf16_base_gives_what_peft_gives(llama: nn.Module, tuned: Any, as_peft: Any) -> None:
    as_peft.serves_in_bf16(llama, tuned)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"num_virtual_tokens": 5}, InvalidTensors, r"found shape \[6, 48\], expected \[5, 48\]"),
        ({"num_virtual_tokens": None}, InvalidConfig, "num_virtual_tokens"),
        ({"num_transformer_submodules": 2}, InvalidConfig, "num_transformer_submodules"),
        ({"modules_to_save": ["score"]}, UnsupportedMethod, "modules_to_save"),
    ],
)
def test_what_does_not_fit_is_refused(
    llama: nn.Module, engine_bench: ModuleType, tuned: Any, changes: Any, error: type[Exception], words: str
) -> None:
    bench = engine_bench.EngineBench(llama)
    with pytest.raises(error, match=words):
        bench.put("x", {**tuned.config, **changes}, tuned.tensors)


def test_where_training_began_does_not_matter(tuned: Any) -> None:
    text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "Say it", "tokenizer_name_or_path": "x"}
    method = method_for(tuned.config)
    assert method.parse({**tuned.config, **text}) == method.parse(tuned.config)
