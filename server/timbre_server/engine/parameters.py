"""Modules with bare parameters (experts, their routers), found by how they are called, never by name.

What counts: matrices and stacks of matrices that a module holds itself, where it is no linear layer,
embedding or convolution and has no layers inside. Adapters may change them where one call gives the module
the rows that the module around it read, in their order, and where a row's result does not depend on the other
rows: only then can the rows of different adapters be run apart. Experts that are given their tokens sorted,
or all tokens for each expert, are left out.

Legend: T rows, D features.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from timbre_server.adapters.adapted_parameters import picked, tensors_of
from timbre_server.adapters.groups import ParameterModule
from timbre_server.engine.linears import is_linear
from timbre_server.engine.messages import SiteShape

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Of a result's largest value, for the same rows in a call of fewer."""

Call = tuple[tuple[Any, ...], dict[str, Any]]


class ParameterCalls:
    """How such modules are called in one forward pass, and what the modules around them read."""

    def __init__(self) -> None:
        self._calls: dict[str, list[Call]] = {}

    def watch(self, model: nn.Module) -> list[RemovableHandle]:
        """Notes what a forward of the model calls, until the hooks are removed."""
        hooks = []
        candidates = [path for path, module in model.named_modules() if path and matrices_of(module)]
        for path in dict.fromkeys([*candidates, *(path.rpartition(".")[0] for path in candidates)]):
            note = partial(self._note, path)
            hooks.append(model.get_submodule(path).register_forward_pre_hook(note, with_kwargs=True))
        return hooks

    def _note(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls.setdefault(path, []).append((args, kwargs))

    @torch.inference_mode()
    def found(self, model: nn.Module, num_rows: int) -> tuple[ParameterModule, ...]:
        """Those that adapters may change, in call order, after a pass with so many different tokens."""
        modules = []
        for path, calls in self._calls.items():
            names = matrices_of(module := model.get_submodule(path))
            around = self._calls.get(path.rpartition(".")[0], ())
            if not names or len(calls) != 1 or len(around) != 1:
                continue
            axes = _axes(module, calls[0], around[0], num_rows)
            if axes is not None:
                num_bytes = sum(module.get_parameter(name).nbytes for name in names)
                modules.append(ParameterModule(path, names, *axes, num_bytes))
        return tuple(modules)


def matrices_of(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's own matrices and stacks of them; empty for layers of another kind."""
    known = type(module) in (nn.Linear, Conv1D) or isinstance(module, nn.Embedding | _ConvNd)
    if known or any(True for child in module.children() for _ in child.parameters()):
        return ()
    own = {name: v for name, v in module.named_parameters(recurse=False) if v.ndim in (2, 3)}
    if any(v.dtype not in _FLOATS or _is_lone_slice(module, v) for v in own.values()):
        return ()
    return tuple(own)


def parameter_shapes(facts: ParameterModule, module: nn.Module) -> Iterator[SiteShape]:
    """The sites of one module."""
    for name in facts.names:
        parameter = module.get_parameter(name)
        columns = parameter.shape[-1]
        yield SiteShape(
            f"{facts.path}.{name}",
            parameter.numel() // columns,
            columns,
            has_bias=False,
            kind="parameter",
            is_transposed=_is_transposed(module, parameter),
            slices=parameter.shape[0] if parameter.ndim == 3 else 1,
        )


def parameter_weight_of(parameter: Tensor) -> Tensor:
    """Its slices below each other: a view, where its memory lies so."""
    return parameter.detach().reshape(-1, parameter.shape[-1])


def _is_transposed(module: nn.Module, parameter: Tensor) -> bool:
    """Whether slices are read as [in, out]: what transformers says of its experts, and PEFT goes by."""
    return parameter.ndim == 3 and bool(getattr(module, "is_transposed", False))


def _is_lone_slice(module: nn.Module, parameter: Tensor) -> bool:
    """A stack of one such slice, which PEFT takes for one that is not transposed."""
    return _is_transposed(module, parameter) and len(parameter) == 1


def _axes(
    module: nn.Module, call: Call, around: Call, num_rows: int
) -> tuple[tuple[int | None, ...], tuple[int, ...]] | None:
    """Where the rows are in the arguments and in the results; None where they cannot be told apart."""
    args, kwargs = call
    given = (*args, *kwargs.values())
    axes = tuple(_row_axis(value, num_rows) for value in given)
    read = next((v for v, axis in zip(given, axes, strict=True) if axis is not None), None)
    outside = next((v for v in (*around[0], *around[1].values()) if isinstance(v, Tensor)), None)
    if read is None or outside is None or not _same_rows(read, outside):
        return None
    rows_N = torch.arange(0, num_rows, 2, device=read.device)
    try:
        result = module(*args, **kwargs)
        if is_linear(module) and isinstance(result, Tensor):
            return None
        whole = tensors_of(result)
        some_args, some_kwargs = picked(args, kwargs, axes, rows_N)
        alone = tensors_of(module(*some_args, **some_kwargs))
    except (RuntimeError, ValueError, TypeError, IndexError):
        return None
    result_axes = tuple(axis for v in whole if (axis := _row_axis(v, num_rows)) is not None)
    if len(result_axes) != len(whole):
        return None
    kept = [v.index_select(axis, rows_N) for v, axis in zip(whole, result_axes, strict=True)]
    return (axes, result_axes) if all(map(_is_close, alone, kept)) else None


def _row_axis(value: object, num_rows: int) -> int | None:
    if not isinstance(value, Tensor) or value.ndim == 0:
        return None
    if value.shape[0] == num_rows:
        return 0
    return 1 if value.shape[:2] == (1, num_rows) else None


def _same_rows(v: Tensor, other: Tensor) -> bool:
    return v.shape[-1] == other.shape[-1] and torch.equal(
        v.reshape(-1, v.shape[-1]), other.reshape(-1, other.shape[-1])
    )


def _is_close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape or not found.is_floating_point():
        return found.shape == expected.shape
    largest = float(expected.abs().max())
    return torch.allclose(
        found, expected, rtol=0, atol=_TOLERANCE.get(expected.dtype, _TOLERANCE[torch.float32]) * largest
    )
