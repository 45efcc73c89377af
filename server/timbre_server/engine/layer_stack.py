"""Runs layers of a loaded model again: another stack of the layers it has, which share their weights.

``[[0, 4], [2, 5]]`` stands for layers 0 to 3 and then 2 to 4 again. Each place of the stack is a layer of its
own to everyone who looks at the model by paths (adapters, the KV cache), with parameters that are the very
tensors of the layer it repeats: it costs KV cache, not weights. What a layer is (its window, its kind of
attention, a scale by its depth) is what the repeated one is; only its number is that of its place. The option
is PEFT's ``layer_replication``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from timbre_server.engine.deny_list import family_name
from timbre_server.errors import UnsupportedModel

MAX_LAYERS = 4096

_NUMBER = "layer_idx"
_TIED_TO_DEPTH = ("num_kv_shared_layers", "hidden_size_per_layer_input")
"""Settings of models whose layers are given things by their number: keys of an earlier one, or rows."""

Ranges = Sequence[tuple[int, int]]


def stack_layers(model: PreTrainedModel, ranges: Ranges) -> tuple[int, ...]:
    """Lay the model's decoder layers out anew, in place, before anything else has looked at them.

    The checkpoint's layer at each place; empty, and nothing done, where each stands once and in order.

    Raises:
        UnsupportedModel: a range is out of bounds, or the model's layers cannot be repeated.
    """
    family, text = family_name(model.config), model.config.get_text_config()
    num_layers = int(text.num_hidden_layers)
    stack = _places(family, ranges, num_layers)
    if stack in ((), tuple(range(num_layers))):
        return ()
    path = _path_of_layers(model, family, num_layers)
    depth = next((name for name in _TIED_TO_DEPTH if getattr(text, name, None)), None)
    if depth is not None:
        raise UnsupportedModel(
            f"{family}: layer_replication is not possible: its layers depend on their number ({depth})."
        )
    layers = cast(nn.ModuleList, model.get_submodule(path))
    copies = [_numbered(_sharing(layers[layer]), place) for place, layer in enumerate(stack)]
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.ModuleList(copies))
    _follow(text, stack, num_layers)
    return stack


def _places(family: str, ranges: Ranges, num_layers: int) -> tuple[int, ...]:
    count = 0
    for start, end in ranges:
        if not 0 <= start < end <= num_layers:
            raise UnsupportedModel(
                f"{family}: layer_replication has the range [{start}, {end}]; expected [start, end] with "
                f"0 <= start < end <= {num_layers}, its number of layers."
            )
        count += end - start
    if count > MAX_LAYERS:
        raise UnsupportedModel(
            f"{family}: layer_replication makes {count} layers; expected at most {MAX_LAYERS}."
        )
    return tuple(layer for start, end in ranges for layer in range(start, end))


def _path_of_layers(model: PreTrainedModel, family: str, num_layers: int) -> str:
    """Of the one list whose members know by their number that they are the decoder layers."""
    wanted = list(range(num_layers))
    found: list[str] = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and [_number(layer) for layer in module] == wanted
    ]
    if len(found) != 1:
        raise UnsupportedModel(
            f"{family}: layer_replication is not possible: found {len(found)} lists of {num_layers} modules "
            "with a layer_idx in each, expected one."
        )
    return found[0]


def _number(layer: nn.Module) -> object:
    """The ``layer_idx`` within a layer; None where there is none, or several that differ."""
    numbers = {module.layer_idx for module in layer.modules() if hasattr(module, "layer_idx")}
    return numbers.pop() if len(numbers) == 1 else None


def _sharing(module: nn.Module) -> nn.Module:
    """A module of the same parameters, buffers and settings, whose submodules can be replaced by others."""
    copied = module.__new__(type(module))
    copied.__dict__ = {
        name: value.copy() if isinstance(value, dict) else value for name, value in vars(module).items()
    }
    for name, child in module.named_children():
        copied._modules[name] = _sharing(child)
    return copied


def _numbered(layer: nn.Module, number: int) -> nn.Module:
    for module in layer.modules():
        if hasattr(module, _NUMBER):
            setattr(module, _NUMBER, number)
    return layer


def _follow(text: PreTrainedConfig, stack: Sequence[int], num_layers: int) -> None:
    """Let the configuration say of each place what it said of the layer that stands there."""
    for name, value in list(vars(text).items()):
        if "layer" in name and isinstance(value, list | tuple) and len(value) == num_layers:
            setattr(text, name, [value[layer] for layer in stack])
    text.num_hidden_layers = len(stack)
