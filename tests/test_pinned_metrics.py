"""What ``/metrics`` says of the one adapter whose weights are merged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from timbre_server.engine.messages import StepOutput, StepStats
from timbre_server.engine.pin_messages import PinnedAdapter


@pytest.fixture
def subject(load_module: Callable[[Path], ModuleType]) -> Any:
    """Metrics whose every scrape is checked."""
    return load_module(Path(__file__).with_name("test_metrics.py")).Subject()


def sites(subject: Any) -> list[tuple[dict[str, str], float]]:
    return [(each.labels, each.value) for each in subject.samples() if each.name == "timbre_pinned_sites"]


def test_the_pinned_adapter_has_one_series_by_its_name_while_it_is_pinned(subject: Any) -> None:
    assert (sites(subject), subject.value("timbre_pinned_bytes")) == ([], 0)
    subject.names["sha256:1"] = "pirate"
    for digest, label in (("sha256:1", "pirate"), ("sha256:2", "sha256:2")):
        subject.tally.on_output(StepOutput(StepStats(pinned=PinnedAdapter(digest, 14, 900))))
        assert (sites(subject), subject.value("timbre_pinned_bytes")) == ([({"adapter": label}, 14)], 900)
    subject.tally.on_output(StepOutput(StepStats()))
    assert (sites(subject), subject.value("timbre_pinned_bytes")) == ([], 0)


def test_merged_weights_leave_less_room_for_adapters(subject: Any) -> None:
    stats = StepStats(
        pinned=PinnedAdapter("sha256:1", 7, 800),
        num_resident_adapters=1,
        resident_adapters=("sha256:1",),
        resident_adapter_bytes=100,
    )
    subject.tally.on_output(StepOutput(stats))
    (info,) = [sample for sample in subject.samples() if sample.name == "vllm:lora_requests_info"]
    assert info.labels["max_lora"] == "2", "100 of 1000 bytes are left"
