"""What the benches share: the options of those of single layers, and how a table is printed and written."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import torch

from timbre_server.operators.catalogue import Kernels


def arguments(
    description: str | None,
    *,
    rounds: int,
    steps: int,
    out: str,
    has_kernels: bool = False,
    layers: int | None = None,
    flags: Mapping[str, str] = MappingProxyType({}),
) -> argparse.Namespace:
    """``rounds``, ``steps``, ``threads`` and ``out``, with these defaults, perhaps ``kernels`` and
    ``layers``, and flags."""
    parser = options(description)
    parser.add_argument("--rounds", type=int, default=rounds, help="measured rounds, after one that warms up")
    parser.add_argument("--steps", type=int, default=steps, help="decode steps of each row in a round")
    parser.add_argument("--threads", type=int, default=1)
    if layers is not None:
        parser.add_argument("--layers", type=int, default=layers, help="decoder layers of the model")
    if has_kernels:
        parser.add_argument(
            "--kernels",
            nargs="+",
            choices=get_args(Kernels),
            default=["torch", "native"],
            help="what runs the adapters; several stand side by side",
        )
    parser.add_argument("--out", type=Path, default=Path(out))
    for name, meaning in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=meaning)
    return parser.parse_args()


def options(description: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def report(rows: Sequence[Mapping[str, Any]], args: argparse.Namespace, **more: Any) -> None:
    """Prints the rows as a table and writes them and ``more`` as JSON, with when and where and how they were
    measured."""
    print_table(rows)
    about = {"when": datetime.now(UTC).isoformat(timespec="seconds"), "command": " ".join(sys.argv)}
    written = about | {"machine": machine(), "threads": args.threads, "rows": list(rows), **more}
    args.out.write_text(json.dumps(_without_nan(written), indent=1) + "\n")
    print(f"written to {args.out}")


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    print("\n| " + " | ".join(rows[0]) + " |")
    print("|" + " --- |" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
    }


def _without_nan(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {str(key): _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
