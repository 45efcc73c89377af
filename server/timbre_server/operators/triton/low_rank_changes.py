"""ΔW of many low-rank adapters in one launch: ``delta[s] += Σ B A``, over the parts of adapter s.

A program has `OUTPUTS` by `INPUTS` numbers of one adapter's ΔW, and walks along the ranks of its parts, which
are read where they lie; ranks differ, and each number is written once. All in float32.

Checked under Triton's interpreter and on an H200.

Legend: S adapters, A parts of all of them, I in, O out, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from timbre_methods.program import LowRank
from timbre_server.native.formats import format_of, formats_in
from timbre_server.operators.triton.launch import addresses, numbers
from timbre_server.operators.triton.low_rank_kernels import load_factor

OUTPUTS = tl.constexpr(64)
INPUTS = tl.constexpr(64)
RANKS = tl.constexpr(16)


class Factors(NamedTuple):
    """Adapter s has the parts ``starts[s]`` to ``starts[s + 1]``; of each its rank, where A and B are, and in
    which format."""

    starts: Tensor
    rank_A: Tensor
    a_A: Tensor
    a_format_A: Tensor
    b_A: Tensor
    b_format_A: Tensor


@triton.jit
def _add_products(delta, factors, num_outputs, num_inputs, FORMATS: tl.constexpr):
    s = tl.program_id(0)
    o = (tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)).to(tl.int64)[:, None]
    i = (tl.program_id(2) * INPUTS + tl.arange(0, INPUTS))[None, :]
    total = tl.zeros((OUTPUTS, INPUTS), tl.float32)
    for part in range(tl.load(factors.starts + s), tl.load(factors.starts + s + 1)):
        a, a_format = tl.load(factors.a_A + part), tl.load(factors.a_format_A + part)
        b, b_format = tl.load(factors.b_A + part), tl.load(factors.b_format_A + part)
        rank = tl.load(factors.rank_A + part)
        for first in range(0, rank, RANKS):
            r = first + tl.arange(0, RANKS)
            is_in_b = (o < num_outputs) & (r[None, :] < rank)
            b_or = load_factor(b, o * rank + r[None, :], is_in_b, b_format, FORMATS)
            a_at = r.to(tl.int64)[:, None] * num_inputs + i
            is_in_a = (r[:, None] < rank) & (i < num_inputs)
            a_ri = load_factor(a, a_at, is_in_a, a_format, FORMATS)
            total = tl.dot(b_or, a_ri, total, input_precision="ieee")
    at = delta + (s.to(tl.int64) * num_outputs + o) * num_inputs + i
    is_in = (o < num_outputs) & (i < num_inputs)
    tl.store(at, tl.load(at, is_in, 0.0) + total, is_in)


def add_low_rank_changes(parts_S: Sequence[Sequence[LowRank]], delta_SOI: Tensor) -> None:
    """Adds each adapter's ``Σ B A``. ``delta_SOI`` is contiguous."""
    assert delta_SOI.is_contiguous()
    device = delta_SOI.device
    parts = [part for own in parts_S for part in own]
    if not parts:
        return
    a_A, b_A = [part.a_RI.contiguous() for part in parts], [part.b_OR.contiguous() for part in parts]
    a_formats, b_formats = list(map(format_of, a_A)), list(map(format_of, b_A))
    factors = Factors(
        numbers(list(accumulate((len(own) for own in parts_S), initial=0)), device),
        numbers([len(part.a_RI) for part in parts], device),
        addresses(a_A, device),
        numbers(a_formats, device),
        addresses(b_A, device),
        numbers(b_formats, device),
    )
    num_adapters, num_outputs, num_inputs = delta_SOI.shape
    grid = (num_adapters, triton.cdiv(num_outputs, OUTPUTS.value), triton.cdiv(num_inputs, INPUTS.value))
    formats = formats_in([*a_formats, *b_formats])
    _add_products[grid](delta_SOI, factors, num_outputs, num_inputs, FORMATS=formats)
