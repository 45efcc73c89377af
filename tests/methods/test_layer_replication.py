"""Adapters of a base with repeated layers, against PEFT's own replicated model, and those that do not fit.

A stack of the tiny model's two layers: 0, 1, 0, 1, 1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig
from peft.tuners.lora.config import BdLoraConfig
from torch import Tensor, nn

from timbre_methods.errors import AdapterMismatch, InvalidConfig, UnsupportedMethod
from timbre_methods.layer_stack import check_stack
from timbre_methods.program import AdapterProgram
from timbre_methods.prompt_contract import AttentionLayer, Frame
from timbre_methods.registry import check_adapter, method_for
from timbre_server.engine.layer_stack import stack_layers

RANGES = [[0, 2], [0, 2], [1, 2]]
STACK = (0, 1, 0, 1, 1)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPT = [7, 3, 20, 41, 30, 2, 11]
BLOCKS = BdLoraConfig(["o_proj", "down_proj"], ["q_proj", "k_proj", "v_proj"], nblocks=2, match_strict=False)

Made = Callable[..., Any]


def lora(**options: Any) -> LoraConfig:
    options = {"r": 4, "lora_alpha": 6, "target_modules": ALL, "layer_replication": RANGES, **options}
    return LoraConfig(task_type="CAUSAL_LM", **options)


@pytest.fixture
def bench(llama: nn.Module, engine_bench: ModuleType) -> Any:
    """The engine on the stack, in small steps."""
    return engine_bench.EngineBench(llama, budget=4, layers=RANGES)


@pytest.fixture
def stacked_llama(llama: nn.Module) -> Any:
    model: Any = copy.deepcopy(llama)
    stack_layers(model, RANGES)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"lora_bias": True, "target_modules": ["q_proj", "o_proj"]},
        {"alpha_pattern": {"layers.3.mlp.up_proj": 20}, "rank_pattern": {"layers.2.self_attn.q_proj": 2}},
        {"use_dora": True},
        {"use_bdlora": BLOCKS},
        {"target_modules": ["embed_tokens", "v_proj", "lm_head"]},
        {"target_modules": ["v_proj"], "modules_to_save": ["input_layernorm"]},
    ],
    ids=["lora", "bias", "patterns", "dora", "bdlora", "embeddings", "whole_layers"],
)
def test_logits_are_those_of_peft_s_replicated_model(
    options: dict[str, Any],
    llama: nn.Module,
    stacked_llama: Any,
    timbre_logits: Made,
    write_with_peft: Made,
    peft_logits: Made,
    token_ids: Tensor,
) -> None:
    written = write_with_peft(llama, lora(**options))
    assert any(".layers.4." in name for name in written.tensors)
    actual = timbre_logits(stacked_llama, written, token_ids, frame(STACK))
    with torch.no_grad():
        base = stacked_llama(token_ids).logits
    expected = peft_logits(llama, written.folder, token_ids)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)
    assert (expected - base).abs().max() > 0.05


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_greedy_text_is_peft_s(
    options: dict[str, Any], llama: nn.Module, bench: Any, write_with_peft: Made, peft_greedy: Made
) -> None:
    written = write_with_peft(llama, lora(**options))
    bench.put("x", written.config, written.tensors)
    answer, base = bench.answer(PROMPT, "x", num_tokens=12), bench.answer(PROMPT, num_tokens=12)
    tokens, logprobs = peft_greedy(llama, written.folder, PROMPT, 12)
    assert answer.token_ids == tokens
    assert answer.logprobs == pytest.approx(logprobs, abs=1e-4)
    assert base.token_ids != tokens


def test_requests_without_an_adapter_run_the_stack(stacked_llama: Any, bench: Any) -> None:
    tokens = list(PROMPT)
    with torch.no_grad():
        for _ in range(12):
            tokens.append(int(stacked_llama(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert bench.answer(PROMPT, num_tokens=12).token_ids == tokens[len(PROMPT) :]


def test_an_alora_may_be_of_a_stack(llama: nn.Module, bench: Any, write_with_peft: Made) -> None:
    written = write_with_peft(llama, lora(alora_invocation_tokens=[20, 41]))
    program: AdapterProgram = bench.put("x", written.config, written.tensors)
    assert program.invocation_tokens == (20, 41)
    assert "model.layers.4.self_attn.q_proj" in program.sites


def frame(stack: tuple[int, ...] = (), layers: int = 2) -> Frame:
    count = len(stack) or layers
    return Frame(8, tuple(AttentionLayer(f"layers.{i}.attn", 2, 2, 4, 4) for i in range(count)), stack)


@pytest.mark.parametrize(
    ("asked", "served", "words"),
    [
        (RANGES, (), r"layers \[\[0, 2\], \[0, 2\], \[1, 2\]\].*runs each of its layers once.*started with "
         r"--layer-replication '\[\[0, 2\], \[0, 2\], \[1, 2\]\]'"),
        (RANGES, (0, 1, 1), r"\[\[0, 2\], \[0, 2\], \[1, 2\]\].*runs \[\[0, 2\], \[1, 2\]\].*started with"),
        (None, STACK, r"has no layer_replication.*runs \[\[0, 2\], \[0, 2\], \[1, 2\]\].*started without"),
        ([[0, 2]], STACK, r"trained on the layers \[\[0, 2\]\] .*runs \[\[0, 2\], \[0, 2\], \[1, 2\]\]"),
        ([[0, 1]], (), r"trained on the layers \[\[0, 1\]\]"),
        ([[0, 3]], (), r"trained on the layers \[\[0, 3\]\]"),
        ([[0, 5]], (0, 1, 1, 0, 1), r"trained on the layers \[\[0, 5\]\]"),
        ([[0, 1]] * 20, (), r"started with --layer-replication and the ranges of layer_replication"),
    ],
)  # fmt: skip
def test_an_adapter_of_other_layers_is_refused_with_both(
    asked: list[list[int]] | None, served: tuple[int, ...], words: str
) -> None:
    with pytest.raises(AdapterMismatch, match=words):
        check_stack({"layer_replication": asked}, frame(served))


@pytest.mark.parametrize(
    ("asked", "served"),
    [
        (RANGES, STACK),
        ([[0, 1], [1, 2], [0, 2], [1, 1], [1, 2]], STACK),
        (None, ()),
        ([], ()),
        ([[0, 2]], ()),
        ([[0, 2]], (0, 1)),
    ],
)
def test_equal_layers_are_accepted_however_they_are_written(asked: Any, served: tuple[int, ...]) -> None:
    check_stack({"layer_replication": asked}, frame(served))


@pytest.mark.parametrize(
    "asked", [[[0, 10**9]], [[-1, 2]], [[0]], [[0, 1, 2]], [0, 2], "[[0, 2]]", [[0, 4096]] * 2, {"0": 2}]
)
def test_a_layout_that_is_none_is_refused(asked: Any) -> None:
    with pytest.raises(InvalidConfig, match=r"layer_replication"):
        check_stack({"layer_replication": asked}, frame())


@pytest.mark.parametrize("initialiser", ["pissa", "olora"])
def test_what_moved_a_shared_weight_is_refused(initialiser: str, bench: Any) -> None:
    raw_config = {"peft_type": "LORA", "init_lora_weights": initialiser, "layer_replication": RANGES}
    with pytest.raises(UnsupportedMethod, match="share one weight, and PEFT took a part out of it"):
        check_adapter(raw_config, {}, bench.sites, bench.frame)


def test_an_adapter_of_the_plain_layers_is_refused_before_it_is_read(
    llama: nn.Module, bench: Any, write_with_peft: Made
) -> None:
    written = write_with_peft(llama, IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(AdapterMismatch, match="each of the base's layers once"):
        check_adapter(written.config, written.tensors, bench.sites, bench.frame)
    with pytest.raises(UnsupportedMethod, match="only LoRA, DoRA, aLoRA and BD-LoRA are served"):
        method_for(written.config).parse({**written.config, "layer_replication": RANGES})
