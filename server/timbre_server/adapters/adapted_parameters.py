"""A module of the base with bare parameters, such as the experts of a layer or their router.

What such a module computes is its own affair, so an adapter is a change of its parameters, and the module
runs as it is, with changed values in their place. Rows of the same mix run together: one call for each
distinct mix of the step, with ``W + Σ w · change``, and one with the base's own values. Rows that no adapter
touches are taken from a call with all rows, so that they have the bits of a step without adapters.

Beside the base the changed parameters of one module and one mix are in memory at a time, in the base's dtype,
and a piece of `CELLS_AT_ONCE` values in float32.

Legend: T rows of the batch, N rows of one mix, E slices, O rows and I columns of a slice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from timbre_methods.program import Part, SlicedLowRank
from timbre_server.adapters.active_rows import ActiveRows
from timbre_server.adapters.adapted_group import Programs
from timbre_server.adapters.groups import ParameterModule
from timbre_server.operators.row_table import Pairs, RowTable

CELLS_AT_ONCE = 2**25
"""Values of a parameter that are summed together in float32; a slice at least."""


class AdaptedParameters(nn.Module):
    """One such module, in the place of the base's own, which still does all the work."""

    def __init__(self, base: nn.Module, facts: ParameterModule, rows: ActiveRows, programs: Programs) -> None:
        super().__init__()
        self.base = base
        self.paths = tuple(f"{facts.path}.{name}" for name in facts.names)
        self._facts = facts
        self._rows = rows
        self._programs = programs
        self._bound_table: RowTable | None = None
        self._mixes: Mapping[Pairs, Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        """The base module's own attributes, too: models may look at them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        mixes = self._mixes_of_step()
        if not any(mixes):
            return self.base(*args, **kwargs)
        if len(mixes) == 1:
            return self._adapted(next(iter(mixes)), args, kwargs)
        results = [self._of_rows(mix, rows_N, args, kwargs) for mix, rows_N in mixes.items()]
        order_T = torch.cat(list(mixes.values())).argsort()
        pieces = zip(*map(tensors_of, results), strict=True)
        joined = tuple(
            torch.cat(same, axis).index_select(axis, order_T)
            for axis, same in zip(self._facts.result_axes, pieces, strict=True)
        )
        return joined[0] if isinstance(results[0], Tensor) else joined

    def forget(self) -> None:
        """Drop what was prepared for a table; called when a slot changes hands."""
        self._bound_table = None
        self._mixes = {}

    def _mixes_of_step(self) -> Mapping[Pairs, Tensor]:
        table = self._rows.table
        if table is None:
            return {}
        if self._bound_table is not table:
            acting = [
                slot for slot in table.slots if any(p in self._programs[slot].sites for p in self.paths)
            ]
            self._mixes = table.by_mix(acting) if acting else {}
            self._bound_table = table
        return self._mixes

    def _of_rows(self, mix: Pairs, rows_N: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the module gives for the rows of one mix."""
        if mix:
            return self._adapted(mix, *picked(args, kwargs, self._facts.axes, rows_N))
        whole = self.base(*args, **kwargs)
        own = tuple(
            v.index_select(axis, rows_N)
            for v, axis in zip(tensors_of(whole), self._facts.result_axes, strict=True)
        )
        return own[0] if isinstance(whole, Tensor) else own

    def _adapted(self, mix: Pairs, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        values = {}
        for name in self._facts.names:
            path = f"{self._facts.path}.{name}"
            parts = [(part, w) for slot, w in mix for part in self._programs[slot].sites.get(path, ())]
            if parts:
                values[name] = changed(self.base.get_parameter(name), parts)
        return functional_call(self.base, values, args, kwargs)


def changed(parameter: Tensor, parts: Sequence[tuple[Part, float]]) -> Tensor:
    """``W + Σ w B A`` in a tensor of its own, summed in float32 and rounded once."""
    w_EOI = parameter.unsqueeze(0) if parameter.ndim == 2 else parameter
    changed_EOI = torch.empty_like(w_EOI)
    step = max(1, CELLS_AT_ONCE // w_EOI[0].numel())
    for start in range(0, len(w_EOI), step):
        some = slice(start, start + step)
        sum_EOI = w_EOI[some].to(torch.float32, copy=True)
        for part, weight in parts:
            assert isinstance(part, SlicedLowRank), "only these parts are at home in parameters"
            sum_EOI.baddbmm_(part.b_EOR[some], part.a_ERI[some], alpha=weight)
        changed_EOI[some] = sum_EOI
    return changed_EOI.view_as(parameter)


def picked(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], axes: Sequence[int | None], rows_N: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with some of its rows alone."""
    some = [
        v if axis is None else v.index_select(axis, rows_N)
        for v, axis in zip((*args, *kwargs.values()), axes, strict=True)
    ]
    return tuple(some[: len(args)]), dict(zip(kwargs, some[len(args) :], strict=True))


def tensors_of(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a call gave, as a tuple in any case."""
    return (result,) if isinstance(result, Tensor) else result
