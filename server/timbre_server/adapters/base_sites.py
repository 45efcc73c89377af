"""The base model as methods see it when an adapter is loaded: its layers with their values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor

from timbre_methods.contract import Site, SiteKind, Sites
from timbre_methods.prompt_contract import AttentionLayer, Frame


class LayerFacts(Protocol):
    """What is known of a layer beside its values; see `Site`."""

    @property
    def path(self) -> str: ...
    @property
    def kind(self) -> SiteKind: ...
    @property
    def is_transposed(self) -> bool: ...
    @property
    def tied_to(self) -> str | None: ...
    @property
    def slices(self) -> int: ...
    @property
    def scale(self) -> float: ...


def base_sites(layers: Iterable[tuple[LayerFacts, Tensor, Tensor | None]]) -> Sites:
    """From each layer's weight [O, I] (of a norm [D]) and bias [O]; the model's own tensors, never copies."""
    return {
        facts.path: Site(
            facts.path,
            weight,
            bias_O,
            facts.kind,
            facts.is_transposed,
            facts.tied_to,
            facts.slices,
            facts.scale,
        )
        for facts, weight, bias_O in layers
    }


def base_frame(
    hidden_size: int,
    attention: Iterable[tuple[str, int, int, int, int, int | None]],
    stack: Sequence[int] = (),
) -> Frame:
    """From the fields of each `AttentionLayer`, in layer order; ``stack`` as in `Frame`."""
    return Frame(hidden_size, tuple(AttentionLayer(*layer) for layer in attention), tuple(stack))
