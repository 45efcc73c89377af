"""What the benches of single layers share: their options, and how a table is printed and written."""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

from timbre_server.operators.catalogue import Kernels


def arguments(
    description: str | None,
    *,
    rounds: int,
    steps: int,
    out: str,
    has_kernels: bool = False,
    flags: Mapping[str, str] = MappingProxyType({}),
) -> argparse.Namespace:
    """``rounds``, ``steps``, ``threads`` and ``out``, with these defaults, perhaps ``kernels``, and flags."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=rounds, help="measured rounds, after one that warms up")
    parser.add_argument("--steps", type=int, default=steps, help="decode steps of each row in a round")
    parser.add_argument("--threads", type=int, default=1)
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


def report(rows: Sequence[Mapping[str, Any]], args: argparse.Namespace) -> None:
    """Prints the rows as a table and writes them as JSON, with when and where they were measured."""
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + " --- |" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")
    about = {"when": datetime.now(UTC).isoformat(timespec="seconds"), "threads": args.threads}
    written = about | {"processor": platform.processor() or platform.machine(), "rows": list(rows)}
    args.out.write_text(json.dumps(written, indent=1) + "\n")
    print(f"written to {args.out}")
