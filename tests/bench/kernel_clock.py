"""What the kernels of decode steps take, each by itself: on a CPU those that a tape plays, on a GPU all.

On a CPU a tape's kernels are called one by one, and the clock is read between. On a GPU PyTorch's profiler
tells, by the kernels' own names; that part has not run on one yet.
"""

from __future__ import annotations

import ctypes
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from timbre_server.native import tape

MODEL = "the model's rest: norms, rotations, activations, residuals"
ADDING = "adapters: between bfloat16 and float32"
_PARTS = {
    "linear": "linear layers",
    "attention": "attention",
    **dict.fromkeys(("norm", "rotary", "activation", "sum"), MODEL),
    **dict.fromkeys(("rounded", "widened", "copied"), ADDING),
    **dict.fromkeys(("low_rank_experts", "gates"), "adapters: Routed"),
    "low_rank": "adapters: LowRank",
    "sparse": "adapters: Sparse",
    "spectra": "adapters: Spectral",
    **{kind.lower(): f"adapters: {kind}" for kind in ("Diagonal", "Rotation", "Circulant", "Kronecker")},
    **{kind.lower(): f"adapters: {kind}" for kind in ("Projected", "Block")},
    "packed_dense": "adapters: Dense",
}
"""By what the names of kernels begin with, the first that does."""


@contextmanager
def kernels_timed(found: Counter[str], device: torch.device) -> Iterator[None]:
    """``found``: gets the seconds, by part, of the kernels that run inside."""
    if device.type == "cuda":
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            yield
        found.update({each.key: each.self_device_time_total * 1e-6 for each in profiled.key_averages()})
        return

    def played(kernels: tape._Kernels, num_rows: int) -> None:
        first, end = kernels.begin
        size = len(kernels._calls) // end
        place = 0
        while place < end:
            address = kernels._calls[place * size]
            if not address:
                place += 1 + kernels.choices[place](num_rows)
                continue
            part = _part_at(address)
            started = time.perf_counter()
            kernels._play(first, place, place + 1, num_rows)
            found[part] += time.perf_counter() - started
            place += 1

    with replaced(tape._Kernels, "__call__", played):
        yield


@contextmanager
def calls_timed(found: Counter[str], names: Mapping[str, ModuleType | type]) -> Iterator[None]:
    """``found``: gets the seconds, by name, of functions and methods of these that are called inside."""
    with ExitStack() as stack:
        for name, owner in names.items():
            stack.enter_context(replaced(owner, name, _timed(found, name, getattr(owner, name))))
        yield


def _timed(found: Counter[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = function(*args, **kwargs)
        found[name] += time.perf_counter() - started
        return result

    return timed


@contextmanager
def replaced(module: ModuleType | type, name: str, value: object) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


class _Symbol(ctypes.Structure):
    """``Dl_info`` of dlfcn.h."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


@cache
def _part_at(address: int) -> str:
    """The part that a kernel belongs to."""
    symbol = _Symbol()
    ctypes.CDLL(None).dladdr(ctypes.c_void_p(address), ctypes.byref(symbol))
    name = symbol.name.decode().removeprefix("timbre_").removesuffix("_played")
    return next((part for begin, part in _PARTS.items() if name.startswith(begin)), f"kernel {name}")
