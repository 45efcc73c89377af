"""X-LoRA through the real engine against PEFT's own two forwards, and what is refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from timbre_client.export.xlora import xlora as pack
from timbre_methods.errors import (
    AdapterMismatch,
    InvalidTensors,
    UnsupportedMethod,
)
from timbre_server.engine.messages import AdapterUse, SamplingParams, Submit

ATTENTION, EVERY = ["q_proj", "v_proj"], ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"]
EXPERTS = (
    {"r": 2, "lora_alpha": 3, "target_modules": EVERY},
    {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ATTENTION},
    {"r": 2, "lora_alpha": 8, "target_modules": ATTENTION, "alpha_pattern": {"v_proj": 4}},
)
CASES: dict[str, dict[str, Any]] = {
    "one layer": {},
    "two layers": {"xlora_depth": 2, "xlora_size": 7},
    "three without dropout": {"xlora_depth": 3, "xlora_size": 5, "xlora_dropout_p": 0.0},
    "layerwise": {"layerwise_scalings": True, "softmax_temperature": 0.6},
    "layerwise, deep": {"layerwise_scalings": True, "xlora_depth": 2, "xlora_size": 6, "top_k_lora": 2},
    "top 2": {"top_k_lora": 2, "global_scaling_weight": 1.7},
    "top 2, softmax again": {"top_k_lora": 2, "enable_softmax_topk": True},
    "logits": {"enable_softmax": False},
    "logits, softmax of the kept": {"enable_softmax": False, "top_k_lora": 2, "enable_softmax_topk": True},
    "cold": {"softmax_temperature": 0.01, "top_k_lora": 3, "enable_softmax_topk": True},
}


@dataclass(frozen=True)
class Trained:
    """One X-LoRA as PEFT runs it, and packed for a server."""

    model: nn.Module
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    folder: Path

    @torch.no_grad()
    def greedy(self, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
        """Tokens and log-probabilities, the whole text anew for each."""
        tokens, logprobs = list(prompt), []
        for _ in range(count):
            last_V = self.model(input_ids=torch.tensor([tokens])).logits[0, -1].log_softmax(0)
            tokens.append(int(last_V.argmax()))
            logprobs.append(float(last_V.max()))
        return tokens[len(prompt) :], logprobs


@pytest.fixture
def trained(
    llama: nn.Module,
    write_with_peft: Callable[..., Any],
    written: Callable[[Path], Any],
    quiet: Any,
    tmp_path: Path,
) -> Callable[..., Trained]:
    """An X-LoRA of three experts with random values, by its options."""

    def train(**options: Any) -> Trained:
        experts = [
            write_with_peft(llama, peft.LoraConfig(task_type="CAUSAL_LM", **each), std=0.4)
            for each in EXPERTS
        ]
        noise = torch.Generator().manual_seed(len(options))
        for expert in experts:
            for tensor in expert.tensors.values():
                tensor.copy_(0.4 * torch.randn(tensor.shape, generator=noise))
            save_file(expert.tensors, expert.folder / "adapter_model.safetensors")
        base = copy.deepcopy(llama)
        base.config.use_cache = False
        with quiet(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`enable_softmax_topk`", UserWarning)
            config = peft.XLoraConfig(
                task_type="CAUSAL_LM",
                hidden_size=base.config.hidden_size,
                adapters={str(e): str(each.folder) for e, each in enumerate(experts)},
                **options,
            )
            model = peft.get_peft_model(base, config).eval()
        classifier = {name: p for name, p in model.named_parameters() if "internal_xlora_classifier" in name}
        for parameter in classifier.values():
            parameter.data.copy_(0.5 * torch.randn(parameter.shape, generator=noise))
        folder = tmp_path / "xlora"
        folder.mkdir()
        config.save_pretrained(str(folder))
        save_file({n: p.data for n, p in classifier.items()}, folder / "adapter_model.safetensors")
        packed = written(pack(tmp_path / "packed", folder, [each.folder for each in experts]))
        return Trained(model, packed.config, packed.tensors, folder)

    return train


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_the_engine_writes_what_peft_writes(
    options: dict[str, Any],
    llama: nn.Module,
    trained: Callable[..., Trained],
    engine_bench: ModuleType,
    prompts: list[list[int]],
) -> None:
    """In chunks of the prompt, beside others and with the base's and its own prefixes known."""
    xlora = trained(**options)
    bench = engine_bench.EngineBench(llama, budget=11)
    bench.put("x", xlora.config, xlora.tensors)
    base = [bench.answer(prompt, num_tokens=3).token_ids for prompt in prompts]
    ids = [bench.submit(prompt, adapter, 3) for prompt in prompts for adapter in ("x", None)]
    answers = bench.run()
    for number, prompt in enumerate(prompts):
        answer = answers[ids[2 * number]]
        tokens, logprobs = xlora.greedy(prompt, 3)
        assert answer.token_ids == tokens
        assert answer.logprobs == pytest.approx(logprobs, abs=1e-4)
        assert answers[ids[2 * number + 1]].token_ids == base[number]
    again = bench.answer(prompts[1], "x", num_tokens=3)
    assert again.cached_tokens > 0
    assert again.logprobs == pytest.approx(answers[ids[2]].logprobs, abs=1e-4)


def test_the_base_pass_shares_the_bases_prefix_both_ways(
    llama: nn.Module, trained: Callable[..., Trained], engine_bench: ModuleType, prompts: list[list[int]]
) -> None:
    xlora, long = trained(), prompts[1]
    bench = engine_bench.EngineBench(llama)
    bench.put("x", xlora.config, xlora.tensors)
    expected = engine_bench.EngineBench(llama).answer(long, num_tokens=4)
    bench.answer(long, "x", num_tokens=4)
    assert bench.answer(long, num_tokens=4).cached_tokens == 12
    known = bench.answer(long, num_tokens=4)
    assert known.token_ids == expected.token_ids
    assert known.logprobs == pytest.approx(expected.logprobs, abs=1e-5)


def test_one_that_was_preempted_goes_on_with_the_same_text(
    llama: nn.Module, trained: Callable[..., Trained], engine_bench: ModuleType, prompts: list[list[int]]
) -> None:
    xlora = trained(layerwise_scalings=True)
    bench = engine_bench.EngineBench(llama, num_blocks=17, budget=9, max_len=30)
    bench.put("x", xlora.config, xlora.tensors)
    asked = [(prompt, name) for prompt in prompts for name in ("x", None)]
    ids = [bench.submit(prompt, name, 8) for prompt, name in asked]
    answers = bench.run()
    assert bench.num_preemptions > 0
    for (prompt, name), request_id in zip(asked, ids, strict=True):
        if name:
            assert answers[request_id].token_ids == xlora.greedy(prompt, 8)[0]


def test_a_mix_adds_the_others_change_and_leaves_the_gates(
    llama: nn.Module,
    trained: Callable[..., Trained],
    write_with_peft: Callable[..., Any],
    engine_bench: ModuleType,
    prompts: list[list[int]],
) -> None:
    """Of two halves of one X-LoRA the sum is that X-LoRA; with a plain LoRA beside it, it is another text."""
    xlora, long = trained(top_k_lora=2), prompts[1]
    plain = write_with_peft(llama, peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=ATTENTION))
    bench = engine_bench.EngineBench(llama)
    for name, each in (("x", xlora), ("twin", xlora), ("plain", plain)):
        bench.put(name, each.config, each.tensors)

    def mix(*weights: tuple[str, float]) -> Any:
        uses = tuple(AdapterUse(name, weight, scouts=name != "plain") for name, weight in weights)
        return bench.answer(long, uses, num_tokens=4, prompt_logprobs=0)

    whole, halves = mix(("x", 1.0)), mix(("x", 0.5), ("twin", 0.5))
    assert halves.token_ids == whole.token_ids
    assert halves.prompt_logprobs == pytest.approx(whole.prompt_logprobs, abs=1e-4)
    beside, three = mix(("x", 1.0), ("plain", 0.7)), mix(("x", 0.4), ("plain", 0.7), ("twin", 0.6))
    assert three.prompt_logprobs == pytest.approx(beside.prompt_logprobs, abs=1e-4)
    assert beside.prompt_logprobs != pytest.approx(whole.prompt_logprobs, abs=1e-2)


def test_an_expert_of_the_head_gets_the_gates_of_the_rows_that_are_kept(
    llama: nn.Module, trained: Callable[..., Trained], engine_bench: ModuleType, prompts: list[list[int]]
) -> None:
    """In whatever chunks the prompt runs, beside others: a head sees fewer rows than the layers."""
    xlora = trained()
    vocabulary, width = llama.get_output_embeddings().weight.shape
    noise = torch.Generator().manual_seed(7)
    stem = "base_model.model.lm_head.experts.1."
    head = {
        stem + "lora_A.weight": torch.randn(3, width, generator=noise),
        stem + "lora_B.weight": torch.randn(vocabulary, 3, generator=noise),
    }
    found = []
    for budget in (64, 7):
        bench = engine_bench.EngineBench(llama, budget=budget)
        bench.put("x", xlora.config, xlora.tensors | head)
        bench.put("without", xlora.config, xlora.tensors)
        asked = [(prompt, name) for prompt in prompts for name in ("x", "without")]
        ids = [bench.submit(prompt, name, 3, prompt_logprobs=0) for prompt, name in asked]
        answers = bench.run()
        found.append([answers[each].prompt_logprobs + answers[each].logprobs for each in ids])
    for whole, chunked in zip(*found, strict=True):
        assert chunked == pytest.approx(whole, abs=1e-4, rel=1e-4)
    assert found[0][0] != pytest.approx(found[0][1], abs=1e-2)


def test_an_answer_tells_the_classifiers_gates(
    llama: nn.Module, trained: Callable[..., Trained], engine_bench: ModuleType, prompts: list[list[int]]
) -> None:
    xlora, prompt = trained(), prompts[0]
    with torch.no_grad():
        xlora.model(input_ids=torch.tensor([prompt]))
    expected_E = xlora.model.base_model.internal_xlora_scalings[0, -1, 0]
    bench = engine_bench.EngineBench(llama)
    bench.put("x", xlora.config, xlora.tensors)
    greedy = SamplingParams(max_tokens=1, temperature=0.0)
    bench.scheduler.add(Submit("told", prompt, greedy, (bench.uses["x"],), return_routing=True))
    result = bench.runner.execute(bench.scheduler.schedule())
    (told,) = result.results[0].routing
    assert told.place == "model.layers.0.self_attn.q_proj"
    assert dict(zip(told.experts, told.gates, strict=True)) == pytest.approx(
        dict(enumerate(expected_E.tolist()))
    )
    assert result.expert_tokens == {"x": (len(prompt),) * 3}


def test_a_request_that_the_cache_cannot_hold_twice_is_refused(
    llama: nn.Module, trained: Callable[..., Trained], engine_bench: ModuleType
) -> None:
    xlora = trained()
    bench = engine_bench.EngineBench(llama, num_blocks=11, max_len=30)
    bench.put("x", xlora.config, xlora.tensors)
    assert bench.answer([5] * 25, num_tokens=2).error is None
    refused = bench.answer([5] * 25, "x", num_tokens=2).error
    assert "the context holds 20 (each of them twice" in refused
    assert bench.answer([5] * 15, "x", num_tokens=30).error is None


def test_a_classifier_that_is_not_whole_or_of_another_base_is_refused(
    llama: nn.Module, trained: Callable[..., Trained], engine_bench: ModuleType
) -> None:
    xlora = trained(xlora_depth=2, xlora_size=6)
    bench = engine_bench.EngineBench(llama)
    first = "base_model.internal_xlora_classifier.layers.0.weight"
    rest = {name: t for name, t in xlora.tensors.items() if name != first}
    with pytest.raises(InvalidTensors, match=r"layers\.0\.weight is missing.*PEFT leaves"):
        bench.put("x", xlora.config, rest)
    wider = {**rest, first: torch.ones(6, xlora.config["hidden_size"] + 1)}
    with pytest.raises(AdapterMismatch, match="reads hidden states of"):
        bench.put("x", {**xlora.config, "hidden_size": xlora.config["hidden_size"] + 1}, wider)


def test_an_expert_without_tensors_is_refused_by_its_number(
    llama: nn.Module, trained: Callable[..., Trained], engine_bench: ModuleType
) -> None:
    xlora = trained()
    lost = {name: tensor for name, tensor in xlora.tensors.items() if ".experts.1." not in name}
    with pytest.raises(InvalidTensors, match="expert 1 has no tensor in the file"):
        engine_bench.EngineBench(llama).put("x", xlora.config, lost)


def test_a_classifier_of_more_outputs_than_a_step_can_take_is_refused(
    llama: nn.Module, trained: Callable[..., Trained], engine_bench: ModuleType
) -> None:
    xlora = trained(xlora_depth=2, xlora_size=6)
    with pytest.raises(UnsupportedMethod, match="has 16385 outputs, at most 16384 are served"):
        engine_bench.EngineBench(llama).put("x", {**xlora.config, "xlora_size": 2**14 + 1}, xlora.tensors)
