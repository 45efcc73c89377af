"""What a function calls, written down for a `Tape`: kernels with their arguments, and PyTorch's operations
with their tensors.

Tensors that are made meanwhile lie in an `Arena`, at the same place whenever the tape is played. What must be
decided anew each time is one call to the tape (`repeated`), or is chosen again when something has changed
(`Choice`). What looks at numbers in between, and might do something else with others, cannot be recorded.
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
from torch.utils._pytree import tree_map_only

from timbre_server.native.arena import Arena
from timbre_server.native.notes import KernelCall, current, noting
from timbre_server.native.sums import sum_into
from timbre_server.native.tape import Choice, Note, State, Tape

ResultT = TypeVar("ResultT")

_ALLOCATING = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_COPYING = ("_to_copy", "clone")
_SUM = torch.ops.aten.add.Tensor
_READING = (Tensor.tolist, Tensor.numpy, Tensor.__array__)
"""What reads numbers without an operation of PyTorch."""


class NotRepeatable(RuntimeError):
    """A function does something that may be something else the next time."""


class Recording:
    """Of one function, on this thread."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._notes: list[Note | KernelCall | Choice] = []
        self._held: list[object] = []
        self.is_dry = False

    @staticmethod
    def of(function: Callable[[], Tensor], arena: Arena) -> tuple[Tape, Tensor]:
        """Run it, under ``torch.inference_mode()``: the tape, and the tensor that holds what it gives, now
        and after each time that the tape is played. Tapes in one arena must not be played at the same time,
        and what one gave is lost when another is played.

        Raises: NotRepeatable.
        """
        arena.begin()
        own = Recording(arena)
        with _Refusing(own), _Writing(own), noting(own):
            found = function()
        return Tape(own._notes, own._held), arena.uncounted(found)

    @staticmethod
    def of_kernels(function: Callable[[], object]) -> Tape:
        """What a function calls, which is nothing but kernels and what it lets tapes call; nothing of that is
        called. What it returns is kept with the tape."""
        own = Recording(Arena())
        own.is_dry = True
        with noting(own):
            held = function()
        return Tape(own._notes, held)

    def branch(
        self, function: Callable[..., ResultT], *inputs: Tensor, is_dry: bool = False
    ) -> tuple[Tape, ResultT]:
        """Run it, on a tape of its own that this one does not play; ``is_dry``: without its kernels' work."""
        outer = self._notes, self.is_dry
        self._notes, self.is_dry = [], self.is_dry or is_dry
        try:
            found = function(*inputs)
            return Tape(self._notes, self._held), found
        finally:
            self._notes, self.is_dry = outer

    def note(self, call: Note | KernelCall | Choice) -> None:
        self._notes.append(call)

    def splice(self, tape: Tape) -> None:
        """Note all that is on it."""
        self._notes += tape.notes

    def kept(self, tensor: Tensor) -> Tensor:
        """For calls that are noted: it does not keep the tensor's place from being used again once it has
        died, as it does in the recorded function. The same one for the same tensor."""
        return self._arena.uncounted(tensor)

    def written(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], found: Any) -> Any:
        """What an operation of PyTorch has given, where it will be each time."""
        kind = _kind_of(func)
        if kind == "refused":
            raise NotRepeatable(f"{func} reads numbers")
        if kind == "view":
            return found
        if kind == "allocating":
            return self._arena.like(found)
        args, kwargs = tree_map_only(Tensor, self.kept, (args, kwargs))
        if kind == "in place":
            self.note(partial(func, *args, **kwargs))
            return found
        outs = tree_map_only(Tensor, self._copied, found)
        if func is _SUM and not kwargs and sum_into(outs, *args):
            self._held.append(args)
            return outs
        kept = tree_map_only(Tensor, self.kept, outs)
        into = _out_variant(func)
        if kind == "copying":
            self.note(partial(kept.copy_, args[0]))
        elif into is not None:
            self.note(partial(into, *args, **kwargs, out=kept))
        else:
            self.note(partial(_again, func, args, kwargs, kept))
        return outs

    def _copied(self, tensor: Tensor) -> Tensor:
        return self._arena.like(tensor).copy_(tensor)


def recording() -> Recording | None:
    """The one that runs on this thread."""
    found = current()
    assert found is None or isinstance(found, Recording)
    return found


def repeated(call: Note) -> None:
    """Call it, and in place of all that it does let tapes call it; of a tape all that is on it."""
    own = recording()
    if isinstance(call, Tape) and own is not None:
        own.splice(call)
    elif own is not None:
        own.note(call)
    if own is None or not own.is_dry:
        with noting(None):
            call()


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
    tape, y = own.branch(plain, x, is_dry=True)
    kept_x, kept_y = own.kept(x), own.kept(y)
    instead = Tape([lambda: kept_y.copy_(other(kept_x))])
    if not tape.is_one_call:
        repeated(Choice(state, lambda: tape if is_plain() else instead))
        return y
    # Then so is the whole tape, while all is plain.
    repeated(Choice(state, lambda: None if is_plain() else instead, len(tape.notes)))
    if is_plain():
        repeated(tape)
    else:
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
