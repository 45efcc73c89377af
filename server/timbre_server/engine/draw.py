"""Drawing one token a row by inverse CDF, and greedy choice: rows of numbers in, token ids out.

Weights are ``exp((logit - max) / temperature)`` in float32: the most likely token weighs 1. The vocabulary
is never sorted: top-p finds the bin of weights in which its mass is reached by one histogram over all
tokens, and sorts that bin alone. What is kept is a mask, and one uniform number inverts the cumulative
weight of what is kept, in token order. Sums are over all tokens and in float64.

Each row is computed from its own numbers alone. It knows no requests, seeds or log-probabilities.

Legend: N rows, V vocabulary, C candidates, B blocks of `BLOCK` tokens, K tokens of a block, H histogram bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

BLOCK = 256
BIN_SHIFT = 18
"""Bins are the leading bits of a float32: 32 an octave."""
NUM_BINS = (0x3F800000 >> BIN_SHIFT) + 1
"""Weights are at most 1.0, which is 0x3F800000."""


@dataclass(frozen=True, slots=True)
class Truncation:
    """For each row: at most how many tokens (0: no limit), up to which mass, from which share of the best."""

    top_k_N: Tensor
    top_p_N: Tensor
    min_p_N: Tensor


def greedy(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's highest logit, and the lowest token id that has it. A row with NaN gives NaN.

    Two levels, since a maximum without its place is some twenty times faster than torch's argmax.
    """
    blocks_NBK = _blocks(logits_NV, float("-inf"))
    best_NB = blocks_NBK.amax(2)
    block_N1 = best_NB.argmax(1, keepdim=True)
    inside_NK = blocks_NBK.gather(1, block_N1[:, :, None].expand(-1, -1, BLOCK))[:, 0]
    token_N = block_N1[:, 0] * BLOCK + inside_NK.argmax(1)
    return best_NB.amax(1), token_N


def weights(logits_NV: Tensor, best_N: Tensor, temperature_N: Tensor) -> Tensor:
    """``exp((logit - best) / temperature)``, a new tensor.

    A temperature above 0 may be less than float32 can tell from 0, and 0 / 0 is no weight.
    """
    least = torch.finfo(torch.float32).tiny
    return logits_NV.sub(best_N[:, None]).div_(temperature_N.clamp(min=least)[:, None]).exp_()


def draw(weight_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """The first token, in token order, at which the normalised cumulative weight exceeds ``uniform``."""
    blocks_NBK = _blocks(weight_NV, 0.0)
    share_NB = blocks_NBK.sum(2, dtype=torch.float64)
    block_N1, left_N = _invert(share_NB, uniform_N)
    inside_NK = blocks_NBK.gather(1, block_N1[:, :, None].expand(-1, -1, BLOCK))[:, 0].double()
    place_N1, _ = _invert(inside_NK, left_N)
    return block_N1[:, 0] * BLOCK + place_N1[:, 0]


def truncate(weight_NV: Tensor, cut: Truncation) -> None:
    """Set to 0, in place, the weight of what top-k, then top-p of its mass, then min-p cut off.

    Tokens that weigh the same as the k-th stay. Top-p keeps the likeliest tokens (ties in token order)
    whose predecessors have less than ``top_p`` of the mass; the likeliest token always stays.
    """
    _keep_top_k(weight_NV, cut.top_k_N)
    rows = (cut.top_p_N < 1).nonzero()[:, 0]
    if rows.numel() == weight_NV.shape[0]:
        _keep_top_p(weight_NV, cut.top_p_N)
    elif rows.numel():
        part_NV = weight_NV[rows]
        _keep_top_p(part_NV, cut.top_p_N[rows])
        weight_NV[rows] = part_NV
    if bool(cut.min_p_N.any()):
        _keep_from(weight_NV, cut.min_p_N.clamp(max=1.0)[:, None])


def ranked(value_NV: Tensor, is_in_NV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row the values that are in: largest first, ties in token order; their token ids; how many.

    Rows with fewer than the fullest have anything behind them.
    """
    row_M, id_M = is_in_NV.nonzero(as_tuple=True)
    size_N = torch.bincount(row_M, minlength=value_NV.shape[0])
    place_M = torch.arange(row_M.shape[0], device=row_M.device) - (size_N.cumsum(0) - size_N)[row_M]
    value_NC = value_NV.new_full((value_NV.shape[0], int(size_N.max())), float("-inf"))
    id_NC = torch.zeros(value_NC.shape, dtype=torch.int64, device=row_M.device)
    value_NC[row_M, place_M] = value_NV[row_M, id_M]
    id_NC[row_M, place_M] = id_M
    sorted_NC, order_NC = value_NC.sort(dim=1, descending=True, stable=True)
    return sorted_NC, id_NC.gather(1, order_NC), size_N


def _keep_top_k(weight_NV: Tensor, top_k_N: Tensor) -> None:
    largest = min(int(top_k_N.max()), weight_NV.shape[1])
    if largest > 0:
        best_NC = weight_NV.topk(largest, dim=1).values
        kth_N1 = best_NC.gather(1, (top_k_N.clamp(1, largest) - 1)[:, None])
        _keep_from(weight_NV, kth_N1.where(top_k_N[:, None] > 0, 0.0))


def _keep_top_p(weight_NV: Tensor, top_p_N: Tensor) -> None:
    num_rows, device = weight_NV.shape[0], weight_NV.device
    bin_NV = weight_NV.view(torch.int32) >> BIN_SHIFT
    flat_NV = bin_NV + (torch.arange(num_rows, device=device) * NUM_BINS)[:, None]
    mass_H = torch.bincount(flat_NV.flatten(), weight_NV.flatten().double(), num_rows * NUM_BINS)
    from_top_NH = mass_H.view(num_rows, NUM_BINS).flip(1).cumsum(1)
    target_N1 = (top_p_N * from_top_NH[:, -1])[:, None]
    num_whole_N1 = (from_top_NH < target_N1).sum(1, keepdim=True)
    above_N1 = from_top_NH.gather(1, (num_whole_N1 - 1).clamp(min=0)).where(num_whole_N1 > 0, 0.0)
    edge_N1 = (NUM_BINS - 1 - num_whole_N1).to(torch.int32)
    weight_NC, id_NC, size_N = ranked(weight_NV, bin_NV == edge_N1)
    weight64_NC = weight_NC.double()
    is_cut_NC = above_N1 + weight64_NC.cumsum(1) - weight64_NC >= target_N1
    rank_C = torch.arange(weight_NC.shape[1], device=device)
    is_cut_NC &= (rank_C < size_N[:, None]) & ((rank_C > 0) | (num_whole_N1 > 0))
    _keep_from(weight_NV, (edge_N1 << BIN_SHIFT).view(torch.float32))
    row_M, place_M = is_cut_NC.nonzero(as_tuple=True)
    weight_NV[row_M, id_NC[row_M, place_M]] = 0.0


def _keep_from(weight_NV: Tensor, floor_N1: Tensor) -> None:
    """Set to 0 what weighs less than the floor. In floats: on the CPU torch is slow in mixing in booleans."""
    below_N1 = torch.nextafter(floor_N1, torch.full_like(floor_N1, -1.0))
    weight_NV.mul_((weight_NV - below_N1).sign_().clamp_(min=0.0))


def _invert(share_NC: Tensor, uniform_N: Tensor) -> tuple[Tensor, Tensor]:
    """The first column at which the cumulative share exceeds ``uniform`` of the whole, as [N, 1], and how
    far into that column's share it lies, in [0, 1]. A column without a share is never the one."""
    upto_NC = share_NC.cumsum(1)
    whole_N = upto_NC[:, -1]
    below_whole_N = torch.nextafter(whole_N, torch.zeros_like(whole_N))
    target_N1 = torch.minimum(uniform_N * whole_N, below_whole_N)[:, None]
    column_N1 = (upto_NC <= target_N1).sum(1, keepdim=True)
    share_N1 = share_NC.gather(1, column_N1)
    into_N1 = (target_N1 - (upto_NC.gather(1, column_N1) - share_N1)) / share_N1
    return column_N1, into_N1[:, 0].clamp(0.0, 1.0)


def _blocks(value_NV: Tensor, fill: float) -> Tensor:
    missing = -value_NV.shape[1] % BLOCK
    padded_NV = nn.functional.pad(value_NV, (0, missing), value=fill) if missing else value_NV
    return padded_NV.reshape(value_NV.shape[0], -1, BLOCK)
