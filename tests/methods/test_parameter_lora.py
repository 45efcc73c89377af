"""LoRA on experts, routers and other parameters, through the real engine, against PEFT."""

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
from torch import Tensor, nn

from timbre_methods.contract import Site
from timbre_methods.errors import AdapterMismatch, InvalidTensors, UnsupportedMethod
from timbre_methods.program import SlicedLowRank
from timbre_methods.registry import check_adapter, method_for
from timbre_server.engine.messages import AdapterUse

PROMPT = [7, 3, 20, 41, 30, 2, 11, 50, 17, 4, 8]
OTHER_PROMPT = [9, 33, 1, 58, 3]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "experts": ("qwen3_moe", {"target_parameters": EXPERTS}),
    "the inner parameter alone": ("qwen3_moe", {"target_parameters": EXPERTS[:1]}),
    "the outer parameter alone": ("mixtral", {"target_parameters": ["down_proj"]}),
    "a router beside attention": (
        "mixtral",
        {"target_parameters": ["mlp.gate.weight"], "target_modules": ["q_proj", "v_proj"]},
    ),
    "everything, with patterns": (
        "qwen3_moe",
        {
            "target_parameters": [*EXPERTS, "gate.weight"],
            "target_modules": ["q_proj", "o_proj", "embed_tokens"],
            "use_rslora": True,
            "rank_pattern": {"experts.down_proj": 5, r"layers\.1\.mlp\.experts\..*": 2},
            "alpha_pattern": {r"0\.mlp\.experts\.gate_up_proj": 11},
        },
    ),
    "slices that lie as in, out, and biases": (
        "gpt_oss",
        {"target_parameters": ["gate_up_proj", "down_proj", "down_proj_bias", "router.weight"]},
    ),
    "weights of layers": (
        "llama",
        {"target_parameters": ["q_proj.weight", "embed_tokens.weight"], "target_modules": ["up_proj"]},
    ),
    "weights of transposed layers": (
        "gpt2",
        {"target_parameters": ["c_attn.weight", "wte.weight"]},
    ),
}


def config_of(options: dict[str, Any]) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5, **{"target_modules": [], **options})


def scored(logits_1TV: Tensor, prompt: list[int]) -> list[float]:
    """The log-probabilities of a prompt's tokens from the second on."""
    scores_TV = logits_1TV[0].float().log_softmax(-1)
    return [float(scores_TV[t, token]) for t, token in enumerate(prompt[1:])]


@pytest.mark.parametrize("case", CASES)
def test_tokens_and_scores_are_peft_s(
    case: str,
    tiny_models: ModuleType,
    engine_bench: ModuleType,
    write_with_peft: Callable[..., Any],
    peft_logits: Callable[..., Tensor],
    peft_greedy: Callable[..., Any],
) -> None:
    family, options = CASES[case]
    model = getattr(tiny_models, family)()
    written = write_with_peft(model, config_of(options))
    assert method_for(written.config).name == "parameter_lora"
    bench = engine_bench.EngineBench(model)
    bench.put("x", written.config, written.tensors)

    answer = bench.answer(PROMPT, "x", prompt_logprobs=0)

    tokens, logprobs = peft_greedy(model, written.folder, PROMPT, 8)
    expected = scored(peft_logits(model, written.folder, torch.tensor([PROMPT])), PROMPT)
    base = bench.answer(PROMPT, prompt_logprobs=0)
    assert max(abs(a - b) for a, b in zip(base.prompt_logprobs, expected, strict=True)) > 0.05
    assert answer.prompt_logprobs == pytest.approx(expected, abs=1e-4)
    assert answer.token_ids == tokens
    assert answer.logprobs == pytest.approx(logprobs, abs=1e-4)


def mixed(model: nn.Module, folders: dict[Path, float], quiet: Callable[..., Any]) -> nn.Module:
    """``W + Σ w (W_k − W)`` of all weights, with W_k as PEFT merges them."""
    with quiet(), torch.no_grad():
        total = copy.deepcopy(model)
        for folder, weight in folders.items():
            wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder))
            merged = dict(wrapped.merge_and_unload().named_parameters())
            for name, base in model.named_parameters():
                total.get_parameter(name).add_(merged[name] - base, alpha=weight)
    return total


@pytest.mark.parametrize("budget", [64, 3], ids="budget {}".format)
def test_rows_of_different_adapters_and_mixes_run_in_one_batch(
    tiny_models: ModuleType,
    engine_bench: ModuleType,
    write_with_peft: Callable[..., Any],
    peft_greedy: Callable[..., Any],
    quiet: Callable[[], AbstractContextManager[None]],
    budget: int,
) -> None:
    model = tiny_models.qwen3_moe()
    options: dict[str, dict[str, Any]] = {
        "experts": {"target_parameters": EXPERTS, "target_modules": ["q_proj"]},
        "router": {"target_parameters": ["gate.weight", "down_proj"], "use_rslora": True},
        "attention": {"target_modules": ["q_proj", "o_proj"]},
    }
    written = {name: write_with_peft(model, config_of(each)) for name, each in options.items()}
    bench = engine_bench.EngineBench(model, budget=budget)
    for name, each in written.items():
        bench.put(name, each.config, each.tensors)
    weights = {"experts": 0.5, "router": -0.7, "attention": 0.4}
    mix = tuple(AdapterUse(name, weight) for name, weight in weights.items())
    asked = [(prompt, use) for prompt in (PROMPT, OTHER_PROMPT) for use in ("experts", None, mix, "router")]
    submitted = {bench.submit(prompt, use, num_tokens=5): (prompt, use) for prompt, use in asked}
    submitted[bench.submit(PROMPT, "attention", num_tokens=5)] = (PROMPT, "attention")

    answers = bench.run()

    mix_model = mixed(model, {written[name].folder: weight for name, weight in weights.items()}, quiet)
    for request_id, (prompt, use) in submitted.items():
        if isinstance(use, str):
            tokens, logprobs = peft_greedy(model, written[use].folder, prompt, 5)
        else:
            tokens, logprobs = greedy(model if use is None else mix_model, prompt, 5)
        assert answers[request_id].token_ids == tokens
        assert answers[request_id].logprobs == pytest.approx(logprobs, abs=1e-4)
    assert len({tuple(answer.token_ids) for answer in answers.values()}) > len(asked) // 2


@torch.no_grad()
def greedy(model: nn.Module, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    tokens, logprobs = list(prompt), []
    for _ in range(count):
        last_V = model(torch.tensor([tokens])).logits[0, -1].log_softmax(0)
        tokens.append(int(last_V.argmax()))
        logprobs.append(float(last_V.max()))
    return tokens[len(prompt) :], logprobs


def test_a_bf16_base_is_no_further_from_the_exact_answer_than_peft(
    tiny_models: ModuleType,
    engine_bench: ModuleType,
    write_with_peft: Callable[..., Any],
    peft_logits: Callable[..., Tensor],
) -> None:
    rounded = tiny_models.mixtral().to(torch.bfloat16)
    exact_model = copy.deepcopy(rounded).float()
    written = write_with_peft(exact_model, config_of({"target_parameters": EXPERTS}))
    bench = engine_bench.EngineBench(rounded)
    bench.put("x", written.config, written.tensors)
    ids = torch.tensor([PROMPT])
    exact = torch.tensor(scored(peft_logits(exact_model, written.folder, ids), PROMPT))
    theirs = torch.tensor(scored(peft_logits(rounded, written.folder, ids), PROMPT))

    ours = torch.tensor(bench.answer(PROMPT, "x", prompt_logprobs=0).prompt_logprobs)

    assert 0 < (theirs - exact).abs().max() < 0.3
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()


EMBEDDING = Site("embed", torch.ones(6, 5), None, "embedding", is_transposed=True)


def experts(slices: int = 3, rows: int = 6, columns: int = 5, **more: Any) -> dict[str, Site]:
    """The sites of one module with two parameters, of a norm and an embedding of 5 tokens."""
    sites = {"embed": EMBEDDING}
    for name in ("gate_up_proj", "down_proj"):
        stacked = torch.ones(slices * rows, columns)
        sites[f"mlp.experts.{name}"] = Site(
            f"mlp.experts.{name}", stacked, None, "parameter", slices=slices, **more
        )
    sites["norm"] = Site("norm", torch.ones(columns), None, "norm")
    return sites


def raw(**options: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_parameters": EXPERTS, **options}


def factors(stem: str, a: tuple[int, int] = (6, 5), b: tuple[int, int] = (6, 6)) -> dict[str, Tensor]:
    return {
        f"base_model.model.{stem}.lora_A.weight": torch.arange(float(a[0] * a[1])).view(a),
        f"base_model.model.{stem}.lora_B.weight": torch.arange(float(b[0] * b[1])).view(b),
    }


BOTH = {**factors("mlp.experts.base_layer"), **factors("mlp.experts")}


def test_the_factors_of_a_slice_are_found_where_peft_puts_them() -> None:
    sites = experts()
    method = method_for(raw())
    tensors = {name: 10 * t if "base_layer" in name else t for name, t in BOTH.items()}
    program = method.compile(method.parse(raw()), tensors, sites)
    (part,) = program.sites["mlp.experts.down_proj"]
    assert isinstance(part, SlicedLowRank)
    assert part.a_ERI[1].tolist() == [[10, 11, 12, 13, 14], [15, 16, 17, 18, 19]]
    assert part.b_EOR[1, :2].tolist() == [[1 * 1.5, 4 * 1.5], [7 * 1.5, 10 * 1.5]]
    (inner,) = program.sites["mlp.experts.gate_up_proj"]
    assert isinstance(inner, SlicedLowRank)
    assert torch.equal(inner.a_ERI, 10 * part.a_ERI)
    assert program.prepared_bytes == 2 * 4 * 3 * 2 * (5 + 6)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Tensor], type[Exception], str]] = {
    "a parameter without its factors": (
        {},
        factors("mlp.experts"),
        InvalidTensors,
        r"experts\.base_layer\.lora_A\.weight is missing",
    ),
    "a wrapper too many": (
        {"target_parameters": ["experts.down_proj"]},
        BOTH,
        AdapterMismatch,
        r"no parameter of 'mlp\.experts' for it; this base has gate_up_proj, down_proj there",
    ),
    "a parameter that the base lacks": (
        {"target_parameters": ["experts.up_proj"]},
        factors("mlp.experts"),
        AdapterMismatch,
        r"no parameter of 'mlp\.experts' for it",
    ),
    "a rank that is not the config's": (
        {"r": 3},
        BOTH,
        InvalidTensors,
        r"found rank 2, the config says \[3\]",
    ),
    "factors that are not of all slices": (
        {},
        {**BOTH, **factors("mlp.experts", (5, 5), (6, 5))},
        InvalidTensors,
        r"found 5 rows, expected as many for each of 3 slices of 'mlp\.experts\.down_proj'",
    ),
    "factors the other way round": (
        {},
        {**BOTH, **factors("mlp.experts", (6, 6), (5, 6))},
        InvalidTensors,
        r"experts\.lora_A\.weight: found shape \[6, 6\], expected \[r, 5\]",
    ),
    "an embedding and its weight": (
        {"target_parameters": ["embed.weight"]},
        {
            **factors("embed", (2, 6), (5, 2)),
            "base_model.model.embed.lora_embedding_A": torch.ones(2, 5),
            "base_model.model.embed.lora_embedding_B": torch.ones(6, 2),
        },
        InvalidTensors,
        "adapts 'embed' and its parameter",
    ),
    "a whole parameter": (
        {"modules_to_save": ["down_proj"]},
        {**BOTH, "base_model.model.mlp.experts.down_proj.weight": torch.ones(18, 5)},
        AdapterMismatch,
        r"down_proj\.weight: this base has no .* 'mlp\.experts\.down_proj' that can be adapted here",
    ),
    "a whole parameter beside another method": (
        {"target_parameters": None},
        {"base_model.model.mlp.experts.down_proj.weight": torch.ones(18, 5)},
        AdapterMismatch,
        r"'mlp\.experts\.down_proj' is a parameter, and lora adapts linear layers and embeddings alone",
    ),
    "a bias": ({"lora_bias": True}, BOTH, UnsupportedMethod, "'lora_bias' is on"),
    "VeLoRA": ({"velora_config": {"num_groups": 4}}, BOTH, UnsupportedMethod, "'velora_config' is on"),
    "DoRA": ({"use_dora": True}, BOTH, UnsupportedMethod, "'target_parameters' on|'use_dora' on"),
    "aLoRA": ({"alora_invocation_tokens": [3]}, BOTH, UnsupportedMethod, "without it"),
    "another method": (
        {"peft_type": "LOHA", "lora_alpha": None},
        BOTH,
        UnsupportedMethod,
        "plain LoRA alone adapts bare",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_refused_by_name(case: str) -> None:
    options, tensors, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        check_adapter(raw(**options), tensors, experts())
