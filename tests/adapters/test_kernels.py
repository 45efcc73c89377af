"""The choice of kernels: what runs, or a refusal that says what to do."""

from __future__ import annotations

import sys

import pytest
import torch

from timbre_server.adapters import kernels
from timbre_server.adapters.kernels import choose_kernels
from timbre_server.errors import KernelsUnavailable

CPU, CUDA, OTHER = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


def anywhere(_: str) -> str | None:
    return None


def nowhere(name: str) -> str | None:
    return None if name == "torch" else "a tool is missing; install it"


@pytest.mark.parametrize(("device", "fastest"), [(CPU, "native"), (CUDA, "triton"), (OTHER, "torch")])
def test_auto_takes_the_fastest_that_works_on_the_device(
    device: torch.device, fastest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "why_not", anywhere)
    assert choose_kernels("auto", device) == (fastest, "")


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_auto_falls_back_to_pytorch_and_says_why(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "why_not", nowhere)
    assert choose_kernels("auto", device) == ("torch", "a tool is missing; install it")


def test_kernels_that_are_asked_for_and_cannot_run_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "why_not", nowhere)
    with pytest.raises(KernelsUnavailable, match=r"native .* cannot run: a tool is missing; install it\."):
        choose_kernels("native", CPU)
    assert choose_kernels("torch", CPU) == ("torch", "")


@pytest.mark.parametrize(("wanted", "device"), [("triton", CPU), ("native", CUDA), ("native", OTHER)])
def test_kernels_of_another_device_are_refused(wanted: str, device: torch.device) -> None:
    with pytest.raises(KernelsUnavailable, match=f"the model runs on {device.type}"):
        choose_kernels(wanted, device)  # type: ignore[arg-type]


def test_without_triton_that_is_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert choose_kernels("auto", CUDA) == (
        "torch",
        "Triton is not installed; pip install 'timbre[gpu]' brings it",
    )
