"""The interface of methods that act outside the linear layers: on a request's first rows, and in attention.

They see of the base, beside its linear layers, its `Frame`. The laws are those of `contract`: the same
program on meta tensors as on real ones; nothing given is modified or kept; every tensor is used or refused
by name; every option that is on is honoured or refused by name. In place of a ``reference`` stand tests
against public implementations through the whole engine, since what such an adapter means is no formula of
one layer.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from timbre_methods.contract import Reader, Sites, Tensors
from timbre_methods.program import AdapterProgram

Config = TypeVar("Config")


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """One attention layer; query head ``h`` reads KV head ``h // (num_heads / num_kv_heads)``."""

    path: str
    """Of its module: ``model.layers.0.self_attn``."""
    num_heads: int
    num_kv_heads: int
    key_dim: int
    """Of one head, of queries too."""
    value_dim: int
    shares_with: int | None = None
    """The earlier layer whose keys and values this one attends to, where it has none of its own."""


@dataclass(frozen=True, slots=True)
class Frame:
    """What the linear layers stand in."""

    hidden_size: int
    """Of the embeddings."""
    attention: tuple[AttentionLayer, ...]
    """Layer i at i."""
    stack: tuple[int, ...] = ()
    """The checkpoint's layer that stands at each place, where not each stands once and in order."""


NO_FRAME = Frame(0, ())
"""Where nothing is said of it: no prompt fits."""


class PromptMethod(Reader[Config]):
    """A kind of adapter that brings virtual tokens or acts in attention."""

    @abstractmethod
    def compile(self, config: Config, tensors: Tensors, sites: Sites, frame: Frame) -> AdapterProgram:
        """The adapter as a program. Runs on the meta device too, so it must not read values.

        Raises `InvalidTensors` for a missing, surplus or misshapen tensor and `AdapterMismatch` for what the
        base lacks, naming the first culprit with found and expected.
        """

    @abstractmethod
    def example(
        self, sites: Sites, frame: Frame, generator: torch.Generator
    ) -> tuple[Mapping[str, Any], dict[str, Tensor]]:
        """A small random valid adapter for this base, as the public writer of the format would save it."""
