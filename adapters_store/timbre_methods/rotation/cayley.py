"""Rotations from skew-symmetric matrices, as the methods of this package store them.

Legend: N matrices, B their size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from timbre_methods.errors import InvalidTensors


def cayley(skew_NBB: Tensor, name: str) -> Tensor:
    """``(I − S)(I + S)⁻¹`` of each matrix. Solvable, as S has no real eigenvalue but 0, unless its values are
    so large that the 1 is rounded away. Raises `InvalidTensors` then, for the tensor of this name."""
    eye_BB = torch.eye(skew_NBB.shape[-1], dtype=skew_NBB.dtype, device=skew_NBB.device)
    solved = torch.linalg.solve_ex(eye_BB + skew_NBB, eye_BB - skew_NBB, left=False)
    if not skew_NBB.is_meta and solved.info.any():
        raise InvalidTensors(
            f"{name}: found values up to {float(skew_NBB.abs().max()):.3g}, too large for a rotation to be "
            "solved for in float32; train it with smaller values"
        )
    rotation_NBB: Tensor = solved.result
    return rotation_NBB


def cayley_series(skew_NBB: Tensor, terms: int) -> Tensor:
    """``I + 2S + 2S² + … + S^(t−1)``, t terms: the start of the series of ``(I + S)(I − S)⁻¹``.

    One term is I, two are I + 2S. Three terms are read as four: ``I + 2S + 2S² + S³``.
    """
    eye_BB = torch.eye(skew_NBB.shape[-1], dtype=skew_NBB.dtype, device=skew_NBB.device)
    if terms < 3:
        return eye_BB + 2 * (terms - 1) * skew_NBB
    sum_NBB = 2 * skew_NBB + eye_BB
    power_NBB = skew_NBB
    last = max(terms, 4) - 1
    for exponent in range(2, last + 1):
        power_NBB = power_NBB @ skew_NBB
        sum_NBB += power_NBB if exponent == last else 2 * power_NBB
    return sum_NBB
