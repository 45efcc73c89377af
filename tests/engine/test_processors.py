"""Threads by default: no more than a container's quota of processors."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from timbre_server.engine.processors import QUOTAS, take_processors, usable_processors
from timbre_server.native.library import compute_alone


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        ("50000 100000\n", 1),
        ("100000 100000\n", 1),
        ("150000 100000\n", 2),
        ("6400000 100000\n", 2),
        ("max 100000\n", 2),
        ("0 100000\n", 1),
        ("100000 0\n", 2),
        ("", 2),
        ("-1 100000\n", 2),
        (None, 2),
    ],
)
@pytest.mark.parametrize("names", QUOTAS)
def test_a_quota_bounds_the_threads(
    names: tuple[str, ...],
    quota: str | None,
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Told in one file, or in one for each of its two numbers."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 5})
    if quota is not None:
        numbers = [quota] if len(names) == 1 else quota.split()
        for name, text in zip(names, numbers, strict=False):
            place = tmp_path / name
            place.parent.mkdir(exist_ok=True)
            place.write_text(text)
    assert usable_processors(tmp_path) == expected


@pytest.mark.usefixtures("two_threads")
def test_so_do_the_processors_that_it_may_run_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert torch.get_num_threads() == 2
    assert usable_processors(tmp_path) == 1


@pytest.mark.usefixtures("two_threads")
def test_what_one_thread_takes_another_cannot_take_away() -> None:
    with ThreadPoolExecutor(1) as stepping, ThreadPoolExecutor(1) as loading:
        stepping.submit(take_processors, 2).result()
        loading.submit(compute_alone).result()
        assert loading.submit(torch.get_num_threads).result() == 1
        assert stepping.submit(torch.get_num_threads).result() == 2
