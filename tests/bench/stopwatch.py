"""Timers around the parts of an engine that is built while they are on: where the time of a step goes.

The parts are wrapped where the engine takes them from, by their public names, which are put back afterwards;
an engine that was built goes on being timed. Time is exclusive: of parts inside parts, each counts its own.
What adapters do is told by operator.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

from torch import Tensor, nn

from timbre_server.adapters import adapted_linear, adapted_model
from timbre_server.adapters.adapted_group import AdaptedGroup
from timbre_server.engine import assembly, attention, fused_rotary, runner
from timbre_server.engine.context import AttentionCall
from timbre_server.engine.core import EngineCore
from timbre_server.engine.decode_tapes import DecodeTapes
from timbre_server.engine.packed_linear import LinearPacker, PackedLinear
from timbre_server.engine.runner import Runner
from timbre_server.native.recording import recording
from timbre_server.operators.contract import (
    Adds,
    Bound,
    Change,
    Meaning,
    Members,
    Operator,
    OwnProduct,
    Standing,
    StandingOperator,
    Uses,
)
from timbre_server.operators.live_rows import LiveRows
from timbre_server.operators.row_table import RowTable

P = ParamSpec("P")
ResultT = TypeVar("ResultT")

LINEAR, ATTENTION, SAMPLING = "linear layers", "attention", "sampling"
MODEL = "the model's rest: norms, rotation, activation"
ADDING, ROWS, SCHEDULING = "adapters: adding to the base", "rows and tables", "scheduling"


class Stopwatch:
    """Seconds by part."""

    def __init__(self, settle: Callable[[], object] = lambda: None) -> None:
        """``settle`` waits for a device that works on by itself."""
        self.counted: dict[str, float] = {}
        """While `counting` was entered last."""
        self._seconds: Counter[str] = Counter()
        self._settle = settle
        self._inner_s: list[float] = []
        """Of the parts that run now, outermost first: what parts inside them have taken."""

    def timed(self, part: str, function: Callable[P, ResultT]) -> Callable[P, ResultT]:
        def run(*args: P.args, **kwargs: P.kwargs) -> ResultT:
            recorded = recording()
            if recorded is not None:
                tape, result = recorded.branch(partial(function, *args, **kwargs))
                recorded.note(self.timed(part, tape))
                return result
            self._settle()
            started = time.perf_counter()
            self._inner_s.append(0.0)
            try:
                result = function(*args, **kwargs)
                self._settle()
                return result
            finally:
                whole_s = time.perf_counter() - started
                self._seconds[part] += whole_s - self._inner_s.pop()
                if self._inner_s:
                    self._inner_s[-1] += whole_s

        return run

    @contextmanager
    def counting(self) -> Iterator[None]:
        self._seconds.clear()
        yield
        self.counted = dict(self._seconds)

    @contextmanager
    def on_engines(self) -> Iterator[None]:
        """Engines that are assembled inside have their parts timed."""
        current = attention.current
        with (
            replaced(adapted_model, "AdaptedGroup", partial(_timed_group, self)),
            replaced(adapted_linear, "added", self.timed(ADDING, adapted_linear.added)),
            replaced(adapted_linear, "round_into", self.timed(ADDING, adapted_linear.round_into)),
            replaced(assembly, "LinearPacker", partial(_TimedPacker, self)),
            replaced(assembly, "Runner", _timed_class(self, Runner, "execute", ROWS)),
            replaced(assembly, "EngineCore", _timed_class(self, EngineCore, "step", SCHEDULING)),
            replaced(attention, "current", lambda: _TimedContext(self, current())),
            replaced(fused_rotary, "current", lambda: _TimedContext(self, current())),
            replaced(runner, "forward", self.timed(MODEL, runner.forward)),
            replaced(runner, "DecodeTapes", _timed_class(self, DecodeTapes, "logits", MODEL)),
            replaced(runner, "sample", self.timed(SAMPLING, runner.sample)),
        ):
            yield


@contextmanager
def replaced(module: ModuleType | type, name: str, value: object) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _timed_class(watch: Stopwatch, cls: type, method: str, part: str) -> Callable[..., Any]:
    def made(*args: Any, **kwargs: Any) -> Any:
        made_object = cls(*args, **kwargs)
        setattr(made_object, method, watch.timed(part, getattr(made_object, method)))
        return made_object

    return made


def _timed_group(
    watch: Stopwatch, paths: Sequence[str], rows: Any, programs: Any, operators: dict[Any, Operator[Any]]
) -> AdaptedGroup:
    def timed(operator: Operator[Any]) -> Operator[Any]:
        if isinstance(operator, StandingOperator):
            return _TimedStandingOperator(watch, operator)
        return _TimedOperator(watch, operator)

    return AdaptedGroup(paths, rows, programs, {part: timed(own) for part, own in operators.items()})


class _TimedPacker(LinearPacker):
    def __init__(self, watch: Stopwatch, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._watch = watch

    def product_of(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        product = super().product_of(module)
        timed = self._watch.timed(LINEAR, product)
        return _TimedProduct(self._watch, product) if isinstance(product, PackedLinear) else timed


class _TimedProduct:
    """A `WideProduct`."""

    def __init__(self, watch: Stopwatch, inner: PackedLinear) -> None:
        self._product = watch.timed(LINEAR, inner.__call__)
        self.in_float32: Callable[[Tensor], Tensor] = watch.timed(LINEAR, inner.in_float32)

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x)


class _TimedContext:
    """An `AttentionContext`."""

    def __init__(self, watch: Stopwatch, inner: Any) -> None:
        self.attend: Callable[[AttentionCall], Tensor] = watch.timed(ATTENTION, inner.attend)


class _TimedOperator(Operator[Any]):
    def __init__(self, watch: Stopwatch, inner: Operator[Any]) -> None:
        self.part = inner.part  # type: ignore[misc]
        self._watch = watch
        self._inner = inner
        self._name = f"adapters: {self.part.__name__}"
        self._bind_name = f"{self._name}, prepared for a table"

    def meaning(self, part: Any, x_TI: Tensor, y_TO: Tensor) -> Meaning:
        return self._inner.meaning(part, x_TI, y_TO)

    def bind(self, uses: Uses[Any], table: RowTable) -> Bound:
        bound = self._watch.timed(self._bind_name, self._inner.bind)(uses, table)
        return _TimedBound(self._watch, self._name, bound)

    def prepared(self, members: Members[Any]) -> Any:
        return self._watch.timed(f"{self._name}, prepared for all tables", self._inner.prepared)(members)

    def bind_prepared(self, adapters: Mapping[int, Any], table: RowTable) -> Bound:
        bound = self._watch.timed(self._bind_name, self._inner.bind_prepared)(adapters, table)
        return _TimedBound(self._watch, self._name, bound)


class _TimedStandingOperator(_TimedOperator, StandingOperator[Any, Any]):
    def __init__(self, watch: Stopwatch, inner: StandingOperator[Any, Any]) -> None:
        super().__init__(watch, inner)
        self._standing = inner.standing

    def standing(self, rows: LiveRows) -> Standing[Any]:
        return _TimedStanding(self._watch, self._name, self._bind_name, self._standing(rows))


class _TimedStanding(Standing[Any]):
    def __init__(self, watch: Stopwatch, name: str, bind_name: str, inner: Standing[Any]) -> None:
        self._admit, self._dismiss = (
            watch.timed(bind_name, inner.admit),
            watch.timed(bind_name, inner.dismiss),
        )
        self._bound_by = watch.timed(bind_name, inner.bound)
        self._timed = partial(_TimedBound, watch, name)
        self._last: tuple[Bound, _TimedBound] | None = None

    def admit(self, slot: int, prepared: Any) -> None:
        self._admit(slot, prepared)

    def dismiss(self, slot: int) -> None:
        self._dismiss(slot)

    def bound(self, table: RowTable) -> Bound:
        """The same one as before for the same one."""
        found = self._bound_by(table)
        if self._last is None or self._last[0] is not found:
            self._last = found, self._timed(found)
        return self._last[1]


class _TimedBound(Bound):
    def __init__(self, watch: Stopwatch, part: str, inner: Bound) -> None:
        self._watch = watch
        self._part = part
        self._inner = inner

    @property
    def reads_input_alone(self) -> bool:
        return self._inner.reads_input_alone

    def input_change(self, member: int, x_TI: Tensor) -> Change | None:
        return self._watch.timed(self._part, self._inner.input_change)(member, x_TI)

    @property
    def takes_any_type(self) -> bool:
        return self._inner.takes_any_type

    @property
    def outlasts_tables(self) -> bool:
        return self._inner.outlasts_tables

    def adds(self, member: int) -> Adds | None:
        own = self._inner.adds(member)
        if own is None:
            return None
        timed = partial(self._watch.timed, self._part)
        sides = [
            None if side is None else replace(side, add=timed(side.add))
            for side in (own.input_change, own.output_change, own.product_change)
        ]
        sums = None if own.sums is None else timed(own.sums)
        return Adds(sides[0], sides[1], sums, sides[2])

    def source(self, x_TI: Tensor) -> Tensor:
        return self._watch.timed(self._part, self._inner.source)(x_TI)

    def sums(self, x_TI: Tensor) -> Sequence[Sequence[Change]]:
        return self._watch.timed(self._part, self._inner.sums)(x_TI)

    def output_change(self, member: int, y_TO: Tensor) -> Change | None:
        return self._watch.timed(self._part, self._inner.output_change)(member, y_TO)

    def product_change(self, member: int, y_TO: Tensor) -> Change | None:
        return self._watch.timed(self._part, self._inner.product_change)(member, y_TO)

    def own_product(self, member: int, x_TI: Tensor) -> OwnProduct | None:
        return self._watch.timed(self._part, self._inner.own_product)(member, x_TI)
