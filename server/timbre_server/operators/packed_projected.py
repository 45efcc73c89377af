"""`PackedProjected`: which `Projected` may be one, and how it is read as one; in plain PyTorch it runs so.

Legend: I in, O out, P and Q sizes of a basis.
"""

from __future__ import annotations

from timbre_methods.packed_parts import PackedProjected
from timbre_methods.program import Basis, Projected
from timbre_server.native.panels import out_of_panels
from timbre_server.operators.projected import ProjectedOperator
from timbre_server.operators.read_as import ReadAsOperator


class PackedProjectedOperator(ReadAsOperator[PackedProjected]):
    part = PackedProjected

    def __init__(self) -> None:
        super().__init__(ProjectedOperator(), unpacked)


def has_whole_sides(part: Projected) -> bool:
    """Whether all blocks of P are one matrix, and all of Q; or one block that all have in common."""
    blocks = len(part.basis.p_NPI), len(part.basis.q_NOQ)
    if part.form != "diagonal":
        return blocks == (1, 1) and part.inner_NI is None and part.outer_NO is None
    num_blocks = len(part.core)
    return blocks == (
        1 if part.inner_NI is not None else num_blocks,
        1 if part.outer_NO is not None else num_blocks,
    )


def unpacked(part: PackedProjected) -> Projected:
    """The same with a basis of its own, in float32."""
    (num_p, p_size, in_features), (num_q, out_features, q_size) = part.basis.p_shape, part.basis.q_shape
    p_PI = out_of_panels(part.basis.p_panels, num_p * p_size, in_features)
    q_OQ = out_of_panels(part.basis.q_panels, out_features, num_q * q_size)
    basis = Basis(
        p_PI.view(num_p, p_size, in_features), q_OQ.view(out_features, num_q, q_size).transpose(0, 1)
    )
    return Projected(part.form, part.core, basis, part.rows_K, part.columns_K, part.inner_NI, part.outer_NO)
