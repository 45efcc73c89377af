"""The weights that a mix of adapters would leave in the base, had it been trained in: ``W + Σ w ΔW``.

They are tensors of their own. The base's weights are never written to: other rows, loads and derivations
read them meanwhile, layers may share them (tied heads, repeated layers), and nothing has to be restored.

Legend: I in features, O out features.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from timbre_methods.contract import Site
from timbre_methods.program import AdapterProgram, Diagonal, Part
from timbre_server.operators.catalogue import all_operators
from timbre_server.operators.materialise import is_change_of_weight, materialise

WeightedPrograms = Sequence[tuple[AdapterProgram, float]]


def refusal(program: AdapterProgram, linear_paths: Collection[str]) -> str | None:
    """Why an adapter has no merged weights; None where it has."""
    if program.prompt is not None or program.attention:
        return "it adds virtual tokens or acts in attention, which no weights can say"
    for path, parts in program.sites.items():
        if path not in linear_paths:
            return f"it changes {path}, which is no plain linear layer"
        for part in parts:
            if not is_change_of_weight(part) and _shift_of(part) is None:
                kind = type(part).__name__
                return f"at {path} it has a {kind} part, which is no change of the weight and the bias alone"
    return None


def merged_weights(site: Site, mix: WeightedPrograms) -> tuple[Tensor, Tensor | None]:
    """The weight [O, I] and the bias [O] of a mix at a site, summed in float32 and rounded once to the base's
    dtype; contiguous, on its device."""
    weight_OI = site.weight_OI.to(torch.float32, copy=True)
    bias_O = None if site.bias_O is None else site.bias_O.to(torch.float32, copy=True)
    operators = all_operators()
    for program, weight in mix:
        parts = program.sites.get(site.path, ())
        changes = [part for part in parts if is_change_of_weight(part)]
        if changes:
            (delta_OI,) = materialise([changes], (site.out_features, site.in_features), operators)
            weight_OI.add_(delta_OI, alpha=weight)
        for shift_O in (shift_O for part in parts if (shift_O := _shift_of(part)) is not None):
            bias_O = torch.zeros_like(shift_O) if bias_O is None else bias_O
            bias_O.add_(shift_O, alpha=weight)
    dtype = site.weight_OI.dtype
    return weight_OI.to(dtype).contiguous(), None if bias_O is None else bias_O.to(dtype)


def _shift_of(part: Part) -> Tensor | None:
    """What a part adds to the bias, where it does nothing else."""
    if isinstance(part, Diagonal) and part.side == "output" and bool((part.gain == 1).all()):
        return part.shift
    return None
