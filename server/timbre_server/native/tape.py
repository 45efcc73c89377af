"""What was written down, to be called again without the Python between: for a CPU what a CUDA graph is for a
GPU.

A step of a small model is some hundreds of short calls, and what stands around them (modules, views,
PyTorch's dispatch, memory that is new each time) takes a quarter or a third of the step. Kernels that follow
each other on a `Tape` are one call (``tape.cpp``), with them what a `Choice` calls while nothing changes that
it follows from. A tape is written down for some number of rows, and played for as many or fewer.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from itertools import chain, count

from timbre_server.native.library import ADDRESS, NUMBER, library
from timbre_server.native.notes import KernelCall

Note = Callable[[int], object]
"""What is called for so many rows."""


class State:
    """What calls follow from: a number that is another one whenever these may be others, and may be one again
    that it was when they were the same."""

    _NUMBERS = count(1)

    def __init__(self) -> None:
        self._number = array("q", [self.another()])

    @classmethod
    def another(cls) -> int:
        """A number that no state has had."""
        return next(cls._NUMBERS)

    @property
    def number(self) -> int:
        return self._number[0]

    @number.setter
    def number(self, number: int) -> None:
        self._number[0] = number

    @property
    def address(self) -> int:
        return self._number.buffer_info()[0]

    def change(self) -> None:
        self.number = self.another()


class Tape:
    """Calls, in order."""

    def __init__(self, notes: Sequence[Note | KernelCall], held: object = None) -> None:
        """``held``: what kernels are told the addresses of, and nothing else keeps."""
        self.notes = tuple(notes)
        self._held = held

    def __call__(self, num_rows: int) -> None:
        for step in self._steps:
            step(num_rows)

    @property
    def begin(self) -> tuple[int, int] | None:
        """The address and number of all that it calls, if it is nothing but kernels, one at least."""
        if len(self._steps) != 1:
            return None
        only = self._steps[0]
        return only.begin if isinstance(only, _Kernels) and not only.choices else None

    @property
    def is_one_call(self) -> bool:
        """Whether it is nothing but kernels and choices."""
        return all(isinstance(note, (KernelCall, Choice)) for note in self.notes)

    @cached_property
    def _steps(self) -> Sequence[Note | _Kernels]:
        steps: list[Note | _Kernels] = []
        following: list[KernelCall | Choice] = []
        for note in (*self.notes, None):
            if isinstance(note, (KernelCall, Choice)):
                following.append(note)
                continue
            if following:
                steps.append(_Kernels(following))
                following = []
            if note is not None:
                steps.append(note)
        return steps


class _Kernels:
    """Calls of kernels and choices of them that follow each other: ``Call`` of ``tape.cpp``."""

    def __init__(self, calls: Sequence[KernelCall | Choice]) -> None:
        self.choices = {n: call for n, call in enumerate(calls) if isinstance(call, Choice)}
        self._words: list[array[int]] = []
        self._calls = array("q")
        for call in calls:
            if isinstance(call, Choice):
                self._calls.extend((0, call.address, 0, 0))
                continue
            words = array("q", [*call.words, *chain.from_iterable(call.counted)])
            self._words.append(words)
            self._calls.extend((call.played, _address_of(words), len(call.words), len(call.counted)))
        self.begin = _address_of(self._calls), len(calls)
        self._play = _player()

    def __call__(self, num_rows: int) -> None:
        first, end = self.begin
        place = self._play(first, 0, end, num_rows)
        while place < end:
            replaced = self.choices[place](num_rows)
            place = self._play(first, place + 1 + replaced, end, num_rows)


class Choice:
    """What a tape calls at one place: chosen when it gets there, unless it still knows what was chosen in the
    state that there is."""

    _NEVER = 0
    _MAX_KNOWN = 16

    def __init__(self, state: State, choose: Callable[[], Tape | None], num_plain: int = 0) -> None:
        """``choose`` may change the state that it chooses for. What it gives takes the place of so many calls
        that follow; None: those are to be made."""
        self._state, self._choose, self._num_plain = state, choose, num_plain
        unknown = [self._NEVER, 0, 0] * self._MAX_KNOWN
        self._fields = array("q", [state.address, self._MAX_KNOWN, *unknown])
        """``Choice`` of ``tape.cpp``, which plays kernels alone."""
        self.address = _address_of(self._fields)
        self._known: dict[int, Tape | None] = {}
        """What was chosen last, by the number of the state; first what was chosen first."""
        self._num_chosen = 0

    def __call__(self, num_rows: int) -> int:
        """Returns how many of the calls that follow are not to be made."""
        if self._state.number not in self._known:
            tape = self._choose()
            if self._state.number not in self._known:
                self._know(self._state.number, tape)
        tape = self._known[self._state.number]
        if tape is None:
            return 0
        tape(num_rows)
        return self._num_plain

    def _know(self, number: int, tape: Tape | None) -> None:
        if len(self._known) == self._MAX_KNOWN:
            del self._known[next(iter(self._known))]
        self._known[number] = tape
        first = 2 + 3 * (self._num_chosen % self._MAX_KNOWN)
        self._num_chosen += 1
        begin = _NOTHING if tape is None else None if self._num_plain else tape.begin
        own = (self._NEVER, *_NOTHING) if begin is None else (number, *begin)
        self._fields[first : first + 3] = array("q", own)


_NOTHING = 0, 0
"""As `Tape.begin`, of no kernels."""


@cache
def _player() -> Callable[[int, int, int, int], int]:
    found = library().timbre_play
    found.argtypes, found.restype = (ADDRESS, NUMBER, NUMBER, NUMBER), ctypes.c_int64
    return found


def _address_of(words: array[int]) -> int:
    return words.buffer_info()[0]
