"""The base model as methods see it when an adapter is loaded: its linear layers with their values."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from timbre_methods.contract import Site, Sites
from timbre_methods.prompt_contract import AttentionLayer, Frame


def base_sites(layers: Iterable[tuple[str, Tensor, Tensor | None]]) -> Sites:
    """From each layer's path, weight [O, I] and bias [O]; the tensors are the model's own, never copies."""
    return {path: Site(path, weight_OI, bias_O) for path, weight_OI, bias_O in layers}


def base_frame(hidden_size: int, attention: Iterable[tuple[str, int, int, int, int, int | None]]) -> Frame:
    """From the fields of each `AttentionLayer`, in layer order."""
    return Frame(hidden_size, tuple(AttentionLayer(*layer) for layer in attention))
