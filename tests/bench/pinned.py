"""What a pin saves in a decode step, and what it costs others: ``make bench-pinned``.

One decoder layer of the embedded model's shapes, its linear layers packed as the engine packs them. The layer
without adapters and every scenario take turns, one step each, so that a busy neighbour troubles all alike. Of
each adapter: all rows its own, with and without a pin; half of the rows the base's, with and without one.
``to_base`` is the ratio of medians to the layer without adapters and with as many rows.

``rows apart`` is what is not done: the base's half through the base's weights and the adapter's through its
merged ones, in two passes. Both are read then, where a step of few rows is as long as it takes to read one.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from mixtures import SITES, Layer, SpectralExperts, lora
from table import arguments, report

from timbre_methods.contract import Site
from timbre_methods.program import AdapterProgram, Dense
from timbre_server.adapters.adapted_model import AdaptedModel, Arithmetic
from timbre_server.adapters.groups import LinearGroup
from timbre_server.adapters.kernels import choose_kernels
from timbre_server.adapters.merged_weights import merged_weights
from timbre_server.engine.packed_linear import LinearPacker
from timbre_server.operators.row_table import RowTable, Span

CPU = torch.device("cpu")
OWN = ((0, 1.0),)
GROUPS = [("q", "k", "v"), ("o",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)]
Step = Callable[[], float]


def adapters() -> Mapping[str, AdapterProgram]:
    spectral = SpectralExperts()
    dense = {path: (Dense(torch.randn(*shape) / 576),) for path, shape in SITES.items()}
    return {
        "LoRA r=16": lora(16),
        "LoRA r=64": lora(64),
        "FourierFT n=1000": AdapterProgram({path: (spectral(path),) for path in SITES}),
        "HiRA (dense)": AdapterProgram(dense),
    }


def step(
    layer: Layer, program: AdapterProgram, rows: Sequence[tuple[tuple[int, float], ...]], *, pinned: bool
) -> Step:
    """One forward of a copy of the layer with one adapter in memory; its milliseconds. A copy repeats its
    table, as decoding does."""
    own = copy.deepcopy(layer)
    packer = LinearPacker(torch.float32, CPU, native=choose_kernels("auto", CPU)[0] == "native")
    sites = {path: Site(path, own.get_submodule(path).weight.detach(), None) for path in SITES}
    adapted = AdaptedModel(own, [LinearGroup(group) for group in GROUPS], Arithmetic(packer.product_of))
    adapted.put(0, program)
    if pinned:
        with torch.inference_mode():
            merged = {path: merged_weights(site, [(program, 1.0)]) for path, site in sites.items()}
        adapted.merge(OWN, {path: packer.product_with(*weights) for path, weights in merged.items()})
    table, x_1TD = RowTable([Span(1, pairs) for pairs in rows]), torch.randn(1, len(rows), 576)

    def timed() -> float:
        started = time.perf_counter()
        adapted.set_rows(table, table)
        with torch.inference_mode():
            own(x_1TD)
        adapted.clear_rows()
        return 1000 * (time.perf_counter() - started)

    return timed


def scenarios(layer: Layer, num_rows: int) -> dict[str, Step]:
    half = num_rows // 2
    base, all_own = [()] * num_rows, [OWN] * num_rows
    found: dict[str, Step] = {"base": step(layer, lora(16), base, pinned=False)}
    for name, program in adapters().items():
        found[f"{name}, all rows"] = step(layer, program, all_own, pinned=False)
        found[f"{name}, all rows, pinned"] = step(layer, program, all_own, pinned=True)
        if half:
            found[f"{name}, half the rows"] = step(layer, program, [(), OWN] * half, pinned=False)
            found[f"{name}, half the rows, pinned"] = step(layer, program, [(), OWN] * half, pinned=True)
            apart = [step(layer, program, [pairs] * half, pinned=True) for pairs in ((), OWN)]
            found[f"{name}, half the rows, rows apart"] = lambda apart=apart: sum(each() for each in apart)
    return found


def measure(rows: int, rounds: int, steps: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    measured = scenarios(Layer(), rows)
    times: dict[str, list[float]] = {name: [] for name in measured}
    for number in range((rounds + 1) * steps):
        for name, step in measured.items():
            elapsed = step()
            if number >= steps:
                times[name].append(elapsed)
    medians = {name: statistics.median(own) for name, own in times.items()}
    return [
        {
            "rows": rows,
            "scenario": name,
            "layer_ms": round(median, 3),
            "to_base": round(median / medians["base"], 2),
        }
        for name, median in medians.items()
    ]


def main() -> None:
    args = arguments(__doc__, rounds=7, steps=30, out="bench-pinned.json")
    torch.set_num_threads(args.threads)
    report([row for rows in (1, 16, 128) for row in measure(rows, args.rounds, args.steps)], args)


if __name__ == "__main__":
    main()
