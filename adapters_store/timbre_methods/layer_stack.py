"""Which of the base's layers run, and in which order: PEFT's ``layer_replication``.

``[[0, 4], [2, 5]]`` runs layers 0 to 3 and then 2 to 4, which share the weights of the first 2 and 3. An
adapter that was trained on such a stack numbers layers by their places in it, so it fits no other, and one
that was trained on each layer once fits no stack. How a base is laid out is chosen when a server starts;
here an adapter's layout is held against it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from timbre_methods.config import first_problem, is_on
from timbre_methods.contract import Reader
from timbre_methods.errors import AdapterMismatch, InvalidConfig
from timbre_methods.prompt_contract import Frame

KEY = "layer_replication"
FLAG = "--layer-replication"

MAX_LAYERS = 4096
MAX_SHOWN_RANGES = 8

_Index = Annotated[int, Field(ge=0, le=MAX_LAYERS)]
_Range = Annotated[list[_Index], Field(min_length=2, max_length=2)]


class _Layout(BaseModel):
    model_config = ConfigDict(strict=True)

    layer_replication: Annotated[list[_Range], Field(max_length=MAX_LAYERS)]


def check_stack(raw_config: Mapping[str, Any], frame: Frame) -> None:
    """Raises `AdapterMismatch` for an adapter of other layers than the frame's, and `InvalidConfig` for a
    layout that is none."""
    asked = _asked_layers(raw_config)
    if not frame.stack and asked == tuple(range(len(frame.attention))):
        asked = ()
    if asked == frame.stack:
        return
    if asked:
        raise AdapterMismatch(
            f"the adapter was trained on the layers {shown_ranges(asked)} ({KEY}), but this base runs "
            f"{shown_ranges(frame.stack)}; serve it by a server that was started with "
            f"{FLAG} {_as_value(asked)}"
        )
    raise AdapterMismatch(
        f"the adapter was trained on each of the base's layers once (its config has no {KEY}), but this base "
        f"runs {shown_ranges(frame.stack)}; serve it by a server that was started without {FLAG}"
    )


def _as_value(layers: Sequence[int]) -> str:
    """For a command line; ranges that are too many to show are in the config."""
    shown = shown_ranges(layers)
    return f"and the ranges of {KEY}" if shown.endswith("...]") else f"'{shown}'"


def without_stack(method: Reader[Any], raw_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config as a method of stacks reads it: the layout, which `check_stack` has read, is left out."""
    return {key: value for key, value in raw_config.items() if not (method.may_be_stacked and key == KEY)}


def shown_ranges(layers: Sequence[int]) -> str:
    """Layers as ranges, the way PEFT writes them: ``[[0, 4], [2, 5]]``; long ones only in their beginning."""
    ranges: list[list[int]] = []
    for layer in layers:
        if ranges and ranges[-1][1] == layer:
            ranges[-1][1] += 1
        else:
            ranges.append([layer, layer + 1])
    if not ranges:
        return "each of its layers once"
    shown = ", ".join(map(str, ranges[:MAX_SHOWN_RANGES]))
    return f"[{shown}{', ...' if len(ranges) > MAX_SHOWN_RANGES else ''}]"


def _asked_layers(raw_config: Mapping[str, Any]) -> tuple[int, ...]:
    """The base's layer at each place of the stack; empty where the config says nothing."""
    value = raw_config.get(KEY)
    if not is_on(value):
        return ()
    try:
        ranges = _Layout.model_validate({KEY: value}).layer_replication
    except ValidationError as error:
        raise InvalidConfig(first_problem(error)) from None
    count = sum(max(0, end - start) for start, end in ranges)
    if count > MAX_LAYERS:
        raise InvalidConfig(
            f"adapter_config.json: {KEY}: found {count} layers, expected at most {MAX_LAYERS}"
        )
    return tuple(chain.from_iterable(range(start, end) for start, end in ranges))
