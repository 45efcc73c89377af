"""`Projected`: a small core in a shared basis: ``y += Σ_n outer_n ∘ Q_n (S_n (P_n (inner_n ∘ x)))``.

Legend: T rows, I in, O out, N blocks, P and Q sizes of the basis.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from timbre_methods.program import Projected
from timbre_server.operators.by_segment import SumsBySegment
from timbre_server.operators.contract import Bound, Meaning, Operator, Uses
from timbre_server.operators.row_table import RowTable


class ProjectedOperator(Operator[Projected]):
    part = Projected

    def meaning(self, part: Projected, x_TI: Tensor, y_TO: Tensor) -> Meaning:
        return Meaning(change_TO=_apply(part, x_TI))

    def bind(self, uses: Uses[Projected], table: RowTable) -> Bound:
        return SumsBySegment(_apply, uses, table)


def _apply(part: Projected, x_TI: Tensor) -> Tensor:
    x_NTI = x_TI.unsqueeze(0) if part.inner_NI is None else x_TI * part.inner_NI.unsqueeze(1)
    z_NTP = x_NTI @ part.basis.p_NPI.transpose(1, 2)
    if part.form == "diagonal":
        z_NTQ = z_NTP * part.core.unsqueeze(1)
    elif part.form == "dense":
        z_NTQ = linear(z_NTP, part.core)
    else:
        assert part.rows_K is not None
        assert part.columns_K is not None
        z_NTQ = torch.zeros(1, len(x_TI), part.basis.q_NOQ.shape[2], device=x_TI.device)
        z_NTQ.index_add_(2, part.rows_K, z_NTP[:, :, part.columns_K] * part.core)
    y_NTO = z_NTQ @ part.basis.q_NOQ.transpose(1, 2)
    if part.outer_NO is not None:
        y_NTO = y_NTO * part.outer_NO.unsqueeze(1)
    return y_NTO.sum(0)
