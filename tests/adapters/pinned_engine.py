"""The real engine around a tiny model, with adapters that load and one that may be pinned.

Programs take the place of the store's files; merged products are counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from timbre_methods.program import AdapterProgram
from timbre_methods.registry import compile_adapter, derive
from timbre_server.adapters.derivation import Derivations
from timbre_server.adapters.loader import LoadedAdapter
from timbre_server.adapters.pinning import Pinning
from timbre_server.adapters.runtime import AdapterRuntime
from timbre_server.engine.core import EngineCore
from timbre_server.engine.kv_blocks import BlockPool
from timbre_server.engine.messages import (
    AdapterUse,
    LoadAdapter,
    SamplingParams,
    StepOutput,
    Submit,
)
from timbre_server.engine.packed_linear import LinearPacker
from timbre_server.engine.pin_messages import PinAdapter, PinAnswer, UnpinAdapter
from timbre_server.engine.scheduler import Scheduler
from timbre_server.errors import AdapterLoadFailed

Mix = tuple[tuple[str, float], ...]
Product = Callable[[Tensor], Tensor]


@dataclass
class Answer:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """Of the prompt's tokens, where they were asked for, then of the answer's."""
    cached_tokens: int = 0


class CountedProducts(LinearPacker):
    """Counts the rows that run through merged weights, and the threads that these are made on."""

    rows = 0
    threads = 0

    def product_with(self, weight_OI: Tensor, bias_O: Tensor | None) -> Product:
        self.threads = torch.get_num_threads()
        product = super().product_with(weight_OI, bias_O)

        def counted(x: Tensor) -> Tensor:
            self.rows += x.shape[-2]
            return product(x)

        return counted


class PinnedEngine:
    """Turned by hand; digests are names."""

    def __init__(self, engine_bench: ModuleType, model: nn.Module, budget_bytes: int = 1 << 30) -> None:
        bench = engine_bench.EngineBench(model)
        self.model: nn.Module = bench.model
        self.sites, self.frame = bench.sites, bench.frame
        self.programs: dict[str, AdapterProgram] = {}
        self.products = CountedProducts(bench.model.dtype, bench.model.device)
        self.adapters = AdapterRuntime(bench.adapted, self, budget_bytes)
        self.pinning = Pinning(bench.adapted, self.adapters, self.sites, self.products)
        blocks = BlockPool(bench.runner.num_blocks, engine_bench.BLOCK_SIZE)
        scheduler = Scheduler(bench.scheduler.limits, blocks, self.adapters)
        self.core = EngineCore(bench.runner, scheduler, self.adapters, Derivations(self.sites), self.pinning)
        self._answers: dict[str, Answer] = {}

    def load(self, digest: str) -> LoadedAdapter:
        """As the engine's loader: on the loads' thread."""
        if digest not in self.programs:
            raise AdapterLoadFailed(f"{digest} is not there")
        return LoadedAdapter(digest, "some method", self.programs[digest], {})

    def store(self, digest: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> AdapterProgram:
        """Compile an adapter, from what the base's layers hold now."""
        with torch.inference_mode():
            tensors = {**tensors, **derive(config, tensors, self.sites)}
            self.programs[digest] = compile_adapter(config, tensors, self.sites, self.frame)
        return self.programs[digest]

    def bring_in(self, digest: str) -> str | None:
        """Load an adapter; why not, where that failed."""
        self.core.take(LoadAdapter(digest))
        return self.turn_until(lambda output: bool(output.loaded)).loaded[0].error_message

    def ask(self, prompt: list[int], mix: tuple[AdapterUse, ...], **sampling: Any) -> Answer:
        """A greedy request; its answer grows with each turn."""
        request_id = f"r{len(self._answers)}"
        params = SamplingParams(**{"max_tokens": 8, "temperature": 0.0, "logprobs": 0, **sampling})
        answer = self._answers[request_id] = Answer()
        self.core.take(Submit(request_id, prompt, params, mix))
        return answer

    def turn(self) -> StepOutput:
        output = self.core.step()
        self.adapters.check_integrity()
        for event in output.events:
            assert event.error_message is None
            answer = self._answers[event.request_id]
            answer.token_ids += event.token_ids
            told = (*event.prompt_logprobs, *event.logprobs)
            answer.logprobs += (each.logprob for each in told if each is not None)
            answer.cached_tokens = max(answer.cached_tokens, event.cached_tokens)
        return output

    def answers(self, *asked: tuple[list[int], tuple[AdapterUse, ...]], **sampling: Any) -> list[Answer]:
        """Of requests that run together, (prompt, mix) each."""
        found = [self.ask(prompt, mix, **sampling) for prompt, mix in asked]
        while self.core.has_work:
            self.turn()
        return found

    def turn_until(self, done: Callable[[StepOutput], bool]) -> StepOutput:
        give_up = time.monotonic() + 20
        while not done(output := self.turn()):
            assert time.monotonic() < give_up, "it never came"
            time.sleep(0.0002)
        return output

    def pin(self, digest: str, mix: Mix | None = None) -> PinAnswer:
        self.core.take(PinAdapter(digest, mix or ((digest, 1.0),)))
        return self.turn_until(lambda output: bool(output.pins)).pins[0]

    def unpin(self, digest: str) -> PinAnswer:
        self.core.take(UnpinAdapter(digest))
        return self.turn_until(lambda output: bool(output.pins)).pins[0]
