"""Bases that a file names only by a seed, regenerated bit for bit and shared between adapters.

Legend: N stored coefficients, O out features, I in features.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from timbre_methods.errors import InvalidConfig
from timbre_methods.program import Places

MAX_GRID = 2**28
"""The largest out x in whose places are drawn: the draw needs 8 bytes for each, 2 GiB at this size."""

NUM_KEPT = 64
"""Bases that are kept for the next adapter beside those that are in use."""


def fourier_places(
    seed: int, out_features: int, in_features: int, count: int, device: torch.device
) -> Places:
    """The places of FourierFT: the first ``count`` of ``torch.randperm(out * in)`` from a CPU generator.

    Always on the CPU; on the meta device nothing is drawn. Adapters of equal seed, shape and count get the
    very same object while it is among the last `NUM_KEPT` that were asked for.
    Raises `InvalidConfig` where out x in is above `MAX_GRID`.
    """
    if out_features * in_features > MAX_GRID:
        raise InvalidConfig(
            f"random places in a layer of {out_features} x {in_features} are not served: "
            f"the draw is limited to {MAX_GRID} cells; leave this layer out"
        )
    if device.type == "meta":
        rows_N = torch.empty(count, dtype=torch.int64, device="meta")
        return Places("dft", out_features, in_features, rows_N, torch.empty_like(rows_N))
    return _drawn_places(seed, out_features, in_features, count)


@lru_cache(maxsize=NUM_KEPT)
def _drawn_places(seed: int, out_features: int, in_features: int, count: int) -> Places:
    generator = torch.Generator().manual_seed(seed)
    # A copy, so that the cache does not keep the whole permutation alive.
    cells_N = torch.randperm(out_features * in_features, generator=generator)[:count].clone()
    return Places("dft", out_features, in_features, cells_N // in_features, cells_N % in_features)
