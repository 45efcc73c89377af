"""Shrink and expand: ``z = A x`` and ``y += w g · B z`` for rows with different A, B and ranks.

A program of ``shrink`` has a tile of rows of one crowd, a block of the ranks of all its adapters at all
members of the group, each rank with an address of its own, and one piece of the input. A program of
``expand`` has a tile of rows, one member and a block of its outputs; it adds the pieces of z, then each of
the crowd's factors there in order, and writes its block once. Tiles of one row multiply and add, those of
more are products of blocks. Ranks are padded to a block of one crowd's, never to another adapter's.

With GATED, ranks whose gate is zero for every row of the tile are not read.

Legend: as `low_rank_groups`; inside a kernel N rows of a tile, R ranks, I inputs, O outputs of a block.
"""

from __future__ import annotations

import triton
import triton.language as tl

SHRINK_TILE = tl.constexpr(6)
"""Numbers of a tile: first row, rows, first rank, ranks, where z begins, z of a row."""
EXPAND_TILE = tl.constexpr(7)
"""First row, rows, where z begins, z of a row, first factor, factors, member."""
RANK = tl.constexpr(3)
"""Numbers of a rank: which of a row's adapters, column of the gate, format of A."""
FACTOR = tl.constexpr(5)
"""Numbers of a factor: rank, column of z, which of a row's adapters, column of the gate, format of B."""


@triton.jit
def load_factor(
    address: tl.tensor, place: tl.tensor, is_read: tl.tensor, format: tl.tensor, FORMATS: tl.constexpr
) -> tl.tensor:
    """float32 numbers of factors at int64 addresses, each in its own format; 0 where none is read.

    FORMATS: those that occur, as `formats.formats_in` counts them; the common case is one.
    """
    if FORMATS == 1:
        found = tl.load(address.to(tl.pointer_type(tl.float32)) + place, mask=is_read, other=0.0)
    elif FORMATS == 2:
        found = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + place, mask=is_read, other=0.0)
    elif FORMATS == 4:
        found = tl.load(address.to(tl.pointer_type(tl.float16)) + place, mask=is_read, other=0.0)
    else:
        whole = address.to(tl.pointer_type(tl.float32)) + place
        brain = address.to(tl.pointer_type(tl.bfloat16)) + place
        half = address.to(tl.pointer_type(tl.float16)) + place
        found = tl.load(whole, mask=is_read & (format == 0), other=0.0)
        found += tl.load(brain, mask=is_read & (format == 1), other=0.0).to(tl.float32)
        found += tl.load(half, mask=is_read & (format == 2), other=0.0).to(tl.float32)
    return found.to(tl.float32)


# Compiled anew for a width of a layer, never for what a step counts.
@triton.jit(do_not_specialize=["num_rows_Q", "z_size"])
def shrink(
    x: tl.tensor, in_features: tl.tensor, rows: tl.tensor, num_rows_Q: tl.tensor, tiles: tl.tensor,
    a_ranks: tl.tensor, ranks: tl.tensor, gates: tl.tensor, gate_starts: tl.tensor, z: tl.tensor,
    z_size: tl.tensor, piece: tl.tensor, ROWS: tl.constexpr, RANKS: tl.constexpr, WIDTH: tl.constexpr,
    GATED: tl.constexpr, FORMATS: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    tile = tiles + tl.program_id(0) * SHRINK_TILE
    n, r = tl.arange(0, ROWS), tl.arange(0, RANKS)
    q_N, first_rank = tl.load(tile) + n, tl.load(tile + 2)
    is_row, is_rank = n < tl.load(tile + 1), r < tl.load(tile + 3)
    start = tl.program_id(1) * piece
    end = tl.minimum(start + piece, in_features)
    if GATED:
        pair_R = tl.load(ranks + (first_rank + r) * RANK, mask=is_rank, other=0)
        column_R = tl.load(ranks + (first_rank + r) * RANK + 1, mask=is_rank, other=0)
        is_read = is_row[:, None] & is_rank[None, :]
        gate_start_NR = tl.load(
            gate_starts + pair_R[None, :] * num_rows_Q + q_N[:, None], mask=is_read, other=0
        )
        gate_NR = tl.load(gates + gate_start_NR + column_R[None, :], mask=is_read, other=0.0)
        is_rank = tl.max((gate_NR != 0).to(tl.int32), axis=0) > 0
        end = tl.where(tl.max(is_rank.to(tl.int32), axis=0) > 0, end, start)

    x_N = x + tl.load(rows + q_N, mask=is_row, other=0).to(tl.int64) * in_features
    a_R = tl.load(a_ranks + first_rank + r, mask=is_rank, other=0)
    format_R = tl.load(ranks + (first_rank + r) * RANK + 2, mask=is_rank, other=0)
    if ALIGNED:
        a_R = tl.multiple_of(a_R, 16)
    if ROWS == 1:
        products_RI = tl.zeros((RANKS, WIDTH), tl.float32)
    z_NR = tl.zeros((ROWS, RANKS), tl.float32)
    for first in range(start, end, WIDTH):
        i = first + tl.arange(0, WIDTH)
        is_in = i < end
        x_NI = tl.load(x_N[:, None] + i[None, :], mask=is_row[:, None] & is_in[None, :], other=0.0)
        is_in_a = is_rank[:, None] & is_in[None, :]
        a_RI = load_factor(a_R[:, None], i[None, :], is_in_a, format_R[:, None], FORMATS)
        if ROWS == 1:
            products_RI += a_RI * x_NI.to(tl.float32)
        else:
            z_NR = tl.dot(x_NI.to(tl.float32), tl.trans(a_RI), z_NR, input_precision=PRECISION)
    if ROWS == 1:
        z_NR = tl.sum(products_RI, axis=1)[None, :]
    z_N = z + tl.program_id(1).to(tl.int64) * z_size + tl.load(tile + 4) + n * tl.load(tile + 5)
    tl.store(z_N[:, None] + r[None, :], z_NR, mask=is_row[:, None] & is_rank[None, :])


@triton.jit(do_not_specialize=["num_rows_Q", "z_size", "num_pieces"])
def expand(
    z: tl.tensor, z_size: tl.tensor, num_pieces: tl.tensor, weights: tl.tensor, num_rows_Q: tl.tensor,
    tiles: tl.tensor, factors: tl.tensor, b_factors: tl.tensor, gates: tl.tensor, gate_starts: tl.tensor,
    members: tl.tensor, places: tl.tensor, y: tl.tensor, ROWS: tl.constexpr, RANKS: tl.constexpr,
    OUT: tl.constexpr, GATED: tl.constexpr, FORMATS: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    tile = tiles + tl.program_id(0) * EXPAND_TILE
    n, o = tl.arange(0, ROWS), tl.program_id(1) * OUT + tl.arange(0, OUT)
    q_N, is_row = tl.load(tile) + n, n < tl.load(tile + 1)
    z_N = z + tl.load(tile + 2) + n * tl.load(tile + 3)
    first_factor, member = tl.load(tile + 4), tl.load(tile + 6)
    out_features = tl.load(members + member * 2 + 1)
    is_out = o < out_features
    # Members of few outputs have no work for the last blocks of the widest.
    num_factors = tl.where(tl.program_id(1) * OUT < out_features, tl.load(tile + 5), 0)

    y_NO = tl.zeros((ROWS, OUT), tl.float32)
    for f in range(first_factor, first_factor + num_factors):
        factor = factors + f * FACTOR
        rank, column, pair = tl.load(factor), tl.load(factor + 1), tl.load(factor + 2)
        b, b_format = tl.load(b_factors + f), tl.load(factor + 4)
        weight_N = tl.load(weights + pair * num_rows_Q + q_N, mask=is_row, other=0.0)
        is_used, ranks_used = is_row, rank
        if GATED:
            gate_start_N = tl.load(gate_starts + pair * num_rows_Q + q_N, mask=is_row, other=0)
            gate_N = tl.load(gates + gate_start_N + tl.load(factor + 3), mask=is_row, other=0.0)
            is_used = gate_N != 0
            weight_N *= gate_N
            ranks_used = tl.where(tl.max(is_used.to(tl.int32), axis=0) > 0, rank, 0)
        for first in range(0, ranks_used, RANKS):
            r = first + tl.arange(0, RANKS)
            is_rank = r < rank
            is_read = is_used[:, None] & is_rank[None, :]
            z_NR = tl.zeros((ROWS, RANKS), tl.float32)
            for number in range(num_pieces):
                z_piece_N = z_N + tl.cast(number, tl.int64) * z_size + column
                z_NR += tl.load(z_piece_N[:, None] + r[None, :], mask=is_read, other=0.0)
            z_NR *= weight_N[:, None]
            is_in_b = is_out[:, None] & is_rank[None, :]
            b_OR = load_factor(b, o[:, None] * rank + r[None, :], is_in_b, b_format, FORMATS)
            if ROWS == 1:
                y_NO += tl.sum(b_OR * z_NR, axis=1)[None, :]
            else:
                y_NO = tl.dot(z_NR, tl.trans(b_OR), y_NO, input_precision=PRECISION)
    place_N = tl.load(places + member * num_rows_Q + q_N, mask=is_row, other=0).to(tl.int64)
    y_N = y + tl.load(members + member * 2) + place_N * out_features
    tl.store(y_N[:, None] + o[None, :], y_NO, mask=is_row[:, None] & is_out[None, :])
