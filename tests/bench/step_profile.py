"""Where the time of one decode step goes: ``make bench-profile``.

The engine core runs in this process, on the embedded model and as many different adapters of one family, or
of all in turn, as rows: some rounds of steps as a server runs them, each followed by as many whose kernels
are timed one by one. What the first take beyond the kernels, sampling and scheduling is Python's and
PyTorch's own; it may come out below zero, since kernels that are timed take somewhat longer. Then a server
answers as many streams: what its clients see of a step beyond all that is the share of HTTP, of its process
and of the clients, which have no processor of their own. Medians of the rounds. Prints a table and writes
JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from engine_in_process import Decoding, distinct
from kernel_clock import calls_timed, kernels_timed, replaced
from load import Job, figures, run
from measured_server import CACHE, MeasuredServer
from random_adapters import FAMILIES, write_adapters
from scenarios import BASE, EVERY
from table import options, report
from transformers import AutoModelForCausalLM

from timbre_server.adapters.active_rows import ActiveRows
from timbre_server.engine import runner
from timbre_server.engine.embedded_model import embedded_model_folder
from timbre_server.engine.model_loader import chosen_device, chosen_dtype
from timbre_server.operators.row_table import RowTable

HTTP = "HTTP: its process, sockets and clients"
PYTHON, SAMPLING, SCHEDULING = "Python and PyTorch between kernels", "sampling", "scheduling"
KV_BYTES = 512 << 20
Name = TypeVar("Name")


def engine_parts(args: argparse.Namespace, model_folder: Path) -> dict[str, float]:
    """Seconds of a step by part."""
    device = chosen_device(args.device)
    model = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=chosen_dtype("auto", device), attn_implementation="eager"
    )
    model.to(device).eval().requires_grad_(False)
    decoding = Decoding.of(model, FAMILIES, args.rows, KV_BYTES)
    digests = turns({name: distinct(name, args.rows) for name in families(args.family)}, None, args.rows)
    decoding.load([digest for digest in digests if digest])
    steps = partial(decoding.step_seconds, digests, args.prompt_tokens, args.steps)
    steps()
    rounds = []
    with new_tables() if args.changing_rows else nullcontext():
        for _ in range(args.rounds):
            calls, kernels = Counter[str](), Counter[str]()
            steps_s = steps(while_measured=calls_timed(calls, {"sample": runner, "execute": runner.Runner}))
            steps(while_measured=kernels_timed(kernels, device))
            rounds.append(parts_of(sum(steps_s), calls, kernels))
    names = {name for found in rounds for name in found}
    return {name: statistics.median(found.get(name, 0) for found in rounds) / args.steps for name in names}


def parts_of(whole_s: float, calls: Mapping[str, float], kernels: Mapping[str, float]) -> dict[str, float]:
    """Of steps that took so long."""
    return {
        **kernels,
        SAMPLING: calls["sample"],
        SCHEDULING: whole_s - calls["execute"],
        PYTHON: calls["execute"] - calls["sample"] - sum(kernels.values()),
    }


@contextmanager
def new_tables() -> Iterator[None]:
    """Every step inside has another table of rows than the last one, as when requests come and end."""
    begin = ActiveRows.begin

    def anew(rows: ActiveRows, table: RowTable) -> bool:
        rows._last = None
        return begin(rows, table)

    with replaced(ActiveRows, "begin", anew):
        yield


def seen_by_clients(args: argparse.Namespace, model_folder: Path) -> float:
    """Seconds of a step as the clients of a server see it: the rounds' median, after one that warms up."""
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
            found = [_decoded(server, names, args) for _ in range(1 + args.rounds)]
        finally:
            server.stop()
    print([round(1e3 * args.rows / f, 1) for f in found])
    return args.rows / statistics.median(found[1:])


def _decoded(server: MeasuredServer, names: Sequence[str], args: argparse.Namespace) -> float:
    """Tokens/s while all streams decode. Raises SystemExit where a request fails."""
    prompts = torch.randint(server.vocab_size, (len(names), args.prompt_tokens)).tolist()
    jobs = [Job(name, tuple(own), args.steps) for name, own in zip(names, prompts, strict=True)]
    streams = [[job] for job in jobs]
    found = figures("decode", asyncio.run(run(server.url, streams)))
    if found.errors:
        raise SystemExit(f"{found.errors} requests failed: {found.first_error}")
    return found.tokens_per_s


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
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40, help="of a round")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="before the steps")
    parser.add_argument(
        "--changing-rows", action="store_true", help="in this process every step has a new table of rows"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", type=Path, help="a model's folder; default: the embedded one")
    parser.add_argument("--out", type=Path, default=Path("bench-profile.json"))
    return parser.parse_args(argv)


def profile(args: argparse.Namespace) -> list[dict[str, Any]]:
    torch.set_num_threads(args.threads)
    model_folder = args.model or embedded_model_folder(CACHE, print)
    parts = engine_parts(args, model_folder)
    return rows_of(parts | {HTTP: seen_by_clients(args, model_folder) - sum(parts.values())})


def main() -> None:
    args = arguments()
    report(profile(args), args)


if __name__ == "__main__":
    main()
