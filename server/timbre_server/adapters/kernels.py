"""Which kernels run the adapters: the fastest that work on this machine, or those that were asked for."""

from __future__ import annotations

from typing import Literal

import torch

from timbre_server.errors import KernelsUnavailable
from timbre_server.operators.catalogue import Kernels, why_not

_FASTEST: dict[str, Kernels] = {"cpu": "native", "cuda": "triton"}
"""By the type of the model's device."""


def choose_kernels(
    wanted: Literal["auto", "torch", "native", "triton"], device: torch.device
) -> tuple[Kernels, str]:
    """The kernels for a model on ``device``, and why where ``auto`` did not find faster ones than PyTorch.

    Raises:
        KernelsUnavailable: those that were asked for cannot run there.
    """
    fastest = _FASTEST.get(device.type, "torch")
    if wanted == "auto":
        reason = why_not(fastest)
        return (fastest, "") if reason is None else ("torch", reason)
    if wanted not in ("torch", fastest):
        served = "torch" if fastest == "torch" else f"torch and {fastest}"
        raise KernelsUnavailable(
            f"kernels {wanted} were asked for; the model runs on {device.type}, which is served by {served}: "
            "take one of these, or auto."
        )
    reason = why_not(wanted)
    if reason is not None:
        raise KernelsUnavailable(
            f"kernels {wanted} were asked for and cannot run: {reason}. Plain PyTorch gives the same results "
            "slower: take --kernels torch, or auto."
        )
    return wanted, ""
