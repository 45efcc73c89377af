"""An input that several layers read, and what the first of them makes of it for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from timbre_server.native.notes import current


class SharedInput:
    """Of one group of layers, until each has read what was made.

    Layers prove by identity that theirs is the same tensor: holding on to it makes that proof safe."""

    def __init__(self, num_members: int) -> None:
        self._num_members = num_members
        self.drop()

    def drop(self) -> None:
        """Also what no layer has read (a forward that failed half-way)."""
        self._x: Tensor | None = None
        self._made: Any = None
        self._is_written = False
        self._unread: set[int] = set()

    def made(self, member: int, x: Tensor, make: Callable[[Tensor], Any]) -> Any:
        """``make(x)``, or what another member has made so. What was made where it ran is nothing to a member
        that is written down on a tape, nor the other way round."""
        is_written = current() is not None
        if self._x is not x or member not in self._unread or self._is_written is not is_written:
            self.drop()
            self._made = make(x)
            self._x, self._is_written = x, is_written
            self._unread = set(range(self._num_members))
        found = self._made
        self._unread.remove(member)
        if not self._unread:
            self.drop()
        return found
