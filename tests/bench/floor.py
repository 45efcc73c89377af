"""The least time that a load can take on this machine, from what the machine did just before.

A step reads all weights once and multiplies each row by them; whatever the program, it takes no less than::

    max(weights' bytes / memory bandwidth, operations / rate)

Bandwidth is that of large copies and sums; the rate is that of the model's own matrix products, packed as
the server packs them, each layer with a weight of its own so that none stays in a cache. Attention, norms,
sampling and everything beside the base's products count as nothing: no server can reach the floor.

Legend: T rows of a step, I in, O out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from scenarios import STEP_TOKENS, Scenario
from torch import nn

from timbre_server.adapters.kernels import choose_kernels
from timbre_server.engine.packed_linear import LinearPacker

COPY_BYTES = 256 << 20
BUDGET_S = 1.0
"""For each thing that is timed, twice at least."""

Shapes = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Weights:
    """The base's matrices: those that each row meets, and the head that only kept rows meet."""

    body: Shapes
    head: tuple[int, int]
    itemsize: int

    @property
    def num_bytes(self) -> int:
        return self.itemsize * sum(o * i for o, i in (*self.body, self.head))

    def operations(self, rows: int, kept_rows: int) -> int:
        """A product and a sum count as two."""
        return 2 * (rows * sum(o * i for o, i in self.body) + kept_rows * self.head[0] * self.head[1])


@dataclass(frozen=True)
class Machine:
    bytes_per_s: float
    operations_per_s: Mapping[int, float]
    """By rows of a step."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def step_floor_s(weights: Weights, machine: Machine, rows: int, kept_rows: int) -> float:
    """Of one step with a number of rows whose rate was measured."""
    reading_s = weights.num_bytes / machine.bytes_per_s
    return max(reading_s, weights.operations(rows, kept_rows) / machine.operations_per_s[rows])


def floor_tokens_per_s(scenario: Scenario, weights: Weights, machine: Machine, new_tokens: int) -> float:
    """The most that `load.figures` could show as ``tokens_per_s``."""
    if scenario.kind == "decode":
        return scenario.streams / step_floor_s(weights, machine, scenario.streams, scenario.streams)
    if scenario.kind == "prefill":
        rows = step_rows(scenario)
        return rows / step_floor_s(weights, machine, rows, 1)
    prompts = scenario.prompt_tokens
    read = sum(prompts[i % len(prompts)] for i in range(scenario.requests))
    written = scenario.requests * new_tokens
    steps = written / scenario.streams
    operations = weights.operations(read + written - scenario.requests, written)
    fastest = max(machine.operations_per_s.values())
    return written / max(steps * weights.num_bytes / machine.bytes_per_s, operations / fastest)


def step_rows(scenario: Scenario) -> int:
    """How many rows the largest step of a load has."""
    if scenario.kind == "decode":
        return scenario.streams
    return min(STEP_TOKENS, scenario.streams * max(scenario.prompt_tokens))


def measure(weights: Weights, rows: Sequence[int], dtype: torch.dtype, device: torch.device) -> Machine:
    """With as many threads as torch has now."""
    return Machine(bytes_per_s(device), _rates(weights, sorted(set(rows)), dtype, device))


def bytes_per_s(device: torch.device) -> float:
    """Memory bandwidth, the better of a large copy, which reads and writes, and a large sum."""
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    copying = 2 * COPY_BYTES / least_s(lambda: target.copy_(source), device)
    return max(copying, COPY_BYTES / least_s(source.sum, device))


def _rates(
    weights: Weights, rows: Sequence[int], dtype: torch.dtype, device: torch.device
) -> dict[int, float]:
    packer = LinearPacker(dtype, device, native=choose_kernels("auto", device)[0] == "native")
    products = [
        packer.product_of(nn.Linear(i, o, bias=False, device=device, dtype=dtype).requires_grad_(False))
        for o, i in (*weights.body, weights.head)
    ]
    widths = [i for _, i in (*weights.body, weights.head)]
    rates = {}
    with torch.inference_mode():
        for count in rows:
            inputs = {i: torch.randn(count, i, device=device, dtype=dtype) for i in set(widths)}

            def step(inputs: dict[int, torch.Tensor] = inputs) -> None:
                for product, width in zip(products, widths, strict=True):
                    product(inputs[width])

            rates[count] = weights.operations(count, count) / least_s(step, device)
    return rates


def least_s(run: Callable[[], object], device: torch.device) -> float:
    """The least of as many times as fit in `BUDGET_S`, two at least, after one that warms up."""

    def seconds() -> float:
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    seconds()
    times = [seconds(), seconds()]
    while sum(times) < BUDGET_S:
        times.append(seconds())
    return min(times)
