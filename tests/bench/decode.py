"""What adapters cost in a whole decode step: ``make bench-decode``.

A random model of the embedded model's shapes (float32; fewer than its 30 layers, unless ``--layers`` says so)
over the paged cache, 16 sequences of one context length, each with its own adapter: the server's own forward
pass, without HTTP and scheduler. Every round times every scenario once, interleaved, so that a busy neighbour
troubles all alike; ``ratio`` is base only's time by the scenario's in the same round, medians. With one
thread the clock is the process's processor time, which a neighbour moves less.

Prints a table and writes JSON.

Legend: T rows.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from random_adapters import FAMILIES
from table import arguments, report
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from timbre_methods.contract import Site, Sites
from timbre_methods.program import AdapterProgram, Part
from timbre_methods.registry import compile_adapter
from timbre_server.adapters.adapted_model import AdaptedModel, Arithmetic
from timbre_server.engine.attention import install_attention
from timbre_server.engine.batch import Batch, forward
from timbre_server.engine.fused_layers import fuse_layers
from timbre_server.engine.fused_norm import norm_of
from timbre_server.engine.kv_cache import KVCache
from timbre_server.engine.packed_linear import LinearPacker
from timbre_server.engine.paged_attention import SequenceRows
from timbre_server.engine.probe import probe
from timbre_server.operators.catalogue import Kernels
from timbre_server.operators.row_table import RowTable, Span

STREAMS, CONTEXT, PROMPT, BLOCK_SIZE = 16, 128, 64, 16
MIXED = "all"


def random_model(layers: int) -> LlamaForCausalLM:
    """SmolLM2-135M's shapes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=layers,
        num_attention_heads=9, num_key_value_heads=3, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def programs(model: LlamaForCausalLM) -> dict[str, list[AdapterProgram]]:
    """One adapter of each family for each stream, every one with tensors of its own."""
    head = model.get_output_embeddings()
    weights = {
        path: layer.weight.detach()
        for path, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and layer is not head
    }
    sites: Sites = {path: Site(path, weight, None) for path, weight in weights.items()}
    shapes = {path: (weight.shape[0], weight.shape[1]) for path, weight in weights.items()}
    found = {}
    for family, make in FAMILIES.items():
        config, tensors = make(shapes)
        program = compile_adapter(config, tensors, sites)
        found[family] = [_copied(program) for _ in range(STREAMS)]
    return found


def _copied(program: AdapterProgram) -> AdapterProgram:
    return AdapterProgram({path: tuple(map(_cloned, parts)) for path, parts in program.sites.items()})


def _cloned(part: Part) -> Part:
    own = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
    return type(part)(**{k: v.clone() if isinstance(v, Tensor) else v for k, v in own.items()})


class Measured:
    """The model with one way to run its adapters; weights are shared with the others."""

    def __init__(
        self, model: PreTrainedModel, packer: LinearPacker, kernels: Kernels, slots: Sequence[AdapterProgram]
    ) -> None:
        self._model = copy.deepcopy(model, {id(p): p for p in model.parameters()})
        probed = probe(self._model)
        fuse_layers(self._model, probed.layers, kernels)
        arithmetic = Arithmetic(packer.product_of, kernels, partial(norm_of, native=kernels == "native"))
        self._adapted = AdaptedModel(self._model, probed.groups, arithmetic, probed.lone)
        for slot, program in enumerate(slots):
            self._adapted.put(slot, program)
        per_sequence = CONTEXT // BLOCK_SIZE
        self._cache = KVCache(
            probed.kv_shapes,
            num_blocks=1 + STREAMS * per_sequence,
            block_size=BLOCK_SIZE,
            dtype=self._model.dtype,
            device=self._model.device,
        )
        self._blocks = [
            tuple(range(1 + i * per_sequence, 1 + (i + 1) * per_sequence)) for i in range(STREAMS)
        ]

    def decode_ms(self, slots: Sequence[int | None]) -> float:
        """One token for every stream, at the end of its context."""
        rows = [SequenceRows(i, 1, CONTEXT - 1, blocks) for i, blocks in enumerate(self._blocks)]
        return self._step_ms(Batch(range(STREAMS), rows, range(STREAMS)), slots, 1)

    def prefill_ms(self, slots: Sequence[int | None]) -> float:
        """The prompts of four streams, whole."""
        rows = [SequenceRows(i * PROMPT, PROMPT, 0, self._blocks[i]) for i in range(4)]
        kept = [(i + 1) * PROMPT - 1 for i in range(4)]
        return self._step_ms(Batch(range(4 * PROMPT), rows, kept), slots[:4], PROMPT)

    def _step_ms(self, batch: Batch, slots: Sequence[int | None], num_rows: int) -> float:
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        started = clock()
        pairs = [() if slot is None else ((slot, 1.0),) for slot in slots]
        table = RowTable([Span(num_rows, own) for own in pairs])
        head_table = RowTable([Span(1, own) for own in pairs])
        with torch.inference_mode():
            self._adapted.set_rows(table, head_table)
            forward(self._model, self._cache, batch).argmax(1)
            self._adapted.clear_rows()
        return 1000 * (clock() - started)


def scenarios(names: Sequence[str]) -> dict[str, Sequence[int | None]]:
    """The slot of every stream; family f has the slots from f times `STREAMS` on."""
    found: dict[str, Sequence[int | None]] = {"base": [None] * STREAMS}
    for number, name in enumerate(names):
        found[name] = range(number * STREAMS, (number + 1) * STREAMS)
    found[MIXED] = [(stream % len(names)) * STREAMS + stream for stream in range(STREAMS)]
    return found


def measure(
    model: LlamaForCausalLM, kernels: Sequence[Kernels], rounds: int, steps: int
) -> Iterator[dict[str, Any]]:
    """A row for each scenario, kernels and phase."""
    by_family = programs(model)
    slots = [program for own in by_family.values() for program in own]
    install_attention(model)
    packer = LinearPacker(model.dtype, model.device, native="native" in kernels)
    models = {name: Measured(model, packer, name, slots) for name in kernels}
    times: dict[tuple[str, str, str], list[float]] = {}
    for number in range(rounds + 1):
        for scenario, of_streams in scenarios(list(by_family)).items():
            for name, measured in models.items():
                for phase, step in (("decode", measured.decode_ms), ("prefill", measured.prefill_ms)):
                    step(of_streams)
                    own = [step(of_streams) for _ in range(steps if phase == "decode" else 2)]
                    if number:
                        times.setdefault((phase, scenario, name), []).append(statistics.median(own))
    for (phase, scenario, name), own in times.items():
        yield _row(phase, scenario, name, own, times[phase, "base", name])


def _row(phase: str, scenario: str, name: str, own: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    return {
        "phase": phase,
        "scenario": scenario,
        "kernels": name,
        "step_ms": round(statistics.median(own), 1),
        "ratio": round(statistics.median(b / o for b, o in zip(base, own, strict=True)), 3),
    }


def main() -> None:
    args = arguments(__doc__, rounds=3, steps=4, out="bench-decode.json", has_kernels=True, layers=6)
    torch.set_num_threads(args.threads)
    model = random_model(args.layers)
    rows = sorted(measure(model, args.kernels, args.rounds, args.steps), key=lambda row: str(row["phase"]))
    report(rows, args)


if __name__ == "__main__":
    main()
