"""Many registered adapters: ``make bench-many``.

One server for each number of registered adapters, all up at once. In every round each of them answers the
same zipf stream, one request at a time, so that a busy neighbour troubles all alike; ratios are taken inside
a round, to the smallest number. Beside that: a server's start, its memory for each registered name, how long
``/metrics`` and ``/v1/models`` are, cold adapters against warm ones on the server with the most names, and
what ten thousand FourierFT adapters in memory weigh. Prints tables, writes JSON. `many_store` says what is
registered; with ``--store`` it is kept, and not registered again the next time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
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
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import httpx2
from bank import weigh
from load import Job, run
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
    if not (folder / "store").exists():
        seed_store(folder / "unfinished", model_folder, registered, args.contents)
        (folder / "unfinished").rename(folder / "store")
    began = time.perf_counter()
    server = MeasuredServer.start(folder, "cpu", args.threads, [], model_folder)
    start_s = time.perf_counter() - began
    stack.callback(server.stop)
    stream(server, zipf_names(registered, WARM_UP, WARM_UP, 0), 0)
    return Crowd(registered, server, start_s, server.facts()["rss_bytes"])


def stream(server: MeasuredServer, models: Sequence[str], seed: int) -> list[float]:
    """Milliseconds to the first token of one request after another, each for the next model.

    Raises: RuntimeError where one failed.
    """
    chance, tokens = random.Random(seed), range(FIRST_TOKEN_ID, server.vocab_size)
    jobs = [Job(model, tuple(chance.choices(tokens, k=PROMPT_TOKENS)), NEW_TOKENS) for model in models]
    timings = asyncio.run(run(server.url, [jobs]))
    errors = [timing.error for timing in timings if timing.error is not None]
    if errors:
        raise RuntimeError(f"{len(errors)} of {len(jobs)} requests failed; the first: {errors[0]}")
    return [1e3 * (timing.arrivals[0][0] - timing.started_s) for timing in timings]


def streamed(crowds: list[Crowd], args: argparse.Namespace) -> list[dict[str, Any]]:
    """All requests of a round, and beside them those for adapters that were asked for before."""
    every: dict[int, list[list[float]]] = {crowd.registered: [] for crowd in crowds}
    again: dict[int, list[list[float]]] = {crowd.registered: [] for crowd in crowds}
    asked = {crowd.registered: set(zipf_names(crowd.registered, WARM_UP, WARM_UP, 0)) for crowd in crowds}
    for number in range(args.rounds):
        for crowd in crowds:
            names = zipf_names(crowd.registered, args.asked, args.requests, number + 1)
            known = asked[crowd.registered]
            times = stream(crowd.server, names, 1000 + number)
            was_asked = [name in known or name in names[:place] for place, name in enumerate(names)]
            every[crowd.registered].append(times)
            again[crowd.registered].append([t for t, was in zip(times, was_asked, strict=True) if was])
            known.update(names)
            print(f"round {number}: {crowd.registered}: TTFT {statistics.median(times):.1f} ms", flush=True)
    fewest, rows = crowds[0], []
    for crowd in crowds:
        own, own_again = every[crowd.registered], again[crowd.registered]
        more = max(1, crowd.registered - fewest.registered)
        grown = {key: size - fewest.rss_bytes.get(key, size) for key, size in crowd.rss_bytes.items()}
        rows.append(
            {
                "registered": crowd.registered,
                "ttft_p50_ms": round(statistics.median(chain.from_iterable(own)), 1),
                "ttft_p50_ratio": _ratio(own, every[fewest.registered]),
                "asked_again": round(sum(map(len, own_again)) / sum(map(len, own)), 2),
                "again_p50_ratio": _ratio(own_again, again[fewest.registered]),
                "start_s": round(crowd.start_s, 1),
                "server_bytes_each": round(grown["server"] / more, 1),
                "engine_bytes_each": round(grown.get("engine 0", 0) / more, 1),
                **answered(crowd.server, "/metrics"),
                **answered(crowd.server, "/v1/models"),
            }
        )
    return rows


def _ratio(own: list[list[float]], other: list[list[float]]) -> float:
    """The median of the rounds' ratios of medians; NaN where no round has both."""
    pairs = [(a, b) for a, b in zip(own, other, strict=True) if a and b]
    ratios = [statistics.median(a) / statistics.median(b) for a, b in pairs]
    return round(statistics.median(ratios), 3) if ratios else math.nan


def answered(server: MeasuredServer, path: str) -> dict[str, float]:
    """How long an answer takes, and how long it is."""
    times = []
    with httpx2.Client(base_url=server.url) as client:
        for _ in range(6):
            began = time.perf_counter()
            length = len(client.get(path).content)
            times.append(time.perf_counter() - began)
    return {f"{path} ms": round(1e3 * statistics.median(times[1:]), 1), f"{path} KiB": round(length / 1024)}


def cold_and_warm(server: MeasuredServer, count: int, folder: Path) -> list[dict[str, Any]]:
    """First requests of adapters that were never used, each beside a second one of the same adapter, whose
    prompt is another: the prefix cache holds the first. The processor's time is of whole requests and all of
    the server's processes."""
    names = write_adapters(server.model_folder, folder, FAMILIES, count + 1)
    server.upload(folder)
    for own in names.values():
        stream(server, (own[0],), 0)  # Its load brings what all of the family share.
    cold: dict[str, list[tuple[float, float]]] = {family: [] for family in names}
    warm: dict[str, list[tuple[float, float]]] = {family: [] for family in names}
    for number in range(1, count + 1):
        for family, own in names.items():
            for times, seed in ((cold, number), (warm, count + number)):  # Python seeds -1 as it does 1.
                before_s = server.processor_s()
                ttft_ms = stream(server, (own[number],), seed)[0]
                times[family].append((ttft_ms, server.processor_s() - before_s))
    return [
        {
            "family": family,
            "cold_ttft_p50_ms": round(statistics.median(ms for ms, _ in cold[family]), 1),
            "warm_ttft_p50_ms": round(statistics.median(ms for ms, _ in warm[family]), 1),
            "cold_to_warm": _ratio(*([[ms] for ms, _ in times[family]] for times in (cold, warm))),
            "cold_to_warm_cpu": round(
                sum(s for _, s in cold[family]) / max(1e-9, sum(s for _, s in warm[family])), 3
            ),
        }
        for family in names
    ]


def measure(args: argparse.Namespace, folder: Path, model_folder: Path) -> dict[str, list[dict[str, Any]]]:
    with ExitStack() as stack:
        crowds = []
        for registered in sorted(args.registered):
            own_folder = (args.store or folder) / str(registered)
            crowds.append(started(stack, own_folder, args, registered, model_folder))
        many = streamed(crowds, args)
        cold = cold_and_warm(crowds[-1].server, args.cold, folder / "cold")
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
    parser.add_argument("--store", type=Path, help="folder that keeps what is registered for the next run")
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
