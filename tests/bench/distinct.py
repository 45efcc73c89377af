"""Throughput against the number of distinct adapters in one batch: ``make bench-distinct``.

The linear layers of one decoder layer, as `methods` measures them, with 32 rows that use 1 to 32 different
adapters of one family in turn. Every round times the layer without adapters and in each of these ways once;
a ratio is the throughput to that of the base in the same round, and then their median. Times are the
processor's own: a neighbour that takes the core does not count. Prints a table and writes JSON, from which
`throughput_picture` draws.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from methods import METHODS, Measured, one_layer, write_adapter
from table import arguments, report

from timbre_server.adapters.kernels import choose_kernels

FAMILIES = {"LoRA, r = 8": "lora r=8", "FourierFT, n = 1000": "fourierft n=1000"}
COUNTS = (1, 2, 4, 8, 16, 32)
ROWS = max(COUNTS)
BASE = ("base", 0)


def measure(rounds: int, steps: int, folder: Path) -> list[dict[str, Any]]:
    model = one_layer()
    kernels, _ = choose_kernels("auto", torch.device("cpu"))
    layers = {BASE: Measured(model, None, kernels, rows=ROWS)}
    for family, method in FAMILIES.items():
        saved = write_adapter(model, METHODS[method], folder / method)
        for count in COUNTS:
            layers[family, count] = Measured(model, saved, kernels, rows=ROWS, adapters=count)
    times: dict[tuple[str, int], list[float]] = {key: [] for key in layers}
    for number in range(rounds + 1):
        for key, layer in layers.items():
            median = statistics.median(layer.step_ms(time.process_time) for _ in range(steps))
            if number:
                times[key].append(median)
    return [_row(key, times) for key in layers]


def _row(key: tuple[str, int], times: dict[tuple[str, int], list[float]]) -> dict[str, Any]:
    ratios = [base / own for base, own in zip(times[BASE], times[key], strict=True)]
    return {
        "family": key[0],
        "adapters": key[1],
        "layer_ms": round(statistics.median(times[key]), 3),
        "throughput_to_base": round(statistics.median(ratios), 3),
    }


def main() -> None:
    args = arguments(__doc__, rounds=7, steps=20, out="bench-distinct.json")
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        report(measure(args.rounds, args.steps, Path(folder)), args)


if __name__ == "__main__":
    main()
