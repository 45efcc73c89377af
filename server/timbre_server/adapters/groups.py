"""Which linear layers read the very same tensor, as plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LinearGroup:
    """Linear layers that are called with one and the same input, in call order.

    Found by the probe, never by name: q, k, v and gate, up in most families; a fused model has groups of
    one. ``is_head`` marks the output head, which sees only the rows whose logits are kept.
    """

    paths: tuple[str, ...]
    is_head: bool = False
