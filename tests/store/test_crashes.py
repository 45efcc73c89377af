"""A process that is killed at any point between two writes loses nothing that it acknowledged."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from timbre_store.failpoints import FAIL_POINTS
from timbre_store.reader import open_adapter, verify_blob
from timbre_store.store import Store

STEPS = ["a@1", "put", "a@2", "refused", "prod=a@1", "prod=a@2", "-a@1", "collected", "b@1"]
"""What a life does, in order: see crash_child.py."""
SEEDS = {"a@1": 1, "a@2": 2, "b@1": 3}
NEVER_NAMED = "sha256:14ea3726167fb7044caaca5c4aca6f6e48d21d717c4060fdb2656e2c078a03a5"
"""The blob of the step ``put``."""
ONCE = {
    point for point in FAIL_POINTS if point.startswith(("open", "catalogue", "delete", "manifests.removed"))
}

Life = Callable[[str, str, int], int]


@pytest.fixture(scope="module")
def life() -> Iterator[Life]:
    """Lives a store's life in a fork of one warm process: (store, fail-point, which time) -> exit status."""
    paths = ":".join(path for path in sys.path if path)
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("crash_child.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        env={"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    requests, answers = process.stdin, process.stdout

    def live(store: str, point: str, time: int) -> int:
        requests.write(f"{store} {point} {time}\n")
        return int(answers.readline())

    with process:
        yield live
        requests.close()
        assert process.wait() == 0


def state_of(store: Store) -> dict[str, str]:
    """The named part of a store as text."""
    state = {f"{r.name}@{r.version}": r.digest for name in ("a", "b") for r in store.versions(name)}
    return state | {alias.alias: alias.target for alias in store.aliases()}


def state_after(steps: list[str], digests: dict[str, str]) -> dict[str, str]:
    """What the named part should be when these steps have happened."""
    state: dict[str, str] = {}
    for step in steps:
        if step in SEEDS:
            state[step] = digests[step]
        elif step.startswith("prod="):
            state["prod"] = step.removeprefix("prod=")
        elif step.startswith("-"):
            del state[step[1:]]
    return state


@pytest.fixture(scope="module")
def digests(tmp_path_factory: pytest.TempPathFactory, samples: ModuleType) -> dict[str, str]:
    with samples.open_store(tmp_path_factory.mktemp("digests")) as store:
        return {step: samples.upload(store, "x", seed).digest for step, seed in SEEDS.items()}


def test_a_life_without_a_crash_takes_every_step(life: Life, tmp_path: Path) -> None:
    root = tmp_path / "store"
    assert life(str(root), "none", 1) == 0
    assert root.with_suffix(".log").read_text().splitlines() == STEPS


@pytest.mark.parametrize(
    ("point", "time"),
    [(point, time) for point in FAIL_POINTS for time in ((1,) if point in ONCE else (1, 2))],
)
def test_a_crash_loses_nothing_acknowledged_and_tears_nothing(
    life: Life, tmp_path: Path, samples: ModuleType, digests: dict[str, str], point: str, time: int
) -> None:
    root = tmp_path / "store"
    assert life(str(root), point, time) == -9
    log = root.with_suffix(".log")
    acknowledged = log.read_text().splitlines() if log.exists() else []
    assert acknowledged == STEPS[: len(acknowledged)]
    with samples.open_store(root) as store:
        assert store.check_integrity() == ()
        assert list((root / "tmp").iterdir()) == []
        possible = [
            state_after(STEPS[:count], digests) for count in (len(acknowledged), len(acknowledged) + 1)
        ]
        found = state_of(store)
        assert found in possible
        for digest in (value for key, value in found.items() if "@" in key):
            files = open_adapter(root, digest)
            verify_blob(files.tensors_path, files.manifest.tensors_digest)
        if "put" in acknowledged and "-a@1" not in acknowledged:
            assert store.has_blob(NEVER_NAMED)
        store.collect_garbage(min_age_s=-1)
        assert state_of(store) == found
        assert store.check_integrity() == ()
        next_version = 2 if "b@1" in found else 1
        assert samples.upload(store, "b", 1).version == next_version


@pytest.mark.parametrize("point", [point for point in FAIL_POINTS if point.startswith(("open", "catalogue"))])
def test_a_crash_while_opening_an_old_store_changes_nothing(
    life: Life, tmp_path: Path, samples: ModuleType, digests: dict[str, str], point: str
) -> None:
    root = tmp_path / "store"
    assert life(str(root), "none", 1) == 0
    files = samples.files_of(root)
    (root / "tmp" / "leftover").write_bytes(b"half a blob")
    assert life(str(root), point, 1) == -9
    with samples.open_store(root) as store:
        assert state_of(store) == state_after(STEPS, digests)
        assert samples.files_of(root) == files
        assert store.check_integrity() == ()
