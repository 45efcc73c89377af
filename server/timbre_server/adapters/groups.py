"""What adapters may change, as plain data: linear layers by what they read, other layers, and blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class LinearGroup:
    """Linear layers that are called with one and the same input, one after the other, in call order: between
    them no other layer that adapters change is called, since what is made of their input is kept for them
    only so long.

    Found by the probe, never by name: q, k, v and gate, up in most families; a fused model has groups of
    one. ``is_head`` marks the output head, which sees only the rows whose logits are kept.
    """

    paths: tuple[str, ...]
    is_head: bool = False


@dataclass(frozen=True, slots=True)
class LoneLayer:
    """An embedding that reads the token ids, or a norm. Found by the probe by what it does, never by name.

    ``rows_per_token`` is above one for a norm of each head: it sees so many consecutive rows for each token.
    """

    path: str
    kind: Literal["embedding", "norm"]
    rows_per_token: int = 1


@dataclass(frozen=True, slots=True)
class Block:
    """A module with linear layers in it, that turns rows of ``features`` numbers into as many of the same
    size (an MLP). Found by the probe by what it does, never by name."""

    path: str
    features: int
    last: str | None = None
    """The linear layer whose very output is the block's."""


@dataclass(frozen=True, slots=True)
class ParameterModule:
    """A module with matrices, or stacks of them, that belong to no layer of a known kind (experts, a router).

    Found by the probe: every call gives it the tokens' rows in order, and what it does to one row does not
    depend on the others.
    """

    path: str
    names: tuple[str, ...]
    """Of the parameters, in the order of their definition."""
    axes: tuple[int | None, ...]
    """Which axis of each argument of a call, positional ones first, holds the rows; None: it has none."""
    result_axes: tuple[int, ...]
    """The same of each tensor that it returns."""
    num_bytes: int = 0
    """Of the parameters."""
