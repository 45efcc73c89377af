"""The whole engine in its own process on a real, tiny model, against transformers' own generate."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from timbre_server.engine.client import EngineProcess
from timbre_server.engine.messages import AdapterUse, SamplingParams, Submit, TokenEvent
from timbre_server.engine.options import EngineOptions
from timbre_server.errors import UnsupportedModel

NUM_PROMPTS = 12
NUM_TOKENS = 24
MISSING = "sha256:" + "0" * 64


@pytest.fixture(autouse=True)
def importable_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Children import what this process imports, also where the packages are not installed."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


async def collected(engine: EngineProcess, request: Submit) -> list[TokenEvent]:
    return [event async for event in engine.submit(request)]


def generated(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    ids_1T = torch.tensor([prompt])
    output_1T = model.generate(
        ids_1T, attention_mask=torch.ones_like(ids_1T), max_new_tokens=NUM_TOKENS, do_sample=False
    )
    return [int(token) for token in output_1T[0, len(prompt) :]]


@pytest.mark.parametrize(
    "squeeze",
    [{}, {"max_num_batched_tokens": 7, "block_size": 4, "kv_cache_bytes": 28_000, "max_model_len": 64}],
)
async def test_crowded_requests_get_the_tokens_that_generate_gives(
    tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path, squeeze: dict[str, int]
) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    numbers = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1, 131, (3 + 3 * at,), generator=numbers).tolist() for at in range(NUM_PROMPTS)]
    prompts[-1] = prompts[-2][:24] + prompts[-1][:5]
    options = EngineOptions(
        model=str(tmp_path / "model"), adapters_dir=str(tmp_path), dtype="float32", device="cpu", **squeeze
    )
    told: list[str] = []
    engine = await EngineProcess.start(options, told.append)
    preemptions: list[int] = []
    engine.on_output(lambda output: preemptions.append(output.stats.preemptions))
    try:
        assert told[0] == f"Loading {options.model}"
        sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)
        requests = [Submit(f"r{at}", prompt, sampling) for at, prompt in enumerate(prompts)]
        missing = Submit("missing", [1, 2, 3], sampling, (AdapterUse(MISSING),))
        *answers, refused = await asyncio.gather(*(collected(engine, each) for each in [*requests, missing]))
        for prompt, events in zip(prompts, answers, strict=True):
            assert [token for event in events for token in event.token_ids] == generated(model, prompt)
        assert refused[-1].error_code == "adapter_load_failed"
        assert (sum(preemptions) > 0) == bool(squeeze)
        assert engine.latest.num_kv_blocks_used == 0
    finally:
        await engine.close()


async def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(UnsupportedModel, match=str(tmp_path)):
        await EngineProcess.start(EngineOptions(model=str(tmp_path), adapters_dir=str(tmp_path)))
