"""What a function calls, written down for a `Tape`: kernels with their arguments, and PyTorch's operations
with their tensors.

Tensors that are made meanwhile lie in an `Arena`, at the same place whenever the tape is played, which may be
for fewer rows (`native.rows`). What has to be decided is chosen when something has changed (`Choice`). What
looks at numbers in between, and might do something else with others, cannot be recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from timbre_server.native.arena import Arena
from timbre_server.native.notes import KernelCall, current, noting
from timbre_server.native.rows import Count, NotRepeatable, Rows, counts_rows, has_rows
from timbre_server.native.sums import sum_into
from timbre_server.native.tape import Choice, Note, State, Tape

ResultT = TypeVar("ResultT")

_ALLOCATING = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_COPYING = ("_to_copy", "clone")
_SUM = torch.ops.aten.add.Tensor
_READING = (Tensor.tolist, Tensor.numpy, Tensor.__array__)
"""What reads numbers without an operation of PyTorch."""


class Recording:
    """Of one function, on this thread. Kernels are written down and do not run; PyTorch's operations do, on
    whatever lies there."""

    def __init__(self, arena: Arena, num_rows: int) -> None:
        self.num_rows = num_rows
        self._arena = arena
        self._notes: list[Note | KernelCall | Choice] = []
        self._held: list[object] = []
        self._kept: dict[int, Rows] = {}

    @staticmethod
    def of(function: Callable[[], Tensor], arena: Arena, num_rows: int) -> tuple[Tape, Rows]:
        """The tape of a function of so many rows (`native.rows` says which will do), and where what it gives
        lies after each time. Call it under ``torch.inference_mode()``. Tapes in one arena must not be played
        at the same time, and what one gave is lost when another is played.

        Raises: NotRepeatable.
        """
        arena.begin()
        own = Recording(arena, num_rows)
        with _Refusing(own), _Writing(own), noting(own):
            found = own.kept(function())
        return Tape(own._notes, own._held), found

    @staticmethod
    def of_kernels(function: Callable[[], object], num_rows: int) -> Tape:
        """What a function calls, which is nothing but kernels and tapes of them; what it returns is kept with
        the tape."""
        own = Recording(Arena(), num_rows)
        with noting(own):
            held = function()
        return Tape(own._notes, held)

    def branch(self, function: Callable[..., ResultT], *inputs: Tensor) -> tuple[Tape, ResultT]:
        """Written down on a tape of its own, which this one does not play."""
        outer, self._notes = self._notes, []
        try:
            found = function(*inputs)
            return Tape(self._notes, self._held), found
        finally:
            self._notes = outer

    def note(self, call: Note | KernelCall | Choice) -> None:
        self._notes.append(call)

    def splice(self, tape: Tape) -> None:
        """Note all that is on it."""
        self._notes += tape.notes

    def kept(self, tensor: Tensor) -> Rows:
        """For calls that are noted: it does not keep the tensor's place from being used again once it has
        died, as it does in the recorded function. The same one for the same tensor."""
        own = self._arena.uncounted(tensor)
        if id(own) not in self._kept:
            self._kept[id(own)] = Rows(own, self.num_rows)
        return self._kept[id(own)]

    def written(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], found: Any) -> Any:
        """What an operation of PyTorch has given, where it will be each time."""
        kind = _kind_of(func)
        if kind == "refused":
            raise NotRepeatable(f"{func} reads numbers")
        if kind == "view":
            self._check_view(func, args[0], found)
            return found
        if kind == "allocating":
            return self._arena.like(found)
        args, kwargs = self._counted(func, args), tree_map_only(Tensor, self.kept, kwargs)
        if kind == "in place":
            self.note(_Operation(func, *args, **kwargs))
            return found
        outs = tree_map_only(Tensor, self._copied, found)
        if func is _SUM and not kwargs and self._is_sum(outs, args):
            return outs
        kept, into = tree_map_only(Tensor, self.kept, outs), _out_variant(func)
        if kind == "copying":
            self.note(_Operation(Tensor.copy_, kept, args[0]))
        elif into is not None:
            self.note(_Operation(into, *args, **kwargs, out=kept))
        else:
            self.note(_Operation(partial(_again, func), args, kwargs, kept))
        return outs

    def _check_view(self, func: OpOverload, x: object, found: object) -> None:
        """Of some rows there is no view of as many each time."""
        if not isinstance(x, Tensor) or not has_rows(x, self.num_rows):
            return
        if not all(has_rows(view, self.num_rows) for view in tree_leaves(found)):
            raise NotRepeatable(f"{func} looks at some of the rows")

    def _counted(self, func: OpOverload, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """With what takes their places for any number of rows."""
        has_sizes = func._overloadpacket is torch.ops.aten.arange

        def own(value: Any, *, is_size: bool) -> Any:
            if isinstance(value, (list, tuple)):
                return type(value)(own(each, is_size=True) for each in value)
            if isinstance(value, Tensor):
                return self.kept(value)
            if is_size and type(value) is int and counts_rows(value, self.num_rows):
                return Count(value // self.num_rows)
            return value

        return tuple(own(value, is_size=has_sizes) for value in args)

    def _is_sum(self, y: Tensor, args: tuple[Any, ...]) -> bool:
        """Whether it is written down as a kernel."""
        each = [arg.whole if isinstance(arg, Rows) else arg for arg in args]
        is_one = self.kept(y).are_outermost and sum_into(y, *each)
        if is_one:
            self._held.append(each)
        return is_one

    def _copied(self, tensor: Tensor) -> Tensor:
        return self._arena.like(tensor).copy_(tensor)


class _Operation:
    """One of PyTorch's, of tensors and sizes by the number of rows."""

    def __init__(self, call: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        self._call, self._all = call, (args, kwargs)
        self._last: tuple[int, tuple[Any, Any]] = 0, ((), {})

    def __call__(self, num_rows: int) -> None:
        if num_rows != self._last[0]:
            self._last = num_rows, tree_map_only((Rows, Count), lambda each: each(num_rows), self._all)
        args, kwargs = self._last[1]
        self._call(*args, **kwargs)


def recording() -> Recording | None:
    """The one that runs on this thread."""
    found = current()
    assert found is None or isinstance(found, Recording)
    return found


def repeated(call: Tape, num_rows: int) -> None:
    """Play it for so many rows; or write down all that is on it."""
    own = recording()
    if own is None:
        call(num_rows)
    else:
        own.splice(call)


def either(
    state: State,
    is_plain: Callable[[], bool],
    plain: Callable[[Tensor], Tensor],
    other: Callable[[Tensor], Tensor],
    x: Tensor,
) -> Tensor:
    """``plain(x)``, or else ``other(x)``, both of one shape and type; a tape asks which whenever the state is
    another."""
    own = recording()
    if own is None:
        return plain(x) if is_plain() else other(x)
    tape, y = own.branch(plain, x)
    kept_x, kept_y = own.kept(x), own.kept(y)
    instead = Tape([lambda num_rows: kept_y(num_rows).copy_(other(kept_x(num_rows)))])
    if not tape.is_one_call:
        own.note(Choice(state, lambda: tape if is_plain() else instead))
        return y
    # Then so is the whole tape, while all is plain.
    own.note(Choice(state, lambda: None if is_plain() else instead, len(tape.notes)))
    own.splice(tape)
    return y


class _Writing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, own: Recording) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._own = own

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if current() is not self._own:
            return func(*args, **kwargs)
        if func._can_decompose():  # In inference mode operations come whole, and may read numbers within.
            with self:
                return func.decompose(*args, **kwargs)
        return self._own.written(func, args, kwargs, func(*args, **kwargs))


class _Refusing(TorchFunctionMode):
    def __init__(self, own: Recording) -> None:
        super().__init__()
        self._own = own

    def __torch_function__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _READING and current() is self._own:
            raise NotRepeatable(f"{func.__name__} reads numbers")
        return func(*args, **(kwargs or {}))


@cache
def _kind_of(func: OpOverload) -> str:
    schema, name = func._schema, func._overloadpacket.__name__
    gives_tensors = all("Tensor" in str(each.type) for each in schema.returns)
    if not gives_tensors or torch.Tag.dynamic_output_shape in func.tags:
        return "refused"
    if schema.is_mutable:
        return "in place"
    if any(each.alias_info is not None for each in schema.returns):
        return "view"
    if name in _ALLOCATING:
        return "allocating"
    return "copying" if name in _COPYING else "computing"


@cache
def _out_variant(func: OpOverload) -> OpOverload | None:
    """What writes the same to a tensor that it is given as ``out``."""

    def asked(variant: OpOverload) -> list[tuple[str, str]]:
        return [(each.name, str(each.type)) for each in variant._schema.arguments if not each.is_out]

    packet = func._overloadpacket
    for name in packet.overloads():  # type: ignore[no-untyped-call]
        variant: OpOverload = getattr(packet, name)
        outs = [each.name for each in variant._schema.arguments if each.is_out]
        if outs == ["out"] and asked(variant) == asked(func):
            return variant
    return None


def _again(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], outs: Any) -> None:
    found = func(*args, **kwargs)
    if isinstance(outs, Tensor):
        outs.copy_(found)
    else:
        for out, each in zip(outs, found, strict=True):
            out.copy_(each)
