"""What parts do at an embedding, whose input is token ids: each row looks its token's change up.

These operators take ids, int64 [T], where the others take features. An id stands for its one-hot row, so
their meaning is that of the same part at a linear layer, without the rows of zeros.

Legend: T rows, N rows of one adapter, R rank, O out, K tokens of a part.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from timbre_methods.program import Dense, LowRank, TokenRows
from timbre_server.operators.by_segment import SumsBySegment
from timbre_server.operators.contract import Bound, Meaning, Operator, Uses
from timbre_server.operators.row_table import RowTable


class LookupLowRank(Operator[LowRank]):
    """``y += B A[:, token]``."""

    part = LowRank

    def meaning(self, part: LowRank, x_TI: Tensor, y_TO: Tensor) -> Meaning:
        return Meaning(change_TO=part.a_RI[:, x_TI].T.float() @ part.b_OR.T.float())

    def bind(self, uses: Uses[LowRank], table: RowTable) -> Bound:
        return SumsBySegment(
            lambda part, ids_N: linear(part.a_RI.index_select(1, ids_N).T.float(), part.b_OR.float()),
            uses,
            table,
        )


class LookupDense(Operator[Dense]):
    """``y += Δ[:, token]``."""

    part = Dense

    def meaning(self, part: Dense, x_TI: Tensor, y_TO: Tensor) -> Meaning:
        return Meaning(change_TO=part.delta_OI[:, x_TI].T)

    def bind(self, uses: Uses[Dense], table: RowTable) -> Bound:
        return SumsBySegment(lambda part, ids_N: part.delta_OI.index_select(1, ids_N).T, uses, table)


class LookupTokenRows(Operator[TokenRows]):
    """``y += rows[k]`` where the token is ``tokens[k]``."""

    part = TokenRows

    def meaning(self, part: TokenRows, x_TI: Tensor, y_TO: Tensor) -> Meaning:
        return Meaning(change_TO=(x_TI[:, None] == part.tokens_K).float() @ part.rows_KO)

    def bind(self, uses: Uses[TokenRows], table: RowTable) -> Bound:
        return SumsBySegment(_token_rows, uses, table)


def _token_rows(part: TokenRows, ids_N: Tensor) -> Tensor:
    at_N = torch.searchsorted(part.tokens_K, ids_N).clamp_(max=len(part.tokens_K) - 1)
    is_listed_N1 = (part.tokens_K[at_N] == ids_N).unsqueeze(1)
    # Not a product with a mask: there a row of another token would meet 0 times infinity.
    return torch.where(is_listed_N1, part.rows_KO[at_N], 0.0)
