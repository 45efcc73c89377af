"""What Triton's kernels take for a layer beside PyTorch's operators, their twins: ``make bench-kernels``.

Random parts of usual sizes at one layer; crowds of decode rows, one adapter or each its own, and one prefill.
Every round times each twin and its kernels once, one after the other, on what was bound before; medians.
``bind_ms`` is what the first step of a crowd costs beside: tables for kernels, copies for twins. ``error`` is
the largest difference in proportion to the largest change.

Without a GPU there is nothing to measure; ``--interpret`` runs tiny sizes under Triton's interpreter, to see
that all of it runs.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from table import arguments, report
from torch import Tensor

from timbre_methods.program import (
    Basis,
    Block,
    Diagonal,
    LowRank,
    Part,
    Places,
    Projected,
    Rotation,
    Sparse,
    Spectral,
)
from timbre_methods.routing import Routed, Router, Rule
from timbre_server.operators.catalogue import Kernels, all_operators
from timbre_server.operators.contract import Bound, Change, Operator
from timbre_server.operators.row_table import RowTable, Span

TOP_2 = Rule(keep="top_k", top_k=2, gate="renormalised")


@dataclass(frozen=True)
class Size:
    features: int
    rank: int
    coefficients: int
    decode_rows: int
    prefill_rows: int
    device: str

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device) / shape[-1] ** 0.5


ON_GPU = Size(features=4096, rank=16, coefficients=1000, decode_rows=64, prefill_rows=2048, device="cuda")
INTERPRETED = Size(features=64, rank=4, coefficients=20, decode_rows=3, prefill_rows=16, device="cpu")


def makers(size: Size) -> Mapping[type[Part], Callable[[], Part]]:
    """Of square layers. What adapters share is made once."""
    n, rank = size.features, size.rank
    places = Places("dft", n, n, *(torch.randint(n, (size.coefficients,)) for _ in "vu"))
    basis = Basis(size.normal(1, 16 * rank, n), size.normal(1, n, 16 * rank))

    def sparse() -> Sparse:
        """One per cent of the entries."""
        flat = torch.randperm(n * n, device=size.device)[: n * n // 100].sort().values
        row_ends = torch.searchsorted(flat, torch.arange(n + 1, device=size.device) * n)
        return Sparse(row_ends, (flat % n).int(), size.normal(len(flat)), n)

    low_rank = lambda: LowRank(size.normal(rank, n), size.normal(n, rank))
    return {
        LowRank: low_rank,
        Routed: lambda: Routed(tuple((low_rank(),) for _ in range(8)), Router(size.normal(8, n), TOP_2)),
        Sparse: sparse,
        Diagonal: lambda: Diagonal("output", size.normal(n), size.normal(n)),
        Spectral: lambda: Spectral(size.normal(size.coefficients), places),
        Projected: lambda: Projected(
            "diagonal", size.normal(1, 16 * rank), basis, outer_NO=size.normal(1, n)
        ),
        Block: lambda: Block("input", torch.randperm(n, device=size.device)[:rank], size.normal(n, rank), n),
        Rotation: lambda: Rotation("input", size.normal(1, n // 32, 32, 32), (32,)),
    }


def crowds(size: Size) -> Mapping[str, Sequence[Span]]:
    rows = size.decode_rows
    return {
        f"{rows} rows, 1 adapter": [Span(1, ((0, 1.0),))] * rows,
        f"{rows} rows, {rows} adapters": [Span(1, ((slot, 1.0),)) for slot in range(rows)],
        f"prefill of {size.prefill_rows}": [Span(size.prefill_rows, ((0, 1.0),))],
    }


class Measured:
    """One operator at one crowd."""

    def __init__(
        self, operator: Operator[Any], parts: Mapping[int, Sequence[Part]], table: RowTable, x_TI: Tensor
    ):
        self._x_TI = x_TI
        self.bind_ms = self._timed(lambda: operator.bind([parts], table), 1)
        self._bound = operator.bind([parts], table)
        self.times: list[float] = []

    def change(self) -> Tensor:
        total_TO = torch.zeros_like(self._x_TI)
        for change in changes(self._bound, self._x_TI):
            rows = slice(None) if change.rows_N is None else change.rows_N
            if isinstance(rows, Tensor):
                total_TO.index_add_(0, rows, change.values_NO)
            else:
                total_TO[rows] += change.values_NO
        return total_TO

    def run(self, steps: int) -> None:
        self.times.append(self._timed(lambda: changes(self._bound, self._x_TI), steps))

    def _timed(self, step: Callable[[], object], steps: int) -> float:
        """Milliseconds of one."""
        wait = torch.cuda.synchronize if self._x_TI.is_cuda else lambda: None
        wait()
        started = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        return 1000 * (time.perf_counter() - started) / steps


def changes(bound: Bound, x_TI: Tensor) -> list[Change]:
    """Of all hooks but own products, whose time is the base's."""
    of_hooks = [bound.input_change(0, x_TI), bound.output_change(0, x_TI)]
    return [*(change for own in bound.sums(x_TI) for change in own), *(c for c in of_hooks if c is not None)]


def operators(kernels: Kernels) -> dict[type[Part], Operator[Any]]:
    return {operator.part: operator for operator in all_operators(kernels=kernels)}


def measure(size: Size, rounds: int, steps: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    twins, kernels = operators("torch"), operators("triton")
    rows = []
    for kind, make in makers(size).items():
        if type(kernels[kind]) is type(twins[kind]) and kind is not Routed:
            continue
        for name, spans in crowds(size).items():
            table = RowTable(spans, size.device)
            parts = {slot: [make()] for slot in table.slots}
            x_TI = torch.randn(table.num_rows, size.features, device=size.device)
            pair = [Measured(own[kind], parts, table, x_TI) for own in (twins, kernels)]
            twin, kernel = pair[0].change(), pair[1].change()
            for _ in range(rounds):
                for own in pair:
                    own.run(steps)
            error = ((twin - kernel).abs().max() / twin.abs().max()).item()
            rows.append({"operator": kind.__name__, "crowd": name} | _row(*pair) | {"error": f"{error:.0e}"})
    return rows


def _row(twin: Measured, kernel: Measured) -> dict[str, Any]:
    ratios = [a / b for a, b in zip(twin.times, kernel.times, strict=True)]
    return {
        "torch_ms": round(statistics.median(twin.times), 4),
        "triton_ms": round(statistics.median(kernel.times), 4),
        "ratio": round(statistics.median(ratios), 2),
        "torch_bind_ms": round(twin.bind_ms, 2),
        "triton_bind_ms": round(kernel.bind_ms, 2),
    }


def main() -> None:
    interpret = {"interpret": "tiny sizes under Triton's interpreter, for a machine without a GPU"}
    args = arguments(__doc__, rounds=7, steps=30, out="bench-kernels.json", flags=interpret)
    torch.set_num_threads(args.threads)
    if args.interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, with the kernels
        report(measure(INTERPRETED, 1, 1), args)
    elif torch.cuda.is_available():
        with torch.inference_mode():
            report(measure(ON_GPU, args.rounds, args.steps), args)
    else:
        print(
            "PyTorch finds no GPU on this machine, so kernels cannot be measured. --interpret runs tiny "
            "sizes under Triton's interpreter, to see that all of it runs."
        )


if __name__ == "__main__":
    main()
