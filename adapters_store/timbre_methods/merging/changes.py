"""What one adapter adds to the weights of its sites, as factors or as a whole matrix; else why it cannot be.

A merge works on ``ΔW``. Parts that stand for one are read by their meaning in `timbre_methods.program`; what
scales or turns inputs and outputs is coupled to the base's weights and has none, so it is refused by name.

Legend: I in features, O out features, R rank, as in `timbre_methods.program`; F = frequencies, n = a length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from timbre_methods.errors import AdapterMismatch
from timbre_methods.program import (
    AdapterProgram,
    Block,
    Circulant,
    Dense,
    Kronecker,
    LowRank,
    Part,
    Places,
    Projected,
    Sparse,
    Spectral,
    owned_tensors,
)


@dataclass(frozen=True, slots=True, eq=False)
class Ingredient:
    """One adapter that a merge is made of, compiled, by the name that messages call it."""

    label: str
    method: str
    program: AdapterProgram
    weight: float = 1.0
    config: Mapping[str, Any] = field(default_factory=dict)
    """Its ``adapter_config.json``."""


def check_ingredient(found: Ingredient) -> None:
    """Raises `AdapterMismatch` for an adapter that is more than a change of weights."""
    program = found.program
    if program.virtual_tokens or program.attention:
        what = "adds virtual tokens or attention"
    elif program.invocation_tokens:
        what = "acts only from its invocation tokens on"
    else:
        return
    raise AdapterMismatch(f"{found.label} ({found.method}) {what}, which no merge of weights can say")


def parts_at(found: Ingredient, path: str) -> tuple[Part, ...]:
    """The parts at a site, all of them changes of its weight.

    Raises `AdapterMismatch`, naming the adapter, its method, the site and the first part that is none.
    """
    parts = found.program.sites[path]
    for part in parts:
        where = f"{found.label} ({found.method}) at {path}"
        if not isinstance(part, Additive):
            raise AdapterMismatch(
                f"{where} has a {type(part).__name__} part, which is no change of the weight alone; mix it "
                "with kind 'linear', which serves every method"
            )
        if any(tensor.is_meta for tensor in owned_tensors(part)):
            raise AdapterMismatch(
                f"{where} is made of the base's own weights when it is loaded; mix it with kind 'linear'"
            )
    return parts


Additive = LowRank | Dense | Sparse | Block | Kronecker | Projected | Spectral | Circulant


def factors_at(found: Ingredient, path: str) -> tuple[Tensor, Tensor]:
    """``A`` [R, I] and ``B`` [O, R], every scale in B: exactly the adapter's ΔW at a site.

    Raises `AdapterMismatch` for an adapter that has no such form there.
    """
    pairs = [as_factors(part) for part in parts_at(found, path)]
    whole = [pair for pair in pairs if pair is not None]
    if len(whole) < len(pairs):
        raise AdapterMismatch(
            f"{found.label} ({found.method}) has no low-rank form at {path}, and this kind needs one"
        )
    return torch.cat([a_RI for a_RI, _ in whole]), torch.cat([b_OR for _, b_OR in whole], dim=1)


def as_factors(part: Part) -> tuple[Tensor, Tensor] | None:
    """A part's ΔW as A and B where it has them; None where it is no product of thin matrices."""
    if isinstance(part, LowRank):
        return part.a_RI, part.b_OR
    if not isinstance(part, Projected) or part.form == "sparse":
        return None
    p_NPI, q_NOQ = part.basis.p_NPI, part.basis.q_NOQ
    scaled_NOP = q_NOQ @ part.core if part.form == "dense" else q_NOQ * part.core.unsqueeze(1)
    p_NPI = p_NPI.expand(len(scaled_NOP), -1, -1)
    if part.inner_NI is not None:
        p_NPI = p_NPI * part.inner_NI.unsqueeze(1)
    if part.outer_NO is not None:
        scaled_NOP = scaled_NOP * part.outer_NO.unsqueeze(2)
    return p_NPI.flatten(0, 1), scaled_NOP.transpose(0, 1).flatten(1)


def delta_at(found: Ingredient, path: str, shape: tuple[int, int]) -> Tensor:
    """ΔW [O, I] of an adapter at a site, float32, a tensor of its own. Raises as `parts_at`."""
    delta_OI = torch.zeros(shape)
    for part in parts_at(found, path):
        delta_OI += _delta(part, shape)
    return delta_OI


def _delta(part: Part, shape: tuple[int, int]) -> Tensor:
    factors = as_factors(part)
    if factors is not None:
        return factors[1] @ factors[0]
    if isinstance(part, Dense):
        return part.delta_OI
    if isinstance(part, Sparse):
        counts = part.row_ends.diff()
        rows_N = torch.repeat_interleave(torch.arange(shape[0]), counts)
        return torch.zeros(shape).index_put((rows_N, part.columns_N.long()), part.values_N)
    if isinstance(part, Block):
        side = 1 if part.side == "input" else 0
        return torch.zeros(shape).index_add(side, part.index_N, part.block)
    if isinstance(part, Kronecker):
        w2_KN = part.w2_KR if part.w2_RN is None else part.w2_KR @ part.w2_RN
        return torch.kron(part.w1_LM, w2_KN)
    if isinstance(part, Projected):
        return _sparse_core(part)
    if isinstance(part, Circulant):
        return _circulant(part)
    assert isinstance(part, Spectral)
    return _spectral(part)


def _sparse_core(part: Projected) -> Tensor:
    """One block, between the two matrices of the basis."""
    assert part.rows_K is not None
    assert part.columns_K is not None
    p_PI, q_OQ = part.basis.p_NPI[0], part.basis.q_NOQ[0]
    core_QP = torch.zeros(q_OQ.shape[1], p_PI.shape[0])
    core_QP.index_put_((part.rows_K, part.columns_K), part.core, accumulate=True)
    delta_OI = q_OQ @ core_QP @ p_PI
    if part.inner_NI is not None:
        delta_OI = delta_OI * part.inner_NI[0]
    return delta_OI if part.outer_NO is None else delta_OI * part.outer_NO[0].unsqueeze(1)


def _circulant(part: Circulant) -> Tensor:
    """Block (m, n) has ``taps[(i - j) mod b]`` in row i and column j."""
    b = part.block_size
    taps_MNb = torch.fft.irfft(torch.view_as_complex(part.spectrum_MNK2), n=b)
    turn = (torch.arange(b).unsqueeze(1) - torch.arange(b)) % b
    blocks_MbNb: Tensor = taps_MNb[..., turn].transpose(1, 2)
    return blocks_MbNb.flatten(2).flatten(0, 1)


def _spectral(part: Spectral) -> Tensor:
    """``Re(T_Oᵀ S T_I)``: as many rows and columns of the transforms as there are coefficients."""
    outer_NO = _transform(part.places, part.places.rows_N, part.places.out_features)
    inner_NI = _transform(part.places, part.places.columns_N, part.places.in_features)
    delta_OI = (outer_NO * part.c_N.to(outer_NO.dtype).unsqueeze(1)).T @ inner_NI
    return (delta_OI.real if delta_OI.is_complex() else delta_OI).float()


def _transform(places: Places, frequencies_N: Tensor, n: int) -> Tensor:
    """The rows ``T_n[frequencies]`` [N, n], in double precision; `Spectral` has the formulas."""
    v, p = frequencies_N.unsqueeze(1), torch.arange(n)
    if places.transform == "dct":
        rows = (math.pi / (2 * n) * (v * (2 * p + 1) % (4 * n)).double()).cos() * math.sqrt(2 / n)
        return torch.where(v == 0, rows / math.sqrt(2), rows)
    if places.transform == "dwt":
        low = torch.tensor(places.low_pass, dtype=torch.float64)
        signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(len(low) // 2)
        half = (n + len(low) - 1) // 2
        tap = p + len(low) - 2 - 2 * (v % half)
        place = tap.clamp(0, len(low) - 1)
        taps = torch.where(v < half, low[place], (signs * low.flip(0))[place])
        return torch.where(tap == place, taps, 0.0)
    angle = 2 * math.pi * (v * p % n).double() / n
    if places.transform == "hartley":
        return (angle.cos() + angle.sin()) / math.sqrt(n)
    return torch.polar(torch.full_like(angle, 1 / n), angle)
