"""How an adapter's tensors get to the device that serves it, off the step loop.

To a GPU they go through pinned memory, on a stream of their own: on the stream of the steps a copy would wait
for those launched before it and hold up those after it. Their memory belongs to that stream, which might be
given it again while a step still reads; so it is noted of each tensor that steps read it.

The pinned buffer is made once. Pinning holds up the device, and what PyTorch keeps pinned is let go whenever
a CUDA graph is recorded. Nothing else here is forbidden on one thread while another records.

Not run on a GPU yet; tried at start, and left alone where it fails.

Legend: B bytes of the buffer, N numbers of a tensor or of a piece of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from threading import Lock

import torch
from torch import Tensor

from timbre_server.native.library import compute_alone

STAGING_BYTES = 8 << 20
"""Larger tensors go in pieces: a few megabytes at a time are as fast as any more."""

_log = logging.getLogger(__name__)


class Transfer:
    """By plain copies, on the stream of the steps."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def moved(self, tensor: Tensor) -> Tensor:
        """The tensor on the device, laid out as it is; the very same where it is there."""
        return tensor.to(self.device)

    def aside(self) -> AbstractContextManager[object]:
        """Inside, what this thread launches on the device waits for no step and holds up none."""
        return nullcontext()


class StreamTransfer(Transfer):
    """To a GPU. Safe to call from any thread; what comes back is complete, for the default stream to read."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._staging_B = torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=True)
        self._lock = Lock()

    def moved(self, tensor: Tensor) -> Tensor:
        with self._lock, self.aside():
            if tensor.is_cpu:
                there = torch.empty_like(tensor, device=self.device)
                copy_staged(there, tensor, self._staging_B, self._stream.synchronize)
            else:
                there = super().moved(tensor)
                self._stream.synchronize()
        there.record_stream(torch.cuda.default_stream(self.device))
        return there

    def aside(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)


def step_aside(device: torch.device) -> None:
    """From now on, what this thread launches on a GPU waits for no step and holds up none; of processors it
    takes one."""
    compute_alone()
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


def transfer_to(device: torch.device) -> Transfer:
    """The one for a device: aside from the steps of a GPU, where that gives what was sent."""
    if device.type != "cuda":
        return Transfer(device)
    sent_N = torch.arange(STAGING_BYTES // 4 + 1, dtype=torch.int32)
    try:
        transfer = StreamTransfer(device)
        if torch.equal(transfer.moved(sent_N).cpu(), sent_N):
            return transfer
        _log.warning("adapters are copied among the steps: from pinned memory other values arrive")
    except RuntimeError:
        _log.warning("adapters are copied among the steps: not from pinned memory here", exc_info=True)
    return Transfer(device)


def copy_staged(there: Tensor, tensor: Tensor, staging_B: Tensor, wait: Callable[[], None]) -> None:
    """Copy into what ``torch.empty_like`` gave, through a buffer that is free, and is again afterwards.
    ``wait`` returns when the copies before it have ended."""
    dense = tensor if tensor.stride() == there.stride() else tensor.clone()
    staging_N = staging_B.view(tensor.dtype)
    pieces = (torch.split(_flat(each), len(staging_N)) for each in (dense, there))
    for from_N, to_N in zip(*pieces, strict=True):
        to_N.copy_(staging_N[: len(from_N)].copy_(from_N), non_blocking=True)
        wait()


def _flat(dense: Tensor) -> Tensor:
    """All of a tensor without gaps, in the order in which it lies."""
    return dense.as_strided((dense.numel(),), (1,))
