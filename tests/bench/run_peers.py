"""The same load on Timbre and on the servers and libraries that people would else take: ``make bench-peers``.

LoRA of rank 8 and the base alone, since that is what all of them serve. Each peer is run where its folder is
given and is said to be skipped where not. All are started first, then every round runs every scenario on each
of them once: those of ``make bench ARGS=--quick``, or of its usual size where ``--scenarios`` names kinds.
``--rounds`` are counted; one more comes first and is counted for nobody, since the first of a load pays for
what later ones find ready: shapes recorded, kernels compiled, memory taken.
``to base`` is to the peer's own base, ``to Timbre`` to ours under the same load in that round.
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from load import Figures, Job, Timing, figures, openai_body
from measured_server import MeasuredServer
from peers.contract import HttpPeer, Peer, Setting
from peers.generate import Generate
from peers.llamacpp import LlamaCpp
from peers.vllm import Vllm
from run import Found, add_load_flags, chosen, measure_and_report, measured_floor, names_of
from scenarios import BASE, Scenario, jobs
from summary import first_errors, ratio_in_round, row, shown
from table import options


class Timbre(HttpPeer):
    """A server that is started and stopped elsewhere."""

    name = "Timbre"

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url

    def missing(self) -> str | None:
        return None

    def start(self, setting: Setting) -> None:
        """It runs already."""

    def body(self, job: Job) -> Mapping[str, Any]:
        return openai_body(job)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = options(__doc__)
    add_load_flags(parser)
    for name, what in (("vllm", "a virtual environment with vLLM"), ("llamacpp", "llama.cpp, built")):
        variable = f"BENCH_{name.upper()}"
        given = os.environ.get(variable)
        default = Path(given) if given else None
        parser.add_argument(f"--{name}", type=Path, default=default, help=f"{what}; or {variable}")
    parser.set_defaults(out=Path("bench-peers.json"), families="lora", full=False)
    args = parser.parse_args(argv)
    args.quick = args.scenarios is None
    args.rounds = args.rounds or 2
    return args


def started(peers: Sequence[Peer], setting: Setting, stack: ExitStack) -> list[Peer]:
    """Those that could be; of the others it is said why not."""
    found = []
    for peer in peers:
        reason = peer.missing()
        if reason is None:
            stack.callback(peer.stop)
            try:
                peer.start(setting)
                found.append(peer)
            except RuntimeError as error:
                reason = str(error)
        if reason is not None:
            print(f"{peer.name} is skipped: {reason}", flush=True)
    return found


def warm_up(peer: Peer, names: Mapping[str, Sequence[str]]) -> list[Timing]:
    return peer.measure([[Job(name, (200, 201, 202, 203), 3)] for own in names.values() for name in own])


def measured_rounds(
    count: int,
    scenarios: Sequence[Scenario],
    peers: Sequence[Peer],
    streams_of: Callable[[Scenario, int], Sequence[Sequence[Job]]],
) -> dict[tuple[str, str], list[Figures]]:
    """By peer and scenario, of so many rounds after one that is not counted."""
    rounds: dict[tuple[str, str], list[Figures]] = defaultdict(list)
    for number in range(count + 1):
        said = f"round {number}" if number else "warm-up, not counted"
        for each in scenarios:
            streams = streams_of(each, number)
            for peer in (peer for peer in peers if peer.runs(each)):
                found = figures(each.kind, peer.measure(streams))
                if number:
                    rounds[peer.name, each.name].append(found)
                print(f"{said}: {peer.name}: {each.name}: {found.tokens_per_s:.1f} tokens/s", flush=True)
    return rounds


def measure(args: argparse.Namespace, folder: Path) -> Found:
    scenarios = chosen(args)
    with ExitStack() as stack:
        server = MeasuredServer.start(folder, "cpu", args.threads, args.server_flags, args.model)
        stack.callback(server.stop)
        names = names_of(scenarios, server.base, server, folder / "adapters")
        own = {BASE: names[BASE], "lora": names.get("lora", [])}
        loras = {name: folder / "adapters" / name for name in own["lora"]}
        floors = measured_floor(scenarios, server, args)
        setting = Setting(server.model_folder, server.base, server.dtype, args.threads, loras, folder)
        asked = [Timbre(server.url), Vllm(args.vllm), LlamaCpp(args.llamacpp), Generate()]
        peers = started(asked, setting, stack)
        for peer in peers:
            warm_up(peer, own)

        def streams_of(each: Scenario, number: int) -> list[list[Job]]:
            return jobs(each, own, new_tokens=args.new_tokens, vocab_size=server.vocab_size, round_=number)

        rounds = measured_rounds(args.rounds, scenarios, peers, streams_of)
    by_name = {f"{peer}: {name}": found for (peer, name), found in rounds.items()}
    kept = {name: [each.as_json() for each in found] for name, found in by_name.items()}
    more = {"rounds": kept, "floor": floors, "errors": first_errors(by_name)}
    return rows_of(scenarios, [peer.name for peer in peers], rounds, floors["tokens_per_s"]), more


def rows_of(
    scenarios: Sequence[Scenario],
    peers: Sequence[str],
    rounds: Mapping[tuple[str, str], Sequence[Figures]],
    floors: Mapping[str, float],
) -> list[dict[str, Any]]:
    rows = []
    for each in scenarios:
        for peer in peers:
            own = rounds.get((peer, each.name))
            if own:
                found = row(each.name, own, rounds[peer, each.partner.name], floors[each.name])
                to_ours = shown(ratio_in_round(own, rounds[Timbre.name, each.name]), 3)
                rows.append({"peer": peer, **found, "to Timbre": to_ours})
    return rows


if __name__ == "__main__":
    measure_and_report(arguments(), measure)
