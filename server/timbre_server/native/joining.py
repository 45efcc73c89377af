"""What may be added to a base product in C++ before it is rounded."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Joining:
    """A kernel that computes a product as ``timbre_linear`` does, and is told first where that lies which it
    adds; it lies there for as long as layers may be asked for it."""

    name: str
    address: int
