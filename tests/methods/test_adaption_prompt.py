"""A gated attention of the adapter's own in the last layers, through the real engine, against PEFT."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from peft import AdaptionPromptConfig, LoraConfig
from torch import nn

from timbre_methods.errors import AdapterMismatch, InvalidTensors
from timbre_methods.registry import inspect_adapter
from timbre_server.engine.messages import AdapterUse, SamplingParams, Submit


@pytest.fixture
def plain_llama(tiny_models: ModuleType) -> nn.Module:
    """Without biases: nothing is added twice."""
    model: nn.Module = tiny_models.plain_llama()
    return model


def adaption(layers: int) -> AdaptionPromptConfig:
    return AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=5, adapter_layers=layers)


@pytest.mark.parametrize("budget", [64, 3], ids="budget {}".format)
@pytest.mark.parametrize("layers", [1, 2])
def test_greedy_text_is_peft_s_with_its_second_bias(
    llama: nn.Module, write_with_peft: Callable[..., Any], as_peft: Any, layers: int, budget: int
) -> None:
    program = as_peft.serves(llama, write_with_peft(llama, adaption(layers), std=1.0), budget=budget)
    assert list(program.attention) == [0, 1][-layers:]
    assert list(program.sites) == [f"model.layers.{at}.self_attn.o_proj" for at in program.attention]


def test_a_model_without_biases_gives_peft_s_text(
    plain_llama: nn.Module, write_with_peft: Callable[..., Any], as_peft: Any
) -> None:
    written = write_with_peft(plain_llama, adaption(2), std=1.0)
    assert not as_peft.serves(plain_llama, written, budget=4).sites


def test_each_row_of_a_batch_attends_to_its_own_prompt(
    llama: nn.Module, write_with_peft: Callable[..., Any], as_peft: Any
) -> None:
    written = {
        "one": write_with_peft(llama, adaption(1), std=1.0),
        "two": write_with_peft(llama, adaption(2), std=0.6),
        "lora": write_with_peft(llama, LoraConfig(r=4, target_modules=["q_proj", "o_proj"])),
    }
    as_peft.serves_beside_the_base(llama, written, 16, budget=9, num_tokens=10)


def test_a_weight_scales_what_it_adds(
    plain_llama: nn.Module,
    engine_bench: ModuleType,
    write_with_peft: Callable[..., Any],
    prompts: list[list[int]],
) -> None:
    written = write_with_peft(plain_llama, adaption(1), std=1.0)
    gates = {key: tensor * 0.5 if "gate" in key else tensor for key, tensor in written.tensors.items()}
    bench = engine_bench.EngineBench(plain_llama)
    bench.put("x", written.config, written.tensors)
    bench.put("half", written.config, gates)
    half = bench.answer(prompts[0], "half")
    weighted = bench.answer(prompts[0], AdapterUse("x", 0.5))
    assert weighted.logprobs == pytest.approx(half.logprobs, abs=1e-4)
    greedy = SamplingParams(max_tokens=8, temperature=0.0, logprobs=0)
    mix = (AdapterUse("x", 0.25), AdapterUse("half", 0.5))
    bench.scheduler.add(Submit("mix", prompts[0], greedy, mix))
    assert bench.run()["mix"].logprobs == pytest.approx(half.logprobs, abs=1e-4)


def test_a_bf16_base_gives_what_peft_gives(
    llama: nn.Module, write_with_peft: Callable[..., Any], as_peft: Any
) -> None:
    as_peft.serves_in_bf16(llama, write_with_peft(llama, adaption(2), std=1.0))


def test_a_fused_attention_is_refused(
    gpt2: nn.Module, engine_bench: ModuleType, write_with_peft: Callable[..., Any]
) -> None:
    written = write_with_peft(gpt2, adaption(1))
    with pytest.raises(AdapterMismatch, match=r"lacks transformer\.h\.1\.attn\.k_proj"):
        engine_bench.EngineBench(gpt2).put("x", written.config, written.tensors)


def test_layers_that_are_not_the_last_are_refused(
    llama: nn.Module, engine_bench: ModuleType, write_with_peft: Callable[..., Any]
) -> None:
    written = write_with_peft(llama, adaption(1))
    moved = {key.replace("layers.1", "layers.0"): tensor for key, tensor in written.tensors.items()}
    bench = engine_bench.EngineBench(llama)
    with pytest.raises(InvalidTensors, match=r"layers\.0.* is surplus: expected only .*layers\.1"):
        bench.put("x", written.config, moved)
    with pytest.raises(AdapterMismatch, match="found 3, this base lacks so many: it has 2"):
        bench.put("x", {**written.config, "adapter_layers": 3}, written.tensors)


def test_the_prepared_bytes_are_known_from_the_header(
    llama: nn.Module, engine_bench: ModuleType, write_with_peft: Callable[..., Any]
) -> None:
    written = write_with_peft(llama, adaption(2))
    bench = engine_bench.EngineBench(llama)
    program = bench.put("x", written.config, written.tensors)
    header = {key: ("F32", list(tensor.shape)) for key, tensor in written.tensors.items()}
    found = inspect_adapter(written.config, header, bench.sites, bench.frame)
    assert found.prepared_bytes == program.prepared_bytes == 4 * 2 * (2 * 2 * 5 * 12 + 2 * 48)
