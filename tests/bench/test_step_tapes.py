"""Steps that are played give the bits of steps that run, with any adapters."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_in_process import Decoding
from random_adapters import FAMILIES, Make
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PhiConfig,
    PreTrainedConfig,
)

from timbre_server.adapters.adapted_group import AdaptedGroup
from timbre_server.engine import step_tapes
from timbre_server.engine.batch import Batch
from timbre_server.engine.messages import AdapterUse, SamplingParams, Submit
from timbre_server.engine.step_tapes import StepTapes

pytestmark = pytest.mark.cpp

CONFIG = LlamaConfig(
    vocab_size=512, hidden_size=96, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
)  # fmt: skip
DIGESTS = [None, None, *(f"{name}-{number}" for name in FAMILIES for number in range(2))]


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of rows of the steps that were played."""
    found: list[int] = []
    play = step_tapes._Layers.play

    def noted(own: step_tapes._Layers, batch: Batch) -> Tensor:
        found.append(len(batch.token_ids))
        return play(own, batch)

    monkeypatch.setattr(step_tapes._Layers, "play", noted)
    return found


def decoding_of(dtype: torch.dtype, *, with_tapes: bool = True) -> Decoding:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).to(dtype).eval().requires_grad_(False)
    decoding = Decoding.of(model, FAMILIES, len(DIGESTS), 16 << 20, "native")
    runner = decoding._core._runner
    assert isinstance(runner._recordings, StepTapes)
    if not with_tapes:
        runner._recordings = None
    decoding.load([digest for digest in DIGESTS if digest])
    return decoding


def logprobs(
    decoding: Decoding,
    digests: Sequence[str | AdapterUse | None],
    prompt_tokens: int = 3,
    *,
    of_prompts: bool = False,
) -> list[list[float]]:
    """Of answers of different lengths, so that steps have all numbers of rows."""
    core, found = decoding._core, {}
    for number, digest in enumerate(digests):
        found[str(number)] = list[float]()
        top = 1 if of_prompts else None
        sampling = SamplingParams(max_tokens=3 + 2 * number, temperature=0, logprobs=1, prompt_logprobs=top)
        prompt = [(7 * n + 11 * number) % 500 for n in range(prompt_tokens + number)]
        use = AdapterUse(digest) if isinstance(digest, str) else digest
        adapters = () if use is None else (use,)
        core.submit(Submit(str(number), prompt, sampling, adapters))
    while core.has_work:
        for event in core.step().events:
            assert event.error_message is None
            found[event.request_id] += [token.logprob for token in event.logprobs]
            found[event.request_id] += [token.logprob for token in event.prompt_logprobs or () if token]
    return list(found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_every_family_of_adapters(dtype: torch.dtype, played: list[int]) -> None:
    want = logprobs(decoding_of(dtype, with_tapes=False), DIGESTS)
    assert not played
    decoding = decoding_of(dtype)
    assert logprobs(decoding, DIGESTS) == want
    assert logprobs(decoding, DIGESTS) == want  # What a tape plays is known by now.
    assert set(played) > set(range(1, len(DIGESTS) + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_of_prompts(dtype: torch.dtype, played: list[int]) -> None:
    """In pieces beside rows that decode; and with more rows kept than the head's tape has."""
    kept = {}
    for of_prompts in (False, True):
        want = logprobs(decoding_of(dtype, with_tapes=False), DIGESTS, 70, of_prompts=of_prompts)
        kept[of_prompts] = sum(map(len, want))
        assert logprobs(decoding_of(dtype), DIGESTS, 70, of_prompts=of_prompts) == want
    assert kept[True] > kept[False] + 70 * len(DIGESTS)
    assert max(played) == 512
    assert any(64 < num_rows < 512 for num_rows in played)


def test_a_prompt_cut_into_steps_gives_the_bits_of_a_whole_one(played: list[int]) -> None:
    """Its last row is alone. Steps in its midst make no logits, which would tell whether tapes are right, and
    are played once others were."""
    found = []
    for most_rows in (512, 23):
        decoding = decoding_of(torch.bfloat16)
        scheduler = decoding._core._scheduler
        scheduler.limits = replace(scheduler.limits, max_num_batched_tokens=most_rows)
        found.append([logprobs(decoding, ["lora-0"], 70, of_prompts=scored) for scored in (True, False)])
    assert found[0] == found[1]
    assert played.count(23) == 6


def test_steps_of_more_rows_run_as_usual(played: list[int]) -> None:
    decoding = decoding_of(torch.float32)
    runner = decoding._core._runner
    runner._recordings = StepTapes(runner._model, runner.cache, runner._adapters, 6)
    want = logprobs(decoding_of(torch.float32, with_tapes=False), DIGESTS)
    assert logprobs(decoding, DIGESTS) == want
    assert set(played) == {1, 2, 3, 4, 5, 6, 7}, "seven divides no size"


def test_a_tape_that_gives_something_else_is_the_last(
    played: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def gives_zeros(_: object, hidden_1TD: Tensor, kept_rows_K: Tensor) -> Tensor:
        return torch.zeros(len(kept_rows_K), CONFIG.vocab_size)

    want = logprobs(decoding_of(torch.float32, with_tapes=False), DIGESTS[:3])
    monkeypatch.setattr(step_tapes._Head, "play", gives_zeros)
    decoding = decoding_of(torch.float32)
    with caplog.at_level(logging.WARNING):
        assert logprobs(decoding, DIGESTS[:3]) == want
    assert len(played) == 1
    assert "other logits than the model" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [PhiConfig, CohereConfig])
def test_with_attention_and_mlp_side_by_side(kind: type[PreTrainedConfig], dtype: torch.dtype) -> None:
    """Between layers that read one tensor others run, whose adapters come and go for themselves."""
    config = kind(**{**CONFIG.to_diff_dict(), "model_type": kind.model_type, "tie_word_embeddings": False})
    outputs = ("dense", "o_proj")
    makes = {"output": only(outputs, of_them=True), "input": only(outputs, of_them=False)}
    found = []
    for with_tapes in (False, True):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).to(dtype).eval().requires_grad_(False)
        decoding = Decoding.of(model, makes, 8, 16 << 20, "native")
        if not with_tapes:
            decoding._core._runner._recordings = None
        decoding.load(["output-0", "input-0"])
        both = ["output-0"] * 2, ["input-0"] * 2, ["output-0", "input-0"], ["input-0", "output-0"]
        found.append([logprobs(decoding, digests) for digests in both])
    assert found[0] == found[1]


def test_soft_prompts_act_beside_tapes_that_are_known_to_be_right() -> None:
    """What the embedding puts out for their rows becomes another one."""
    virtual = 5

    def make(_: Mapping[str, tuple[int, int]]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        config = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": virtual}
        return config, {"prompt_embeddings": torch.randn(virtual, CONFIG.hidden_size)}

    found = []
    for with_tapes in (False, True):
        torch.manual_seed(0)
        model = LlamaForCausalLM(CONFIG).eval().requires_grad_(False)
        decoding = Decoding.of(model, {"prompt": make}, 4, 16 << 20, "native")
        if not with_tapes:
            decoding._core._runner._recordings = None
        decoding.load(["prompt-0"])
        logprobs(decoding, [None] * 3)
        logprobs(decoding, [None] * 3, 70)
        use = AdapterUse("prompt-0", virtual_tokens=virtual)
        found.append([logprobs(decoding, [use, None, use], length) for length in (3, 70)])
    assert found[0] == found[1]
    recordings = decoding._core._runner._recordings
    assert isinstance(recordings, StepTapes)
    assert [layers.proven for layers in recordings._layers] == [{True, False}, {False}]


def only(names: tuple[str, ...], *, of_them: bool) -> Make:
    """FourierFT on layers of these names, or on all others."""

    def make(shapes: Mapping[str, tuple[int, int]]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return FAMILIES["fourierft"]({p: size for p, size in shapes.items() if p.endswith(names) == of_them})

    return make


def test_a_model_that_treats_one_row_otherwise_runs_as_usual(caplog: pytest.LogCaptureFixture) -> None:
    def doubled(_: object, __: object, y_1TD: Tensor) -> Tensor | None:
        return 2 * y_1TD if y_1TD.shape[1] == 1 else None

    found = []
    for with_tapes in (False, True):
        torch.manual_seed(0)
        model = LlamaForCausalLM(CONFIG).eval().requires_grad_(False)
        model.model.layers[1].register_forward_hook(doubled)
        decoding = Decoding.of(model, {}, 4, 16 << 20, "native")
        if not with_tapes:
            decoding._core._runner._recordings = None
        found.append(logprobs(decoding, [None] * 3))
    assert found[0] == found[1]
    assert "other logits than the model" in caplog.text


def test_a_model_that_reads_numbers_runs_as_usual(
    played: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """Experts are called for the tokens that chose them."""
    torch.manual_seed(0)
    config = MixtralConfig(**CONFIG.to_diff_dict(), num_local_experts=4)
    model = MixtralForCausalLM(config).eval().requires_grad_(False)
    decoding = Decoding.of(model, {}, 4, 16 << 20, "native")
    with caplog.at_level(logging.WARNING):
        answers = decoding.greedy_tokens([None] * 3, prompt_tokens=5, steps=6)
    assert [len(tokens) for tokens in answers] == [6, 6, 6]
    assert not played
    assert "steps run without tapes" in caplog.text


def test_a_tape_that_cannot_be_played_is_the_last(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise AttributeError("there is none")

    want = logprobs(decoding_of(torch.float32, with_tapes=False), DIGESTS[:3])
    monkeypatch.setattr(step_tapes._Layers, "play", fail)
    with caplog.at_level(logging.WARNING):
        assert logprobs(decoding_of(torch.float32), DIGESTS[:3]) == want
    assert "steps run without tapes: there is none" in caplog.text


def test_a_step_that_fails_anyhow_turns_no_tapes_off(
    played: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter that fails is its own affair."""
    decoding = decoding_of(torch.float32)

    def fail(*_: object) -> None:
        raise RuntimeError("this adapter fails")

    with monkeypatch.context() as failing:
        failing.setattr(AdaptedGroup, "in_place", fail)
        with pytest.raises(RuntimeError, match="safe to try again"):
            decoding.step_seconds(["lora-0"], 1, 3)
    want = logprobs(decoding_of(torch.float32, with_tapes=False), DIGESTS[:3])
    assert logprobs(decoding, DIGESTS[:3]) == want
    assert played
