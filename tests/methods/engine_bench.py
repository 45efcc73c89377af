"""The real engine around a tiny model, with adapters in memory: for methods that only whole requests show.

Scheduler, runner, paged cache and adapted model are the server's; files and sockets are left out.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from timbre_methods.contract import Sites
from timbre_methods.program import AdapterProgram
from timbre_methods.registry import check_adapter, compile_adapter, derive
from timbre_server.adapters.adapted_model import AdaptedModel, Arithmetic
from timbre_server.adapters.base_sites import base_frame, base_sites
from timbre_server.engine.assembly import layers_of
from timbre_server.engine.attention import install_attention
from timbre_server.engine.fused_layers import fuse_layers
from timbre_server.engine.fused_norm import norm_of
from timbre_server.engine.kv_blocks import BlockPool
from timbre_server.engine.kv_cache import bytes_per_block
from timbre_server.engine.layer_stack import Ranges, stack_layers
from timbre_server.engine.messages import AdapterUse, SamplingParams, Submit, TokenEvent
from timbre_server.engine.model_loader import LoadedModel, PreparedModel
from timbre_server.engine.probe import probe
from timbre_server.engine.runner import Runner, RunnerOptions
from timbre_server.engine.scheduler import Scheduler, SchedulerLimits
from timbre_server.operators.catalogue import Kernels

BLOCK_SIZE = 4
Asked = str | AdapterUse | tuple[AdapterUse, ...] | None


class Shelf:
    """Every adapter resident in a slot, by its digest."""

    def __init__(self) -> None:
        self.slots: dict[str, int] = {}

    def try_acquire(self, digest: str) -> int | None:
        return self.slots[digest]

    def release(self, digest: str) -> None: ...

    def failure(self, digest: str) -> tuple[str, str] | None: ...

    def no_requests(self, digest: str) -> None: ...

    def favour(self, digests: Iterable[str]) -> None: ...

    def misfit(self, digests: Iterable[str]) -> str | None:
        return None


@dataclass
class Answer:
    """What one request gave."""

    token_ids: list[int]
    logprobs: list[float]
    prompt_logprobs: list[float]
    cached_tokens: int
    error: str | None


class EngineBench:
    """One engine; NaN lies wherever nobody has written a KV entry."""

    def __init__(
        self,
        model: nn.Module,
        *,
        num_blocks: int = 64,
        budget: int = 64,
        max_len: int = 64,
        layers: Ranges = (),
        kernels: Kernels = "torch",
    ) -> None:
        self.model: Any = copy.deepcopy(model)
        stack = stack_layers(self.model, layers)
        install_attention(self.model)
        probed = probe(self.model)
        self.sites: Sites = base_sites(layers_of(self.model, probed.sites))
        attention = (layer.attention for layer in probed.layers)
        self.frame = base_frame(probed.hidden_size, map(msgspec.structs.astuple, attention), stack)
        fuse_layers(self.model, probed.layers, kernels)
        self.shelf = Shelf()
        self.uses: dict[str, AdapterUse] = {}
        self.adapted = AdaptedModel(
            self.model,
            probed.groups,
            Arithmetic(kernels=kernels, norm_of=partial(norm_of, native=kernels == "native")),
            lone=probed.lone,
            blocks=probed.blocks,
            embedding=self.model.get_input_embeddings(),
            parameters=probed.parameters,
        )
        block_bytes = bytes_per_block(probed.kv_shapes, BLOCK_SIZE, self.model.dtype)
        prepared = PreparedModel(LoadedModel(self.model, "tiny", "sha256:0"), probed)
        options = RunnerOptions(
            block_size=BLOCK_SIZE, kv_cache_bytes=num_blocks * block_bytes, max_model_len=max_len
        )
        self.runner = Runner(prepared, self.adapted, options)
        for layer in range(len(probed.layers)):
            for pool in self.runner.cache.pools(layer):
                pool.fill_(float("nan"))
        limits = SchedulerLimits(
            8, budget, self.runner.max_model_len, vocab_size=self.model.config.vocab_size
        )
        self.scheduler = Scheduler(limits, BlockPool(self.runner.num_blocks, BLOCK_SIZE), self.shelf)
        self.num_preemptions = 0
        self._num_requests = 0

    def put(self, digest: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> AdapterProgram:
        """Make an adapter resident, checked and compiled as the server does it."""
        found = check_adapter(config, tensors, self.sites, self.frame)
        with torch.inference_mode():
            tensors = {**tensors, **derive(config, tensors, self.sites)}
            program = compile_adapter(config, tensors, self.sites, self.frame)
        slot = self.shelf.slots.setdefault(digest, len(self.shelf.slots))
        self.adapted.put(slot, program)
        self.uses[digest] = AdapterUse(digest, virtual_tokens=found.virtual_tokens, scouts=found.scouts)
        return program

    def submit(self, prompt: list[int], adapter: Asked = None, num_tokens: int = 8, **sampling: Any) -> str:
        """Queue a greedy request; returns its id."""
        self._num_requests += 1
        request_id = f"r{self._num_requests}"
        params = SamplingParams(**{"max_tokens": num_tokens, "temperature": 0.0, "logprobs": 0, **sampling})
        self.scheduler.add(Submit(request_id, prompt, params, self._uses_of(adapter)))
        return request_id

    def _uses_of(self, adapter: Asked) -> tuple[AdapterUse, ...]:
        if isinstance(adapter, str):
            return (self.uses[adapter],)
        return (adapter,) if isinstance(adapter, AdapterUse) else adapter or ()

    def step(self) -> tuple[TokenEvent, ...]:
        plan = self.scheduler.schedule()
        self.num_preemptions += self.scheduler.counts.preemptions
        if not plan.chunks:
            return self.scheduler.take_events()
        events = self.scheduler.update(plan, self.runner.execute(plan))
        self.scheduler.blocks.check_integrity()
        return events

    def run(self) -> dict[str, Answer]:
        """All queued requests to their ends, by id."""
        answers: dict[str, Answer] = {}
        for _ in range(1000):
            if not self.scheduler.has_work:
                assert self.scheduler.blocks.num_used == 0
                return answers
            for event in self.step():
                answer = answers.setdefault(event.request_id, Answer([], [], [], 0, None))
                answer.token_ids += event.token_ids
                answer.logprobs += (each.logprob for each in event.logprobs)
                answer.prompt_logprobs += (each.logprob for each in event.prompt_logprobs if each is not None)
                answer.cached_tokens = max(answer.cached_tokens, event.cached_tokens)
                answer.error = answer.error or event.error_message
        raise AssertionError("still at work after 1000 steps")

    def answer(self, prompt: list[int], adapter: Asked = None, **options: Any) -> Answer:
        """One request alone."""
        request_id = self.submit(prompt, adapter, **options)
        return self.run()[request_id]
