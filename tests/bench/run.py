"""Measures a running Timbre on this machine: ``make bench``.

Decode throughput and time to first token through HTTP, of the base alone at 1, 8 and 16 streams beside
transformers' generate, and at 16 streams with 1, 8 and 32 distinct adapters of each family. Rounds are
interleaved: each one runs every scenario once, so that a busy neighbour troubles all alike. Figures are
medians of rounds; ratios are taken inside a round, to base-only at as many streams, and then their median.
Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from load import Figures, Scenario, Shape, run_scenario
from measured_server import MeasuredServer
from random_adapters import FAMILIES, write_adapters

STREAMS = (1, 8, 16)
ADAPTED_STREAMS = 16
ADAPTERS = (1, 8, 32)


def scenarios(base: str, names: dict[str, list[str]]) -> list[Scenario]:
    """Everything that one round runs."""
    found = [Scenario(f"base, {streams} streams", streams, (base,)) for streams in STREAMS]
    for family, own in names.items():
        for count in ADAPTERS:
            name = f"{family}, {count} adapters"
            found.append(Scenario(name, ADAPTED_STREAMS, tuple(own[:count])))
    everyone = tuple(name for group in zip(*names.values(), strict=True) for name in group)[: max(ADAPTERS)]
    found.append(Scenario(f"all families, {len(everyone)} adapters", ADAPTED_STREAMS, everyone))
    return found


class Baseline:
    """`generate_baseline` in a process of its own, idle unless asked."""

    def __init__(self, server: MeasuredServer, device: str, threads: int, shape: Shape) -> None:
        script = Path(__file__).with_name("generate_baseline.py")
        flags = ["--dtype", server.dtype, "--device", device, "--threads", str(threads)]
        flags += ["--prompt-tokens", str(shape.prompt_tokens), "--new-tokens", str(shape.new_tokens)]
        self._process = subprocess.Popen(
            [sys.executable, script, server.model_folder, *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def measure(self, batch: int) -> dict[str, float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{batch}\n")
        self._process.stdin.flush()
        figures: dict[str, float] = json.loads(self._process.stdout.readline())
        return figures

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All rounds: for each scenario its figures, in the order of the rounds."""
    with ExitStack() as stack:
        server = MeasuredServer.start(folder, args.device, args.threads, args.server_flags)
        stack.callback(server.stop)
        shape = Shape(args.prompt_tokens, args.new_tokens, server.vocab_size)
        names = write_adapters(server.model_folder, folder / "adapters", max(ADAPTERS))
        server.upload(folder / "adapters")
        baseline = Baseline(server, args.device, args.threads, shape)
        stack.callback(baseline.close)
        planned = scenarios(server.base, names)
        rounds: dict[str, list[dict[str, float]]] = {scenario.name: [] for scenario in planned}
        for number in range(args.rounds + 1):
            for streams in STREAMS:
                figures = baseline.measure(streams)
                rounds.setdefault(f"transformers generate, batch {streams}", []).append(figures)
            for index, scenario in enumerate(planned):
                seed = 1000 * number + index
                figures_of_round: Figures = asyncio.run(run_scenario(server.url, scenario, shape, seed))
                rounds[scenario.name].append(figures_of_round.as_json())
                print(
                    f"round {number}: {scenario.name}: {figures_of_round.tokens_per_s:.1f} tokens/s",
                    flush=True,
                )
        return {"rounds": rounds, "server": server.facts()}


def summary(rounds: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Medians over all rounds but the first, which warms caches, and ratios inside each round."""
    rows = []
    for name, figures in rounds.items():
        kept = figures[1:]
        row: dict[str, Any] = {"scenario": name}
        for key in kept[0]:
            row[key] = round(statistics.median(figure[key] for figure in kept), 1)
        streams = int(name.split()[-2]) if name.startswith("base") else ADAPTED_STREAMS
        if name.startswith("transformers"):
            streams = int(name.split()[-1])
        base = rounds[f"base, {streams} streams"][1:]
        ratios = [own["tokens_per_s"] / other["tokens_per_s"] for own, other in zip(kept, base, strict=True)]
        row["ratio_to_base"] = round(statistics.median(ratios), 3)
        rows.append(row)
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    keys = ("scenario", "tokens_per_s", "ratio_to_base", "ttft_p50_ms", "itl_p50_ms")
    print("\n| " + " | ".join(keys) + " |")
    print("|" + " --- |" * len(keys))
    for row in rows:
        print("| " + " | ".join(str(row.get(key, "")) for key in keys) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds, after one that warms up")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="compute threads of server and baseline alike")
    parser.add_argument("--out", type=Path, default=Path("bench.json"))
    parser.add_argument("server_flags", nargs="*", help="further flags of timbre serve, after --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(args, Path(folder))
    rows = summary(measured["rounds"])
    print_table(rows)
    print(json.dumps(measured["server"]))
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    report = {"when": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine}
    report |= {"command": " ".join(sys.argv), "families": list(FAMILIES), "summary": rows, **measured}
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
