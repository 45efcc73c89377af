"""Decode steps that are played give the bits of steps that run, with any adapters."""

from __future__ import annotations

import logging

import pytest
import torch
from engine_in_process import Decoding
from random_adapters import FAMILIES
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from timbre_server.adapters.adapted_group import AdaptedGroup
from timbre_server.engine import decode_tapes
from timbre_server.engine.decode_tapes import DecodeTapes
from timbre_server.engine.messages import AdapterUse, SamplingParams, Submit
from timbre_server.engine.native_attention import NativeStep

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
    play = decode_tapes._DecodeTape.play

    def noted(own: decode_tapes._DecodeTape, step: NativeStep, numbers_2T: Tensor) -> None:
        found.append(numbers_2T.shape[1])
        play(own, step, numbers_2T)

    monkeypatch.setattr(decode_tapes._DecodeTape, "play", noted)
    return found


def decoding_of(dtype: torch.dtype, *, with_tapes: bool = True) -> Decoding:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).to(dtype).eval().requires_grad_(False)
    decoding = Decoding.of(model, FAMILIES, len(DIGESTS), 16 << 20, "native")
    runner = decoding._core._runner
    assert isinstance(runner._recordings, DecodeTapes)
    if not with_tapes:
        runner._recordings = None
    decoding.load([digest for digest in DIGESTS if digest])
    return decoding


def logprobs(decoding: Decoding, digests: list[str | None]) -> list[list[float]]:
    """Of answers of different lengths, so that steps have all numbers of rows."""
    core, found = decoding._core, {}
    for number, digest in enumerate(digests):
        found[str(number)] = list[float]()
        sampling = SamplingParams(max_tokens=3 + 2 * number, temperature=0, logprobs=1)
        adapters = () if digest is None else (AdapterUse(digest),)
        core.submit(Submit(str(number), [7 + number, 3, 11 * number], sampling, adapters))
    while core.has_work:
        for event in core.step().events:
            assert event.error_message is None
            found[event.request_id] += [token.logprob for token in event.logprobs]
    return list(found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_every_family_of_adapters(dtype: torch.dtype, played: list[int]) -> None:
    want = logprobs(decoding_of(dtype, with_tapes=False), DIGESTS)
    assert not played
    decoding = decoding_of(dtype)
    assert logprobs(decoding, DIGESTS) == want
    assert logprobs(decoding, DIGESTS) == want  # All are recorded by now.
    assert set(played) == set(range(1, len(DIGESTS) + 1))


def test_steps_of_many_rows_run_as_usual(played: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_tapes, "MOST_ROWS", 2)
    decoding = decoding_of(torch.float32)
    want = logprobs(decoding, [None] * 5)
    assert logprobs(decoding, [None] * 5) == want
    assert set(played) == {1, 2}


def test_a_tape_that_gives_something_else_is_the_last(
    played: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    want = logprobs(decoding_of(torch.float32, with_tapes=False), DIGESTS[:3])
    monkeypatch.setattr(decode_tapes._DecodeTape, "play", lambda *_: played.append(3))
    decoding = decoding_of(torch.float32)
    with caplog.at_level(logging.WARNING):
        assert logprobs(decoding, DIGESTS[:3]) == want
    assert played == [3]
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
    assert "decode steps run without tapes" in caplog.text


def test_a_tape_that_cannot_be_played_is_the_last(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise AttributeError("there is none")

    want = logprobs(decoding_of(torch.float32, with_tapes=False), DIGESTS[:3])
    monkeypatch.setattr(decode_tapes._DecodeTape, "play", fail)
    with caplog.at_level(logging.WARNING):
        assert logprobs(decoding_of(torch.float32), DIGESTS[:3]) == want
    assert "decode steps run without tapes: there is none" in caplog.text


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
