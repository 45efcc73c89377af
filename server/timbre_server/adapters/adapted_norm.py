"""A norm of the base that applies, to each row, the adapters that the row table names.

A norm is ``w ∘ x̂ + b``, or ``(1 + w) ∘ x̂`` in some families, of the normalised x̂. Adapters change w and b,
so what they add needs x̂ alone. A copy of the module computes it, in float32, with a weight under which it
gives x̂: no formula of any family is written here.

Legend: T rows, D features.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from timbre_server.adapters.adapted_group import AdaptedGroup
from timbre_server.adapters.added import added, rows_of
from timbre_server.native.recording import either
from timbre_server.operators.contract import Change

_TOLERANCE = 1e-4
"""Relative, for the float32 check of what a norm is."""


class AdaptedNorm(nn.Module):
    """One norm, in the place of the base's own, which still computes the base's output."""

    def __init__(self, base: nn.Module, group: AdaptedGroup, norm: Callable[[Tensor], Tensor]):
        """``norm`` computes what ``base`` does, by whatever means is fastest."""
        super().__init__()
        self.base = base
        self._norm = norm
        self._group = group
        with torch.no_grad():
            self._normed = _Normed(base)

    @property
    def weight(self) -> Tensor:
        """The base layer's own, as stored: models look at its dtype and device."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.base, "bias", None)

    @property
    def is_fused(self) -> bool:
        """Whether the base's output comes by another way than its own."""
        return self._norm is not self.base

    def forward(self, x: Tensor) -> Tensor:
        return either(self._group.state, self._group.acts_on_none, self._norm, self._adapted, x)

    def _adapted(self, x: Tensor) -> Tensor:
        y, bounds = self._norm(x), self._group.bound()
        normed_TD = rows_of(self._normed(x))
        changes: list[Change] = []
        for bound in bounds:
            changes += [change for own in bound.sums(normed_TD) for change in own]
            change = bound.output_change(0, rows_of(y))
            changes += [] if change is None else [change]
        return added(y, changes) if changes else y


class _Normed:
    """A norm's x̂, in float32: a copy of the module with a weight that leaves x̂ as it is, and no bias."""

    def __init__(self, module: nn.Module) -> None:
        self._module = copy.deepcopy(module).float()
        weight, bias = self._module.weight, getattr(self._module, "bias", None)
        assert isinstance(weight, Tensor)
        weight.zero_()
        if bias is not None:
            bias.zero_()
        x_1D = torch.arange(1, len(weight) + 1, dtype=torch.float32, device=weight.device).unsqueeze(0)
        self.has_unit_offset = bool(self(x_1D).any())
        """Whether it multiplies by 1 + w: with w = 0 it does not give zeros."""
        if not self.has_unit_offset:
            weight.fill_(1.0)

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self._module(x.float())
        return y


@torch.inference_mode()
def is_norm_of(module: nn.Module, x: Tensor) -> bool:
    """Whether a module does ``w ∘ x̂ + b`` (or with 1 + w) to x, and has no other parameters.

    What cannot be run in float32 is no norm.
    """
    own = dict(module.named_parameters(recurse=False))
    if "weight" not in own or own.keys() - {"weight", "bias"} or any(True for _ in module.children()):
        return False
    if any(v.shape != x.shape[-1:] or not v.is_floating_point() for v in own.values()):
        return False
    try:
        found: Tensor = copy.deepcopy(module).float()(x.float())
        normed = _Normed(module)
        bias_D = own["bias"].float() if "bias" in own else 0.0
        expected = (own["weight"].float() + normed.has_unit_offset) * normed(x) + bias_D
    except RuntimeError:
        return False
    if found.shape != expected.shape:
        return False
    return torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE * float(expected.abs().max()))
