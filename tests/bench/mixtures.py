"""What mixtures of experts and mixes cost in a decode step: ``make bench-mixtures``.

One decoder layer of the embedded model's shapes, its q, k, v, o and its MLP, 16 rows. Every round times the
layer without adapters and with each scenario once, so that a busy neighbour troubles all alike; medians. The
adapters are random programs of the sizes that their methods compile to: what runs does not depend on values.

``added_ms`` is the time that the adapters add to one layer, ``to_lora`` its ratio to LoRA of rank 16 on the
same sites in the same round, with as many distinct adapters: a top-2 of experts of rank 8 has as many active
ranks. ``step`` is the whole layer's ratio to the layer with that LoRA.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from table import arguments, report
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from timbre_methods.program import AdapterProgram, FromInput, LowRank, Part, Places, Spectral
from timbre_methods.routing import Routed, RoutedBlock, Router, Rule
from timbre_server.adapters.adapted_model import AdaptedModel
from timbre_server.adapters.groups import Block, LinearGroup
from timbre_server.operators.row_table import RowTable, Span

HIDDEN, INNER, KV = 576, 1536, 192
SITES = {
    "q": (HIDDEN, HIDDEN), "k": (KV, HIDDEN), "v": (KV, HIDDEN), "o": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip
"""Out features and in features."""
MLP = tuple(path for path in SITES if path.startswith("mlp."))
ROWS = 16
TOP_2 = Rule(keep="top_k", top_k=2, gate="renormalised")
EXPERTS = 4
COEFFICIENTS = 1000


class Layer(nn.Module):
    """The linear layers and the MLP of one decoder layer."""

    def __init__(self) -> None:
        super().__init__()
        for path in ("q", "k", "v", "o"):
            setattr(self, path, nn.Linear(*SITES[path][::-1], bias=False))
        self.mlp = LlamaMLP(LlamaConfig(hidden_size=HIDDEN, intermediate_size=INNER))

    def forward(self, x: Tensor) -> Tensor:
        q, _, _ = self.q(x), self.k(x), self.v(x)
        y: Tensor = self.mlp(self.o(q))
        return y


def low_rank(path: str, rank: int) -> LowRank:
    out_features, in_features = SITES[path]
    return LowRank(torch.randn(rank, in_features) / 24, torch.randn(out_features, rank) / 24)


class SpectralExperts:
    """Experts whose coefficients sit where those of all others do, at each site."""

    def __init__(self) -> None:
        self._places: dict[str, Places] = {}

    def __call__(self, path: str) -> Spectral:
        if path not in self._places:
            out_features, in_features = SITES[path]
            rows, columns = (
                torch.randint(out_features, (COEFFICIENTS,)),
                torch.randint(in_features, (COEFFICIENTS,)),
            )
            self._places[path] = Places("dft", out_features, in_features, rows, columns)
        return Spectral(torch.randn(COEFFICIENTS), self._places[path])


def lora(rank: int, paths: tuple[str, ...] = tuple(SITES)) -> AdapterProgram:
    return AdapterProgram({path: (low_rank(path, rank),) for path in paths})


def at_sites(expert: Callable[[str], FromInput], paths: tuple[str, ...] = tuple(SITES)) -> AdapterProgram:
    """A router at each site, as MoLA has it."""
    sites: dict[str, tuple[Part, ...]] = {}
    for path in paths:
        router = Router(torch.randn(EXPERTS, SITES[path][1]) / 24, TOP_2)
        sites[path] = (Routed(tuple((expert(path),) for _ in range(EXPERTS)), router),)
    return AdapterProgram(sites)


def after_block(expert: Callable[[str], FromInput]) -> AdapterProgram:
    """A router for the MLP, as MixLoRA has it, and LoRA of rank 16 in attention."""
    router = Router(torch.randn(EXPERTS, HIDDEN) / 24, TOP_2)
    sites: dict[str, tuple[Part, ...]] = {path: (low_rank(path, 16),) for path in SITES if path not in MLP}
    sites["mlp"] = (RoutedBlock(router, "block"),)
    for path in MLP:
        sites[path] = (Routed(tuple((expert(path),) for _ in range(EXPERTS)), router, from_block=True),)
    return AdapterProgram(sites)


@dataclass(frozen=True)
class Scenario:
    """Programs by slot, and the pairs of each row."""

    programs: tuple[AdapterProgram, ...]
    rows: tuple[tuple[tuple[int, float], ...], ...]


def one(program: AdapterProgram) -> Scenario:
    return Scenario((program,), (((0, 1.0),),) * ROWS)


def each_its_own(make: Callable[[], AdapterProgram]) -> Scenario:
    return Scenario(tuple(make() for _ in range(ROWS)), tuple(((slot, 1.0),) for slot in range(ROWS)))


def scenarios() -> Mapping[str, Scenario]:
    spectral = SpectralExperts()
    four = tuple(lora(8) for _ in range(4))
    mixed = tuple((slot, 0.25) for slot in range(4))
    rank_8 = lambda path: low_rank(path, 8)
    return {
        "base": Scenario((), ((),) * ROWS),
        "LoRA r=16, 1 adapter": one(lora(16)),
        "LoRA r=16, 16 adapters": each_its_own(lambda: lora(16)),
        "MixLoRA top-2 of 4, r=8, 1 adapter": one(after_block(rank_8)),
        "MixLoRA top-2 of 4, r=8, 16 adapters": each_its_own(lambda: after_block(rank_8)),
        "MoLA top-2 of 4, r=8, 1 adapter": one(at_sites(rank_8)),
        "MoLA top-2 of 4, r=8, 16 adapters": each_its_own(lambda: at_sites(rank_8)),
        "Fourier experts, top-2 of 4, n=1000, 1 adapter": one(at_sites(spectral)),
        "Fourier experts, top-2 of 4, n=1000, 16 adapters": each_its_own(lambda: at_sites(spectral)),
        "LoRA r=8, 1 adapter": one(lora(8)),
        "mix of 4 LoRAs, r=8": Scenario(four, (mixed,) * ROWS),
    }


class Measured:
    """The layer with one scenario's adapters."""

    def __init__(self, layer: Layer, scenario: Scenario, x_1TD: Tensor) -> None:
        self._layer = copy.deepcopy(layer)
        groups = [("q", "k", "v"), ("o",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)]
        block = Block("mlp", HIDDEN, "mlp.down_proj")
        self._adapted = AdaptedModel(self._layer, [LinearGroup(group) for group in groups], blocks=[block])
        for slot, program in enumerate(scenario.programs):
            self._adapted.put(slot, program)
        self.prepared_bytes = scenario.programs[0].prepared_bytes if scenario.programs else 0
        self._table = RowTable([Span(1, pairs) for pairs in scenario.rows])
        self._x_1TD = x_1TD

    def step_ms(self) -> float:
        self._adapted.set_rows(self._table, self._table)
        started = time.perf_counter()
        with torch.inference_mode():
            self._layer(self._x_1TD)
        self._adapted.expert_tokens()
        elapsed = time.perf_counter() - started
        self._adapted.clear_rows()
        return 1000 * elapsed


def measure(rounds: int, steps: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    layer, x_1TD = Layer(), torch.randn(1, ROWS, HIDDEN)
    measured = {name: Measured(layer, scenario, x_1TD) for name, scenario in scenarios().items()}
    times: dict[str, list[float]] = {name: [] for name in measured}
    for number in range(rounds + 1):
        for name, own in measured.items():
            median = statistics.median(own.step_ms() for _ in range(steps))
            if number:
                times[name].append(median)
    return [_row(name, measured[name].prepared_bytes, times) for name in measured]


def _row(name: str, prepared_bytes: int, times: Mapping[str, list[float]]) -> dict[str, Any]:
    lora = f"LoRA r={8 if 'mix' in name else 16}, {16 if '16 adapters' in name else 1} adapter"
    plain = next(times[key] for key in times if key.startswith(lora))
    added = [ms - base for ms, base in zip(times[name], times["base"], strict=True)]
    ratios = [
        own / (ms - base) for own, ms, base in zip(added, plain, times["base"], strict=True) if ms > base
    ]
    return {
        "scenario": name,
        "prepared_bytes": prepared_bytes,
        "layer_ms": round(statistics.median(times[name]), 3),
        "added_ms": round(statistics.median(added), 3),
        "to_lora": round(statistics.median(ratios), 2),
        "step": round(statistics.median(own / ms for own, ms in zip(times[name], plain, strict=True)), 2),
    }


def main() -> None:
    args = arguments(__doc__, rounds=7, steps=30, out="bench-mixtures.json")
    torch.set_num_threads(args.threads)
    report(measure(args.rounds, args.steps), args)


if __name__ == "__main__":
    main()
