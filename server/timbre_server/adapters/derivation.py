"""What an adapter's file leaves out and only the base's weights give, computed once, off the step loop.

Runs when an adapter is registered (`Method.derive`): a decomposition of the base may take seconds, so it has
a thread of its own, and neither steps nor loads wait for it. The result is a safetensors file at the path
that was asked for, or a reason; the store keeps the file beside the adapter. One that has begun or waits goes
on when its client has gone: the registration is completed like any other, and a second try finds it.
"""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from timbre_methods.contract import DERIVED, Sites, Tensors
from timbre_methods.errors import InvalidTensors, MethodError
from timbre_methods.registry import derive
from timbre_server.adapters.transfer import step_aside

CPU = torch.device("cpu")

FailureCode = Literal["invalid_adapter", "disk_full", "busy", "failed"]

MAX_OPEN = 4
"""Derivations that run or wait; a further one is sent away, for each may take minutes."""

BUSY = f"{MAX_OPEN} adapters are being registered that take long computations; try again when one has ended"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Derivation:
    """One that has ended: the file is there, or a code and a reason say why not."""

    derived_path: str
    code: FailureCode | None = None
    reason: str = ""


class Derivations:
    """Runs one after the other, for one base model. `begin` and `poll` belong to the loop's thread."""

    def __init__(
        self, sites: Sites, on_ended: Callable[[], None] = lambda: None, device: torch.device = CPU
    ) -> None:
        """``on_ended`` is called on another thread: it may only wake a loop that sleeps. ``device``: where
        the sites' values are."""
        self._sites = sites
        self._on_ended = on_ended
        self._thread = ThreadPoolExecutor(1, "adapter-derive", step_aside, (device,))
        self._open: dict[str, Future[None]] = {}
        self._sent_away: list[Derivation] = []

    def begin(self, config: bytes, tensors_path: str, derived_path: str) -> None:
        """Start one; ``derived_path`` is where the file shall be, and names the answer."""
        if len(self._open) >= MAX_OPEN:
            self._sent_away.append(Derivation(derived_path, "busy", BUSY))
            self._on_ended()
            return
        paths = Path(tensors_path), Path(derived_path)
        future = self._thread.submit(write_derived, json.loads(config), *paths, self._sites)
        self._open[derived_path] = future
        future.add_done_callback(lambda _: self._on_ended())

    def poll(self) -> tuple[Derivation, ...]:
        """Those that have ended since the last call. Never blocks."""
        ended = {path: future for path, future in self._open.items() if future.done()}
        for path in ended:
            del self._open[path]
        sent_away, self._sent_away = self._sent_away, []
        return (*sent_away, *(_ended(path, future.exception()) for path, future in ended.items()))


def _ended(path: str, error: BaseException | None) -> Derivation:
    match error:
        case None:
            return Derivation(path)
        case MethodError() | SafetensorError():
            return Derivation(path, "invalid_adapter", str(error))
        case OSError(errno=errno.ENOSPC | errno.EDQUOT | errno.EFBIG):
            text = f"the store's disk cannot take the derived tensors ({error.strerror})"
            return Derivation(path, "disk_full", text)
    _log.error("deriving tensors failed", exc_info=error)
    return Derivation(path, "failed", f"the derived tensors could not be made: {type(error).__name__}")


def write_derived(config: dict[str, Any], tensors_path: Path, derived_path: Path, sites: Sites) -> None:
    """Compute and write; nothing to keep writes no file. Raises MethodError, SafetensorError, OSError."""
    with torch.inference_mode():
        derived = derive(config, load_file(tensors_path), sites)
        _check_finite(derived)
        if derived:  # Not save_file: it takes a full disk for a malformed file.
            derived_path.write_bytes(save({name: _alone(tensor) for name, tensor in derived.items()}))


def _check_finite(derived: Tensors) -> None:
    """Finite values of a file may come to infinity where they are multiplied."""
    for name, tensor in derived.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            path, _, key = name.removeprefix(DERIVED).rpartition(".")
            at = f" at {path}" if path else ""
            raise InvalidTensors(
                f"what the adapter's values give{at}, {key}, comes to more than float32 holds; train it with "
                "smaller values"
            )


def _alone(tensor: Tensor) -> Tensor:
    """The tensor contiguous and in storage of its own, as the format wants it."""
    is_alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if is_alone else tensor.clone(memory_format=torch.contiguous_format)
