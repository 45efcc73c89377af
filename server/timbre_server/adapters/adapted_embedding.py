"""An embedding of the base that applies, to each row, the adapters that the row table names.

A model may scale the rows that it looks up (Gemma by the root of its width): then the scale is a part of the
embedding, and what adapters add to the table is scaled, too. Its value is asked of the module, not known by
name. The ids are the step's tokens, one a row.

Legend: T rows of the batch, O out features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from timbre_server.adapters.adapted_group import AdaptedGroup
from timbre_server.adapters.added import added, rows_of
from timbre_server.native.recording import either
from timbre_server.operators.contract import Change


class AdaptedEmbedding(nn.Module):
    """One embedding, in the place of the base's own, which still looks the base's rows up."""

    def __init__(self, base: nn.Module, group: AdaptedGroup):
        super().__init__()
        self.base = base
        self._group = group
        self._scale = scale_of(base)

    @property
    def weight(self) -> Tensor:
        """The base layer's own, as stored: models look at its dtype and device."""
        return self.base.weight  # type: ignore[return-value]

    def forward(self, token_ids: Tensor) -> Tensor:
        return either(self._group.state, self._group.acts_on_none, self.base, self._adapted, token_ids)

    def _adapted(self, token_ids: Tensor) -> Tensor:
        y: Tensor = self.base(token_ids)
        changes: list[Change] = []
        for bound in self._group.bound():
            for own in bound.sums(token_ids.flatten()):
                changes += [Change(change.values_NO * self._scale, change.rows_N) for change in own]
            change = bound.output_change(0, rows_of(y))
            changes += [] if change is None else [change]
        return added(y, changes) if changes else y


def scale_of(module: nn.Module) -> float:
    """By what an embedding multiplies the rows of its table, in float32."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    table_V1 = torch.ones(len(weight), 1, dtype=torch.float32, device=weight.device)
    ids_11 = torch.zeros(1, 1, dtype=torch.int64, device=weight.device)
    with torch.inference_mode():
        return float(functional_call(module, {"weight": table_V1}, (ids_11,)))
