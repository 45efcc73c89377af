"""The base model's linear layers as methods see them when an adapter is loaded: with their values."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from timbre_methods.contract import Site, Sites


def base_sites(layers: Iterable[tuple[str, Tensor, Tensor | None]]) -> Sites:
    """From each layer's path, weight [O, I] and bias [O]; the tensors are the model's own, never copies."""
    return {path: Site(path, weight_OI, bias_O) for path, weight_OI, bias_O in layers}
