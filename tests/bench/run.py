"""Measures a running Timbre on this machine: ``make bench``.

Decode, prefill and mixed loads through HTTP, of the base alone and of every family of adapters. Rounds are
interleaved: each one runs every scenario once, so that a busy neighbour troubles all alike. Figures are
medians of rounds; ratios are taken inside a round, to the base alone under the same load; ``x floor`` is the
time taken over the least that this machine could need for the base's products alone. Prints a table and
writes JSON.

``--quick`` takes some two minutes, the default some ten, ``--full`` hours. Each flag that names what to
measure replaces that part of the chosen one of these.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import floor
import psutil
import torch
from load import Figures, Job, figures, run
from measured_server import MeasuredServer
from random_adapters import FAMILIES, linear_shapes, write_adapters
from scenarios import BASE, EVERY, Matrix, Scenario, full, jobs, quick, usual
from summary import first_errors, row
from table import options, report

BUSY = 0.1
"""Above this share of the machine at work before a run, it says so."""

Found = tuple[list[dict[str, Any]], dict[str, Any]]
"""The table's rows, and everything else that was found."""


def add_load_flags(parser: argparse.ArgumentParser) -> None:
    """What is asked of a server, and how often."""
    parser.add_argument("--scenarios", help="of decode, prefill, mixed")
    parser.add_argument("--streams", help="how many requests run at once, as in 1,8,16")
    parser.add_argument("--adapters", help="how many different ones the requests ask for, as in 1,8,32")
    parser.add_argument("--popularity", help="of uniform, zipf")
    parser.add_argument("--prompts", help="their lengths in tokens; a mixed load takes them in turn")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, help="default: 2; of --quick 1, of --full 3")
    parser.add_argument("--threads", type=int, default=1, help="compute threads, for the floor too")
    parser.add_argument("--model", type=Path, help="a model's folder; default: the embedded one")
    parser.add_argument("--out", type=Path)
    parser.add_argument("server_flags", nargs="*", help="further flags of timbre serve, after --")
    parser.set_defaults(device="cpu")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = options(__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true")
    size.add_argument("--full", action="store_true")
    parser.add_argument(
        "--families",
        help=f"of {', '.join(FAMILIES)}, and {EVERY}: those that are named, else all, in one batch",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    add_load_flags(parser)
    parser.set_defaults(out=Path("bench.json"))
    args = parser.parse_args(argv)
    args.rounds = args.rounds or (1 if args.quick else 3 if args.full else 2)
    return args


def chosen(args: argparse.Namespace) -> list[Scenario]:
    """Every scenario once; each one's partner is among them. Raises SystemExit for what there is not."""
    families = _words("--families", args.families, [*FAMILIES, EVERY]) or (*FAMILIES, EVERY)
    matrices: Iterable[Matrix] = (quick if args.quick else full if args.full else usual)(families)
    kinds = _words("--scenarios", args.scenarios, ["decode", "prefill", "mixed"])
    given: dict[str, Any] = {
        "streams": _numbers(args.streams),
        "adapters": _numbers(args.adapters),
        "families": families if args.families else None,
        "popularities": _words("--popularity", args.popularity, ["uniform", "zipf"]),
        "prompts": _numbers(args.prompts),
    }
    changes = {field: value for field, value in given.items() if value is not None}
    found = [
        scenario
        for matrix in matrices
        if kinds is None or matrix.kind in kinds
        for scenario in replace(matrix, **changes).scenarios()
    ]
    if not found:
        raise SystemExit("nothing to measure: the chosen size has none of these scenarios")
    return list(dict.fromkeys(found))


def _words(flag: str, text: str | None, known: Sequence[str]) -> tuple[str, ...] | None:
    if text is None:
        return None
    words = tuple(text.split(","))
    unknown = [word for word in words if word not in known]
    if unknown:
        raise SystemExit(f"{flag}: found {', '.join(unknown)}, expected some of {','.join(known)}")
    return words


def _numbers(text: str | None) -> tuple[int, ...] | None:
    return None if text is None else tuple(map(int, text.split(",")))


def families_in_one(named: str | None) -> tuple[str, ...]:
    """Whose adapters make up a batch of `EVERY`: those that ``--families`` names beside it, or all."""
    return tuple(f for f in FAMILIES if f in (named or "").split(",")) or tuple(FAMILIES)


def names_of(
    scenarios: Sequence[Scenario], base: str, server: MeasuredServer, folder: Path, named: str | None = None
) -> dict[str, list[str]]:
    """Writes and uploads the adapters that scenarios need; their names by family. ``named`` is what
    ``--families`` says."""
    count = max((each.adapters for each in scenarios), default=0)
    asked = {each.family for each in scenarios} - {BASE}
    in_one = families_in_one(named) if EVERY in asked else ()
    own = [family for family in FAMILIES if family in asked or family in in_one]
    names = write_adapters(server.model_folder, folder, own, count) if count else {}
    if names:
        server.upload(folder)
    mixed = [name for group in zip(*(names[f] for f in in_one if f in names), strict=True) for name in group]
    return {BASE: [base], **names, EVERY: mixed}


def measured_floor(
    scenarios: Sequence[Scenario], server: MeasuredServer, args: argparse.Namespace
) -> dict[str, Any]:
    """What the machine can do, and of each scenario the most tokens/s that this allows."""
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, server.dtype)
    config = json.loads((server.model_folder / "config.json").read_text())
    body = list(linear_shapes(server.model_folder).values())
    weights = floor.Weights(body, (server.vocab_size, config["hidden_size"]), dtype.itemsize)
    rows = [floor.step_rows(each) for each in scenarios]
    machine = floor.measure(weights, rows, dtype, torch.device(args.device))
    print(f"memory: {machine.bytes_per_s / 1e9:.1f} GB/s; products: ", end="")
    print(", ".join(f"{r / 1e9:.0f} GFLOP/s at {n} rows" for n, r in machine.operations_per_s.items()))
    return {
        "machine": machine.as_json(),
        "tokens_per_s": {
            each.name: floor.floor_tokens_per_s(each, weights, machine, args.new_tokens) for each in scenarios
        },
    }


def warm_up(server: MeasuredServer, names: Mapping[str, Sequence[str]]) -> None:
    """Lets every adapter be loaded, and every path of the code run once."""
    every = {name for own in names.values() for name in own}
    found = asyncio.run(run(server.url, [[Job(name, (200, 201, 202, 203), 3)] for name in sorted(every)]))
    errors = [timing.error for timing in found if timing.error]
    if errors:
        raise SystemExit(
            f"{len(errors)} of {len(found)} requests failed before anything was measured: {errors[0]}"
        )


def measure(args: argparse.Namespace, folder: Path) -> Found:
    scenarios = chosen(args)
    busy = psutil.cpu_percent(1.0) / 100
    if busy > BUSY:
        print(f"other work takes {busy:.0%} of this machine: absolute figures will be too low")
    server = MeasuredServer.start(folder, args.device, args.threads, args.server_flags, args.model)
    try:
        names = names_of(scenarios, server.base, server, folder / "adapters", args.families)
        floors = measured_floor(scenarios, server, args)
        warm_up(server, names)

        def ran(each: Scenario, number: int) -> Figures:
            streams = jobs(
                each, names, new_tokens=args.new_tokens, vocab_size=server.vocab_size, round_=number
            )
            return figures(each.kind, asyncio.run(run(server.url, streams)))

        for base in dict.fromkeys(each.partner for each in scenarios):
            ran(base, args.rounds)  # First of all, it would pay for what others find ready.
        rounds: dict[str, list[Figures]] = defaultdict(list)
        for number in range(args.rounds):
            for each in scenarios:
                found = ran(each, number)
                rounds[each.name].append(found)
                print(f"round {number + 1}: {each.name}: {found.tokens_per_s:.1f} tokens/s", flush=True)
        facts = server.facts()
    finally:
        server.stop()
    rows = [
        row(each.name, rounds[each.name], rounds[each.partner.name], floors["tokens_per_s"][each.name])
        for each in scenarios
    ]
    kept = {name: [each.as_json() for each in found] for name, found in rounds.items()}
    return rows, {
        "rounds": kept,
        "floor": floors,
        "server": facts,
        "busy_before": busy,
        "errors": first_errors(rounds),
    }


def measure_and_report(args: argparse.Namespace, find: Callable[[argparse.Namespace, Path], Found]) -> None:
    """With a folder for ``find`` that is gone when it ends."""
    with tempfile.TemporaryDirectory() as folder:
        rows, more = find(args, Path(folder))
    report(rows, args, **more)
    for name, error in more["errors"].items():
        print(f"{name}: {error}")


if __name__ == "__main__":
    measure_and_report(arguments(), measure)
