"""How much a bind may copy.

Adapters with few rows run together, on copies of their tensors, one for each row, that live as long as the
bind. An adapter for which no room is left runs by itself, and nothing of it is copied for its rows: the same
numbers in more and smaller products.
"""

from __future__ import annotations

MAX_POOLED_BYTES = 2**28
"""Of all copies of one bind. 64 rows of distinct LoRA adapters of rank 16 take some 150 MB at the widest
group of an 8B model. Indices into what is pooled fit in 32 bits."""


class PoolRoom:
    """What one bind has left for copies."""

    def __init__(self) -> None:
        self._left = MAX_POOLED_BYTES

    def take(self, num_bytes: int) -> bool:
        """Take so many bytes; False, and nothing taken, where fewer are left."""
        if num_bytes > self._left:
            return False
        self._left -= num_bytes
        return True
