"""What an adapter takes in memory at least, where its values and the server's settings are not known."""

from __future__ import annotations

from collections.abc import Iterator

from timbre_methods.program import (
    AdapterProgram,
    AnyPart,
    Dense,
    LowRank,
    Projected,
    Rotation,
    Sparse,
    owned_tensors,
    shared_tensors,
)
from timbre_methods.routing import Routed


def least_bytes(program: AdapterProgram) -> int:
    """`AdapterProgram.prepared_bytes`, with factors of low rank, rotations and dense changes in 16 bits, and
    sparse matrices in slices of 16 bits for each column and value, without gaps. Exact on the meta device."""
    return program.prepared_bytes - sum(_spared_bytes(part) for _, part in program.placed_parts())


def least_shared_bytes(program: AdapterProgram) -> int:
    """The sum of `AdapterProgram.shared_bytes`, with bases in 16 bits. Exact on the meta device too."""
    in_bases = [part for own in map(_with_experts, program.placed_parts()) for part in own]
    narrow = {
        id(t): t.nbytes // 2 for part in in_bases if isinstance(part, Projected) for t in shared_tensors(part)
    }
    return sum((program.shared_bytes | narrow).values())


def _with_experts(placed: tuple[str, AnyPart]) -> Iterator[AnyPart]:
    _, part = placed
    yield part
    if isinstance(part, Routed):
        yield from (inner for expert in part.experts for inner in expert)


def _spared_bytes(part: AnyPart) -> int:
    if isinstance(part, Routed):
        return sum(_spared_bytes(inner) for expert in part.experts for inner in expert)
    own = sum(tensor.nbytes for tensor in owned_tensors(part))
    if isinstance(part, LowRank):
        return own - 2 * (part.a_RI.numel() + part.b_OR.numel())
    if isinstance(part, Sparse):
        # Each slice of outputs has its length there, too.
        return own - 4 * part.values_N.numel() - 2 * part.row_ends.numel()
    if isinstance(part, Rotation):
        return 2 * part.blocks_FSBB.numel()
    return own // 2 if isinstance(part, Dense) else 0
