"""What a bank of FourierFT adapters weighs: the server's own books against the process's memory."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import psutil
import torch
from random_adapters import fourierft, linear_shapes
from torch import nn

from timbre_methods.contract import Site
from timbre_methods.registry import compile_adapter
from timbre_server.adapters.adapted_model import AdaptedModel
from timbre_server.adapters.loader import LoadedAdapter
from timbre_server.adapters.packed_sites import packed
from timbre_server.adapters.runtime import AdapterRuntime
from timbre_server.adapters.transfer import Transfer

BUDGET_BYTES = 1 << 40


class RandomAdapters:
    """Loads FourierFT with n = 1000 on every linear layer, other coefficients for each digest."""

    def __init__(self, shapes: dict[str, tuple[int, int]]) -> None:
        self._shapes = shapes
        self._sites = {path: Site(path, torch.empty(s, device="meta"), None) for path, s in shapes.items()}

    def load(self, digest: str) -> LoadedAdapter:
        with torch.inference_mode():
            config, tensors = fourierft(self._shapes)
            program = compile_adapter(config, tensors, self._sites)
            parts = packed(program.sites, Transfer(torch.device("cpu")))
        return LoadedAdapter(digest, "fourierft", type(program)(parts), {})


def weigh(model_folder: Path, count: int) -> dict[str, float]:
    """Bytes of so many adapters in memory at once."""
    shapes = linear_shapes(model_folder)
    runtime = AdapterRuntime(AdaptedModel(nn.Module(), []), RandomAdapters(shapes), BUDGET_BYTES)
    _fill(runtime, 0, 1)  # What they share, and what the first load brings with it.
    before = _memory(), runtime.resident_bytes, len(gc.get_objects())
    _fill(runtime, 1, count + 1)
    after = _memory(), runtime.resident_bytes, len(gc.get_objects())
    runtime.close()
    rss, booked, objects = (now - then for now, then in zip(after, before, strict=True))
    coefficients = count * len(shapes) * 1000 * 4
    return {
        "adapters": count,
        "coefficient_bytes": coefficients,
        "booked_bytes": booked,
        "rss_bytes": rss,
        "rss_to_coefficients": round(rss / coefficients, 4),
        "objects_per_adapter": round(objects / count, 1),
    }


def _fill(runtime: AdapterRuntime, start: int, end: int) -> None:
    for number in range(start, end):
        runtime.load(str(number))
        while not runtime.is_resident(str(number)):
            runtime.poll()
            time.sleep(0.0002)


def _memory() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)
