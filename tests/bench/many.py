"""Many registered adapters: ``make bench-many``.

One server for each number of registered adapters, all up at once. In every round each of them answers the
same zipf stream, one request at a time, so that a busy neighbour troubles all alike; ratios are taken inside
a round, to the smallest number. Beside that: a server's start, its memory for each registered name, cold
adapters against warm ones, and what ten thousand FourierFT adapters in memory weigh. Prints tables, writes
JSON. `many_store` says what is registered.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import Any

from bank import weigh
from load import Figures, Job, figures, run
from many_store import name_of, seed_store
from measured_server import CACHE, MeasuredServer
from random_adapters import write_adapters
from scenarios import FIRST_TOKEN_ID

from timbre_server.engine.embedded_model import embedded_model_folder

FAMILIES = ("fourierft", "lora")
PROMPT_TOKENS, NEW_TOKENS = 32, 2
WARM_UP = 10
"""Requests, and names that they are for at most, before memory is read."""


@dataclass(frozen=True)
class Crowd:
    """A server with so many adapters registered, and what its start took."""

    registered: int
    server: MeasuredServer
    start_s: float
    rss_bytes: dict[str, int]


def zipf_names(registered: int, asked: int, requests: int, seed: int) -> tuple[str, ...]:
    """Names drawn with a chance of 1 / rank among the first ``asked``."""
    count = min(registered, asked)
    weights = list(accumulate(1 / rank for rank in range(1, count + 1)))
    drawn = random.Random(seed).choices(range(count), cum_weights=weights, k=requests)
    return tuple(map(name_of, drawn))


def started(
    stack: ExitStack, folder: Path, args: argparse.Namespace, registered: int, model_folder: Path
) -> Crowd:
    """The server is the stack's to stop."""
    seed_store(folder / "store", model_folder, registered, args.contents)
    began = time.perf_counter()
    server = MeasuredServer.start(folder, "cpu", args.threads, [], model_folder)
    start_s = time.perf_counter() - began
    stack.callback(server.stop)
    stream(server, zipf_names(registered, WARM_UP, WARM_UP, 0), 0)
    return Crowd(registered, server, start_s, server.facts()["rss_bytes"])


def stream(server: MeasuredServer, models: Sequence[str], seed: int) -> Figures:
    """One request after another, each for the next model. Raises: RuntimeError where one failed."""
    chance, tokens = random.Random(seed), range(FIRST_TOKEN_ID, server.vocab_size)
    jobs = [Job(model, tuple(chance.choices(tokens, k=PROMPT_TOKENS)), NEW_TOKENS) for model in models]
    found = figures("mixed", asyncio.run(run(server.url, [jobs])))
    if found.first_error is not None:
        raise RuntimeError(f"{found.errors} of {len(jobs)} requests failed; the first: {found.first_error}")
    return found


def streamed(crowds: list[Crowd], args: argparse.Namespace) -> list[dict[str, Any]]:
    rounds: dict[int, list[Figures]] = {crowd.registered: [] for crowd in crowds}
    for number in range(args.rounds):
        for crowd in crowds:
            names = zipf_names(crowd.registered, args.asked, args.requests, number + 1)
            found = stream(crowd.server, names, 1000 + number)
            rounds[crowd.registered].append(found)
            print(f"round {number}: {crowd.registered}: TTFT {found.ttft_ms[0]:.1f} ms", flush=True)
    fewest, least = crowds[0], rounds[crowds[0].registered]
    rows = []
    for crowd in crowds:
        own = rounds[crowd.registered]
        ratios = [one.ttft_ms[0] / other.ttft_ms[0] for one, other in zip(own, least, strict=True)]
        more = max(1, crowd.registered - fewest.registered)
        grown = {key: size - fewest.rss_bytes.get(key, size) for key, size in crowd.rss_bytes.items()}
        rows.append(
            {
                "registered": crowd.registered,
                "ttft_p50_ms": round(statistics.median(f.ttft_ms[0] for f in own), 1),
                "ttft_p99_ms": round(statistics.median(f.ttft_ms[-1] for f in own), 1),
                "ttft_p50_ratio": round(statistics.median(ratios), 3),
                "start_s": round(crowd.start_s, 1),
                "server_bytes_each": round(grown["server"] / more, 1),
                "engine_bytes_each": round(grown.get("engine 0", 0) / more, 1),
            }
        )
    return rows


def cold_and_warm(server: MeasuredServer, count: int, folder: Path) -> list[dict[str, Any]]:
    """First requests of adapters that were never used, each beside a second one of the same adapter."""
    names = write_adapters(server.model_folder, folder, FAMILIES, count + 1)
    server.upload(folder)
    for own in names.values():
        stream(server, (own[0],), 0)  # Its load brings what all of the family share.
    times: dict[str, list[tuple[float, float]]] = {family: [] for family in names}
    for number in range(1, count + 1):
        for family, own in names.items():
            cold, warm = (stream(server, (own[number],), seed).ttft_ms[0] for seed in (number, -number))
            times[family].append((cold, warm))
    return [
        {
            "family": family,
            "cold_ttft_p50_ms": round(statistics.median(cold for cold, _ in pairs), 1),
            "warm_ttft_p50_ms": round(statistics.median(warm for _, warm in pairs), 1),
            "cold_to_warm": round(statistics.median(cold / warm for cold, warm in pairs), 3),
        }
        for family, pairs in times.items()
    ]


def measure(args: argparse.Namespace, folder: Path, model_folder: Path) -> dict[str, list[dict[str, Any]]]:
    with ExitStack() as stack:
        crowds = []
        for registered in sorted(args.registered):
            crowds.append(started(stack, folder / str(registered), args, registered, model_folder))
        many = streamed(crowds, args)
        cold = cold_and_warm(crowds[0].server, args.cold, folder / "cold")
    return {"registered": many, "cold": cold, "bank": [dict(weigh(model_folder, args.bank))]}


def print_table(rows: list[dict[str, Any]]) -> None:
    print("\n| " + " | ".join(rows[0]) + " |")
    print("|" + " --- |" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small numbers: minutes, not an hour")
    parser.add_argument("--registered", type=int, nargs="+", help="default: 10 1000 100000")
    parser.add_argument("--contents", type=int, help="distinct contents among them; default: 10000")
    parser.add_argument("--asked", type=int, default=10000, help="names that the stream draws from")
    parser.add_argument("--requests", type=int, help="in a round; default: 300")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cold", type=int, help="adapters of each family; default: 20")
    parser.add_argument("--bank", type=int, help="FourierFT adapters in memory at once; default: 10000")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("bench-many.json"))
    args = parser.parse_args(given)
    usual = {
        "registered": [10, 1000, 100_000],
        "contents": 10_000,
        "requests": 300,
        "cold": 20,
        "bank": 10_000,
    }
    small = {"registered": [10, 100, 1000], "contents": 200, "requests": 30, "cold": 5, "bank": 200}
    for name, value in (small if args.quick else usual).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(args, Path(folder), embedded_model_folder(CACHE, print))
    for rows in measured.values():
        print_table(rows)
    about = {"when": datetime.now(UTC).isoformat(timespec="seconds"), "threads": args.threads}
    about |= {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    about |= {"contents": args.contents, "requests": args.requests, "rounds": args.rounds}
    args.out.write_text(json.dumps({**about, **measured}, indent=1) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
