"""A LoRA that acts from its invocation sequence on, through the real engine, against PEFT's generate."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig
from torch import nn

from timbre_methods.errors import InvalidConfig, UnsupportedMethod
from timbre_methods.registry import method_for
from timbre_server.engine.messages import AdapterUse

INVOCATION = [17, 4]
PROMPTS = {
    0: [17, 4, 9],
    3: [7, 3, 20, 17, 4],
    8: [7, 3, 20, 41, 30, 2, 11, 50, 17, 4, 8],
    9: [7, 17, 4, 41, 30, 2, 11, 50, 17, 17, 4, 8, 17],
}
"""By the position of the last occurrence; blocks are of 4 tokens."""
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def alora(llama: nn.Module, write_with_peft: Callable[..., Any]) -> Any:
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=ALL, alora_invocation_tokens=INVOCATION
    )
    return write_with_peft(llama, config)


@pytest.fixture
def generated(quiet: Callable[[], AbstractContextManager[None]]) -> Callable[..., list[int]]:
    """Greedy tokens by PEFT's own generate."""

    def generate(model: nn.Module, folder: Path, prompt: list[int], count: int = 8) -> list[int]:
        with quiet(), torch.no_grad():
            wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()
            ids = torch.tensor([prompt])
            out = wrapped.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
            )
        return out[0, len(prompt) :].tolist()  # type: ignore[no-any-return]

    return generate


def use(position: int, digest: str = "x") -> AdapterUse:
    return AdapterUse(digest, from_position=position)


@pytest.mark.parametrize("budget", [64, 5, 1], ids="budget {}".format)
def test_greedy_text_is_peft_s_beside_base_and_lora_rows(
    llama: nn.Module,
    engine_bench: ModuleType,
    alora: Any,
    generated: Callable[..., list[int]],
    write_with_peft: Callable[..., Any],
    peft_greedy: Callable[..., Any],
    budget: int,
) -> None:
    lora = write_with_peft(
        llama, LoraConfig(r=3, target_modules=["q_proj", "lm_head"]), save_embedding_layers=False
    )
    bench = engine_bench.EngineBench(llama, budget=budget)
    assert bench.put("x", alora.config, alora.tensors).invocation_tokens == tuple(INVOCATION)
    bench.put("lora", lora.config, lora.tensors)
    ids = {at: bench.submit(prompt, use(at)) for at, prompt in PROMPTS.items()}
    base, other = bench.submit(PROMPTS[8]), bench.submit(PROMPTS[8], "lora")
    answers = bench.run()
    for at, prompt in PROMPTS.items():
        assert answers[ids[at]].token_ids == generated(llama, alora.folder, prompt), at
    assert answers[other].token_ids == peft_greedy(llama, lora.folder, PROMPTS[8], 8)[0]
    assert answers[base].token_ids == engine_bench.EngineBench(llama).answer(PROMPTS[8]).token_ids
    assert answers[base].token_ids != answers[ids[8]].token_ids


def test_blocks_before_the_invocation_are_the_base_s(
    llama: nn.Module, engine_bench: ModuleType, alora: Any, generated: Callable[..., list[int]]
) -> None:
    bench = engine_bench.EngineBench(llama)
    bench.put("x", alora.config, alora.tensors)
    prompt, before = PROMPTS[8], [*PROMPTS[8][:8], 1]
    bench.answer(before)
    adapted = bench.answer(prompt, use(8))
    assert (adapted.cached_tokens, adapted.token_ids) == (8, generated(llama, alora.folder, prompt))
    bench = engine_bench.EngineBench(llama)
    bench.put("x", alora.config, alora.tensors)
    bench.answer(prompt, use(8))
    assert bench.answer(before).cached_tokens == 8, "and the other way round"


@pytest.mark.parametrize("at", [3, 8, 9])
def test_blocks_from_the_invocation_on_are_the_adapter_s(
    llama: nn.Module, engine_bench: ModuleType, alora: Any, at: int
) -> None:
    bench = engine_bench.EngineBench(llama)
    bench.put("x", alora.config, alora.tensors)
    bench.put("y", alora.config, {key: tensor / 2 for key, tensor in alora.tensors.items()})
    prompt = [*PROMPTS[at], *range(10)]
    first = bench.answer(prompt, use(at))
    shared = at // 4 * 4
    assert bench.answer(prompt).cached_tokens == shared
    assert bench.answer(prompt, use(at, "y")).cached_tokens == shared
    assert bench.answer(prompt, use(at + 1)).cached_tokens == (at + 1) // 4 * 4
    again = bench.answer(prompt, use(at))
    assert (again.cached_tokens, again.token_ids) == ((len(prompt) - 1) // 4 * 4, first.token_ids)


def test_prompt_logprobs_change_from_the_invocation_on(
    llama: nn.Module, engine_bench: ModuleType, alora: Any
) -> None:
    for budget in (64, 3):
        bench = engine_bench.EngineBench(llama, budget=budget)
        bench.put("x", alora.config, alora.tensors)
        adapted = bench.answer(PROMPTS[8], use(8), prompt_logprobs=0).prompt_logprobs
        base = bench.answer(PROMPTS[8], prompt_logprobs=0).prompt_logprobs
        assert adapted[:8] == pytest.approx(base[:8], abs=1e-5)
        assert all(abs(a - b) > 1e-3 for a, b in zip(adapted[8:], base[8:], strict=True))


def test_in_a_mix_it_joins_the_others_from_its_invocation_on(
    llama: nn.Module,
    engine_bench: ModuleType,
    alora: Any,
    generated: Callable[..., list[int]],
    write_with_peft: Callable[..., Any],
    quiet: Callable[[], AbstractContextManager[None]],
) -> None:
    lora = write_with_peft(llama, LoraConfig(r=3, lora_alpha=3, target_modules=["q_proj", "down_proj"]))
    with quiet():
        merged = peft.PeftModel.from_pretrained(copy.deepcopy(llama), str(lora.folder)).merge_and_unload()
    other = AdapterUse("lora")
    for budget in (64, 3):
        bench = engine_bench.EngineBench(llama, budget=budget)
        bench.put("x", alora.config, alora.tensors)
        bench.put("lora", lora.config, lora.tensors)
        ids = {at: bench.submit(prompt, (use(at), other)) for at, prompt in PROMPTS.items()}
        answers = bench.run()
        for at, prompt in PROMPTS.items():
            assert answers[ids[at]].token_ids == generated(merged, alora.folder, prompt), at
    bench.answer(PROMPTS[8], other)
    prompt = [*PROMPTS[8], 1, 2]
    mixed = bench.answer(prompt, (other, use(8)))
    assert mixed.token_ids == generated(merged, alora.folder, prompt)
    assert mixed.cached_tokens == 8, "before the invocation it is the other's alone"


def test_text_survives_preemption(
    llama: nn.Module, engine_bench: ModuleType, alora: Any, generated: Callable[..., list[int]]
) -> None:
    bench = engine_bench.EngineBench(llama, num_blocks=13, budget=7, max_len=40)
    bench.put("x", alora.config, alora.tensors)
    ids = {at: bench.submit(prompt, use(at), 14) for at, prompt in PROMPTS.items()}
    answers = bench.run()
    assert bench.num_preemptions > 0
    for at, prompt in PROMPTS.items():
        assert answers[ids[at]].token_ids == generated(llama, alora.folder, prompt, 14)


def test_impossible_sequences_and_other_variants_beside_it_are_refused(alora: Any) -> None:
    method = method_for(alora.config)
    for wrong in ([-1], ["a"], [True], [1] * 257, "17 4"):
        with pytest.raises(InvalidConfig, match="alora_invocation_tokens"):
            method.parse({**alora.config, "alora_invocation_tokens": wrong})
    assert method_for({**alora.config, "alora_invocation_tokens": []}).name == "lora"
    with pytest.raises(UnsupportedMethod):
        method_for({**alora.config, "use_dora": True})
