"""The real engine core without HTTP and without a store, around any model in memory: what steps are timed on.

Adapters are made when the engine asks for them, on the model's device, and are called ``<name>-<number>``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count

import torch
from random_adapters import Make
from transformers import PreTrainedModel

from timbre_methods.contract import Sites
from timbre_methods.prompt_contract import Frame
from timbre_methods.registry import compile_adapter
from timbre_server.adapters.kernels import choose_kernels
from timbre_server.adapters.loader import LoadedAdapter
from timbre_server.adapters.placement import Layout, placed_program
from timbre_server.adapters.transfer import Transfer
from timbre_server.engine.assembly import engine_around, layout_for
from timbre_server.engine.attention import install_attention
from timbre_server.engine.core import EngineCore
from timbre_server.engine.messages import AdapterUse, SamplingParams, StepOutput, Submit, TokenEvent
from timbre_server.engine.model_loader import LoadedModel, PreparedModel
from timbre_server.engine.options import EngineOptions, KernelChoice
from timbre_server.engine.probe import probe

ADAPTER_BYTES = 64 << 30
"""More than any bench fills."""
TIMEOUT_S = 600.0


@dataclass(frozen=True)
class MadeAdapters:
    """A loader (`adapters.runtime.Loader`) whose adapters are random and come from nowhere."""

    makes: Mapping[str, Make]
    layout: Layout
    sites: Sites
    frame: Frame
    groups: Sequence[Sequence[str]]

    def load(self, digest: str) -> LoadedAdapter:
        name, _, number = digest.rpartition("-")
        linear = {path: site for path, site in self.sites.items() if site.kind == "linear"}
        shapes = {p: (s.out_features, s.in_features) for p, s in linear.items() if "layers." in p}
        device = next(iter(linear.values())).weight_OI.device
        with device:
            torch.manual_seed(int(number))
            config, tensors = self.makes[name](shapes)
        with torch.inference_mode():
            program = compile_adapter(config, tensors, self.sites, self.frame)
            program = placed_program(program, Transfer(device), self.groups, self.layout)
        return LoadedAdapter(digest, name, program, {})


class Decoding:
    """An engine whose steps can be had one by one, all of them decode steps of as many rows."""

    def __init__(self, core: EngineCore, vocab_size: int, device: torch.device) -> None:
        self._core = core
        self._vocab_size = vocab_size
        self._device = device
        self._numbers = count()

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        makes: Mapping[str, Make],
        rows: int,
        kv_bytes: int,
        kernels: KernelChoice = "auto",
    ) -> Decoding:
        """The engine around a model that nothing else uses; adapters of each of ``makes``."""
        install_attention(model)
        prepared = PreparedModel(LoadedModel(model, "random", ""), probe(model))
        options = EngineOptions(
            model="",
            adapters_dir="",
            max_num_seqs=rows,
            kv_cache_bytes=kv_bytes,
            enable_prefix_caching=False,
            adapter_memory_bytes=ADAPTER_BYTES,
            kernels=kernels,
        )
        chosen, _ = choose_kernels(kernels, model.device)
        made = partial(MadeAdapters, makes, layout_for(options.lora_dtype, model.dtype, chosen))
        core, ready = engine_around(prepared, options, print, lambda: None, made)
        return cls(core, ready.vocab_size, model.device)

    def load(self, digests: list[str]) -> None:
        """Raises RuntimeError for one that cannot be loaded, or takes too long."""
        for digest in digests:
            self._core.load_adapter(digest)
        missing, give_up = set(digests), time.monotonic() + TIMEOUT_S
        while missing:
            for loaded in self._core.step().loaded:
                if loaded.error_message:
                    raise RuntimeError(loaded.error_message)
                missing.discard(loaded.digest)
            time.sleep(0.001)  # The thread that loads has the processor meanwhile.
            if time.monotonic() > give_up:
                raise RuntimeError(f"{len(missing)} adapters were not loaded within {TIMEOUT_S:.0f} s")

    def unload(self, digests: list[str]) -> None:
        for digest in digests:
            self._core.unload_adapter(digest)

    def step_seconds(
        self,
        digests: list[str | None],
        prompt_tokens: int,
        steps: int,
        while_measured: AbstractContextManager[object] | None = None,
    ) -> list[float]:
        """Of so many decode steps with one row for each digest (None: the base), all rows under way.

        ``while_measured`` is entered for them alone, after the prompts and one step that warms up."""
        requests = [self._submit(digest, prompt_tokens, steps) for digest in digests]
        waiting = set(requests)
        while waiting:
            waiting -= {event.request_id for event in self._checked(self._core.step()) if event.token_ids}
        self.one_step()
        with while_measured or nullcontext():
            times = [self.one_step() for _ in range(steps)]
        for request_id in requests:
            self._core.abort(request_id)
        while self._core.has_work:
            self._core.step()
        return times

    def greedy_tokens(self, digests: list[str | None], prompt_tokens: int, steps: int) -> list[list[int]]:
        """What each of so many requests is answered at temperature 0; prompts follow from torch's seed."""
        lengths = range(prompt_tokens, prompt_tokens + len(digests))
        requests = [
            self._submit(digest, length, steps) for digest, length in zip(digests, lengths, strict=True)
        ]
        found: dict[str, list[int]] = {request_id: [] for request_id in requests}
        while any(len(tokens) < steps for tokens in found.values()):
            for event in self._checked(self._core.step()):
                found[event.request_id] += event.token_ids
        for request_id in found:
            self._core.abort(request_id)
        return [tokens[:steps] for tokens in found.values()]

    def one_step(self) -> float:
        """Seconds of the whole turn, scheduling and sampling included."""
        started = time.perf_counter()
        output = self._core.step()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - started
        self._checked(output)
        return seconds

    def _submit(self, digest: str | None, prompt_tokens: int, steps: int) -> str:
        request_id = str(next(self._numbers))
        prompt = torch.randint(self._vocab_size, (prompt_tokens,)).tolist()
        sampling = SamplingParams(max_tokens=prompt_tokens + 4 * steps + 64, temperature=0)
        adapters = () if digest is None else (AdapterUse(digest),)
        self._core.submit(Submit(request_id, prompt, sampling, adapters))
        return request_id

    @staticmethod
    def _checked(output: StepOutput) -> tuple[TokenEvent, ...]:
        for event in output.events:
            if event.error_message:
                raise RuntimeError(event.error_message)
        return output.events


def distinct(name: str | None, rows: int) -> list[str | None]:
    """As many different adapters as rows; None: the base for each."""
    return [None if name is None else f"{name}-{number}" for number in range(rows)]
