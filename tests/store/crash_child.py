"""Runs one life of a store in a process of its own and dies by SIGKILL at a chosen point.

    crash_child.py      then, on standard input, a line for each life: <store> <fail-point> <which time>

Each life is a fork. It appends to <store>.log what was acknowledged, in order, before it goes on. The answer
to a line is the life's exit status on standard output: -9 killed, 0 lived to the end.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import samples

from timbre_store.errors import InvalidAdapter
from timbre_store.store import Store

NEVER_NAMED = b"put by digest, never named"


def die_at(point: str, time: int) -> samples.Reach:
    left = [time]

    def reach(reached: str) -> None:
        if reached == point:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    return reach


def refused_upload(store: Store) -> None:
    try:
        samples.upload_files(store, "a", b'{"refuse": "no"}', samples.adapter(7)[1])
    except InvalidAdapter:
        return
    raise SystemExit("an adapter that the method refuses was taken")


def live(store: Store, log: Path) -> None:
    """Every kind of change. The names of its steps are the lines of the log."""
    with log.open("a", buffering=1) as acknowledged:

        def done(step: str) -> None:
            acknowledged.write(step + "\n")

        samples.upload(store, "a", 1)
        done("a@1")
        samples.put(store, NEVER_NAMED)
        done("put")
        samples.upload(store, "a", 2)
        done("a@2")
        refused_upload(store)
        done("refused")
        store.set_alias("prod", "a@1")
        done("prod=a@1")
        store.set_alias("prod", "a@2")
        done("prod=a@2")
        store.delete("a@1")
        done("-a@1")
        store.collect_garbage(min_age_s=-1)
        done("collected")
        samples.upload(store, "b", 3)
        done("b@1")


def fork_a_life(root: Path, point: str, time: int) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with samples.open_store(root, reach=die_at(point, time)) as store:
                live(store, root.with_suffix(".log"))
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    for line in sys.stdin:
        root, point, time = line.split()
        print(fork_a_life(Path(root), point, int(time)), flush=True)


if __name__ == "__main__":
    main()
