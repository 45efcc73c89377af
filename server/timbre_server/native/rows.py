"""What lies on a tape, for as many rows as it is played for.

The number of rows of a recording divides nothing else: a dimension that it divides counts rows, or things of
which each row has as many.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


class NotRepeatable(RuntimeError):
    """A function does something that may be something else the next time."""


def counts_rows(size: int, num_rows: int) -> bool:
    return size > 0 and size % num_rows == 0


def has_rows(tensor: Tensor, num_rows: int) -> bool:
    return any(counts_rows(size, num_rows) for size in tensor.shape)


class Rows:
    """A tensor, by the number of rows that are looked at: always the same first ones."""

    def __init__(self, whole: Tensor, num_rows: int) -> None:
        """Raises: NotRepeatable."""
        self.whole = whole
        dims = [dim for dim, size in enumerate(whole.shape) if counts_rows(size, num_rows)]
        if len(dims) > 1:
            raise NotRepeatable(f"of a tensor of {tuple(whole.shape)} more than one dimension counts rows")
        self._dim = dims[0] if dims else None
        self._per_row = whole.shape[dims[0]] // num_rows if dims else 0
        self._last: tuple[int, Tensor] = num_rows, whole

    def __call__(self, num_rows: int) -> Tensor:
        """The same tensor for the same number, one time after the other."""
        if num_rows != self._last[0]:
            size = self._per_row * num_rows
            own = self.whole if self._dim is None else self.whole.narrow(self._dim, 0, size)
            self._last = num_rows, own
        return self._last[1]

    @property
    def are_outermost(self) -> bool:
        """Whether the first rows of a contiguous tensor lie together."""
        return self._dim is not None and self.whole.shape[: self._dim].numel() == 1


@dataclass(frozen=True, slots=True)
class Count:
    """A size that counts rows."""

    per_row: int

    def __call__(self, num_rows: int) -> int:
        return self.per_row * num_rows
