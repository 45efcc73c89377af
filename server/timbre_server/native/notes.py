"""Which recording runs on a thread, and how kernels tell it what they are called with."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True, eq=False)
class KernelCall:
    """One call of a kernel, as ``played.h`` makes it. It holds nothing that arguments are addresses of."""

    played: int
    """The address of what calls the kernel."""
    words: array[int]
    """The arguments."""
    counted: Sequence[tuple[int, int]]
    """Which of them count rows, or numbers in rows, with what they are of one row."""


class Notes(Protocol):
    num_rows: int
    """Of what is written down."""

    def note(self, call: KernelCall) -> None: ...


_CURRENT: ContextVar[Notes | None] = ContextVar("timbre_notes", default=None)


def current() -> Notes | None:
    """Of this thread."""
    return _CURRENT.get()


@contextmanager
def noting(notes: Notes | None) -> Iterator[None]:
    token = _CURRENT.set(notes)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def notable(
    function: Callable[..., None], written: Callable[[Sequence[Any], int], KernelCall]
) -> Callable[..., None]:
    """A kernel that is written down, with how many rows a recording has, in place of being called."""

    def call(*args: object) -> None:
        own = _CURRENT.get()
        if own is None:
            function(*args)
        else:
            own.note(written(args, own.num_rows))

    return call
