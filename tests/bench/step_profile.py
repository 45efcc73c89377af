"""Where the time of one decode step goes: ``make bench-profile``.

The engine core runs in this process, with timers around its parts, on the embedded model and as many
different adapters of one family, or of all in turn, as rows; the mean of many steps. Then a server of its own
answers as many streams: what its clients see of a step beyond the engine's own time for one is the share of
HTTP, of the two processes and of the sockets between. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from engine_in_process import Decoding, distinct
from load import Job, figures, run
from measured_server import CACHE, MeasuredServer
from random_adapters import FAMILIES, write_adapters
from scenarios import BASE, EVERY
from stopwatch import SCHEDULING, Stopwatch, replaced
from table import options, report
from transformers import AutoModelForCausalLM

from timbre_server.adapters.active_rows import ActiveRows
from timbre_server.engine.embedded_model import embedded_model_folder
from timbre_server.engine.model_loader import chosen_device, chosen_dtype
from timbre_server.operators.row_table import RowTable

HTTP = "HTTP and sockets"
KV_BYTES = 512 << 20
LONGER = 8
"""Times the steps that are taken apart: those in which streams begin and end, which take longer, are few."""
Name = TypeVar("Name")


def engine_parts(args: argparse.Namespace, model_folder: Path) -> dict[str, float]:
    """Seconds of a step by part."""
    device = chosen_device(args.device)
    model = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=chosen_dtype("auto", device), attn_implementation="eager"
    )
    model.to(device).eval().requires_grad_(False)
    watch = Stopwatch(torch.cuda.synchronize if device.type == "cuda" else lambda: None)
    with watch.on_engines():
        decoding = Decoding.of(model, FAMILIES, args.rows, KV_BYTES)
        digests = turns({name: distinct(name, args.rows) for name in families(args.family)}, None, args.rows)
        decoding.load([digest for digest in digests if digest])
        decoding.step_seconds(digests, args.prompt_tokens, args.steps, measured(watch, args.changing_rows))
    return {part: seconds / args.steps for part, seconds in watch.counted.items()}


@contextmanager
def measured(watch: Stopwatch, changing_rows: bool) -> Iterator[None]:
    with watch.counting(), new_tables() if changing_rows else nullcontext():
        yield


@contextmanager
def new_tables() -> Iterator[None]:
    """Every step inside has another table of rows than the last one, as when requests come and end."""
    begin = ActiveRows.begin

    def anew(rows: ActiveRows, table: RowTable) -> bool:
        rows._last = None
        return begin(rows, table)

    with replaced(ActiveRows, "begin", anew):
        yield


def seen_and_spent(args: argparse.Namespace, model_folder: Path) -> tuple[float, float]:
    """Seconds of a step as the clients of a server see it, and as its engine spends them: means."""
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--max-num-seqs", str(args.rows)]
        server = MeasuredServer.start(Path(folder), args.device, args.threads, flags, model_folder)
        try:
            names = [server.base] * args.rows
            if args.family != BASE:
                own = write_adapters(
                    model_folder, Path(folder) / "adapters", families(args.family), args.rows
                )
                server.upload(Path(folder) / "adapters")
                names = turns(own, server.base, args.rows)
            # A prompt of one token: every step, the first too, has a row for each stream.
            for new_tokens in (3, LONGER * args.steps):
                streams = [[Job(name, (200 + i,), new_tokens)] for i, name in enumerate(names)]
                before_s, before = server.engine_steps()
                found = figures("decode", asyncio.run(run(server.url, streams)))
                after_s, after = server.engine_steps()
        finally:
            server.stop()
    if found.errors:
        raise SystemExit(f"{found.errors} requests failed: {found.first_error}")
    return args.rows / found.tokens_per_s, (after_s - before_s) / (after - before)


def families(asked: str) -> tuple[str, ...]:
    """None for base rows."""
    return () if asked == BASE else tuple(FAMILIES) if asked == EVERY else (asked,)


def turns(names: Mapping[str, Sequence[Name]], base: Name, rows: int) -> list[Name]:
    """A name for each row: of the families in turn, another of each one's every time; the base's without."""
    of_families = list(names.values())
    return [
        of_families[row % len(of_families)][row // len(of_families)] if names else base for row in range(rows)
    ]


def rows_of(parts: Mapping[str, float]) -> list[dict[str, Any]]:
    """The largest first, then the whole."""
    whole_s = sum(parts.values())
    ordered = sorted(parts.items(), key=lambda part: -part[1])
    return [
        {"part": name, "ms": round(1e3 * seconds, 2), "share": f"{seconds / whole_s:.1%}"}
        for name, seconds in [*ordered, ("a step, as a client sees it", whole_s)]
    ]


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--family", choices=(BASE, *FAMILIES, EVERY), default="lora")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--prompt-tokens", type=int, default=64, help="before the steps in this process")
    parser.add_argument(
        "--changing-rows", action="store_true", help="in this process every step has a new table of rows"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", type=Path, help="a model's folder; default: the embedded one")
    parser.add_argument("--out", type=Path, default=Path("bench-profile.json"))
    return parser.parse_args(argv)


def profile(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, float]]:
    torch.set_num_threads(args.threads)
    model_folder = args.model or embedded_model_folder(CACHE, print)
    parts = engine_parts(args, model_folder)
    seen_s, spent_s = seen_and_spent(args, model_folder)
    # The engine's own figure is of a step's execution alone.
    parts[HTTP] = seen_s - spent_s - parts[SCHEDULING]
    return rows_of(parts), {"client_step_s": seen_s, "engine_step_s": spent_s}


def main() -> None:
    args = arguments()
    rows, more = profile(args)
    report(rows, args, **more)


if __name__ == "__main__":
    main()
