"""Random matrices of a whole model, of which each layer uses a corner.

They are as large as the largest adapted layer asks for. A file holds them or leaves them out; then they are
drawn again from the config's seed, and rounded to the base's dtype as PEFT does.

Legend: I in features, O out features.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from timbre_methods.bases import MAX_GRID, Matrix, content_key
from timbre_methods.contract import DERIVED, Site, Tensors
from timbre_methods.errors import InvalidConfig, InvalidTensors
from timbre_methods.site_tensors import check_tensor

LARGEST = DERIVED + "largest_layer"
"""The largest out and the largest in of all adapted layers, for `Method.for_reference` where the matrices are
drawn again: no single layer tells them."""


@dataclass(frozen=True, slots=True, eq=False)
class Whole:
    """One matrix; its ``values`` are read or drawn only where they are needed, and once."""

    key: Hashable
    values: Callable[[], Tensor]
    is_drawn: bool

    def part(self, what: Hashable, site: Site, cut: Callable[[Tensor], Tensor]) -> Matrix:
        """What one layer uses. ``what`` tells this cut from others of the same matrix."""
        dtype = site.weight_OI.dtype if self.is_drawn else None

        def make() -> Tensor:
            values = self.values()
            return cut(values if dtype is None else values.to(dtype)).to(torch.float32, copy=True)

        return Matrix((self.key, dtype, what), make)


def saved(tensors: Tensors, names: tuple[str, str], shapes: Collection[tuple[int, ...]]) -> list[Whole]:
    """The two matrices as the file holds them. Raises `InvalidTensors` for a missing or misshapen one."""
    for name, shape in zip(names, shapes, strict=True):
        if name not in tensors:
            raise InvalidTensors(f"{name} is missing, while the config says save_projection=true")
        check_tensor(name, tensors[name], shape)
    return [_held(tensors[name]) for name in names]


def _held(values: Tensor) -> Whole:
    return Whole(content_key(values), lambda: values, is_drawn=False)


def drawn(
    key: Hashable, shapes: Collection[tuple[int, ...]], draw: Callable[[], tuple[Tensor, Tensor]]
) -> list[Whole]:
    """The two matrices as ``draw`` gives them. Raises `InvalidConfig` where they are too large."""
    for shape in shapes:
        if torch.Size(shape).numel() > MAX_GRID:
            raise InvalidConfig(
                f"random matrices of {' x '.join(map(str, shape))} are not drawn: the limit is {MAX_GRID} "
                "numbers; save the adapter with save_projection=true, or leave the largest layers out"
            )
    pair = cache(draw)
    return [
        Whole((key, "A"), lambda: pair()[0], is_drawn=True),
        Whole((key, "B"), lambda: pair()[1], is_drawn=True),
    ]


def largest_layer(sites: Collection[Site]) -> tuple[int, int]:
    """The largest out and the largest in; they may be of different layers."""
    return max(site.out_features for site in sites), max(site.in_features for site in sites)


def largest_for_reference(sites: Collection[Site]) -> dict[str, Tensor]:
    """What `Method.for_reference` gives where the matrices are drawn again."""
    return {LARGEST: torch.tensor(largest_layer(sites))}
