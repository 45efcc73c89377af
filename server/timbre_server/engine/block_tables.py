"""The KV blocks of one sequence: its known prefix, its growth, what it leaves for others. Nothing of order.

A sequence that scouts has two tables, which grow and shrink together: its own, and that of the base's pass
over the same tokens, whose blocks it shares with requests for the base.

A full block is found by others once its entries are written (`register`), never before. The block that
holds a sequence's last token is never taken from the cache: at least one row must run to draw a token.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from itertools import compress

from timbre_server.engine import policy
from timbre_server.engine.kv_blocks import BlockPool, Mix, block_hash, root_hash, turn_hash
from timbre_server.engine.sequence import Sequence


class BlockTables:
    """Keeps the tables, their hashes and the two counters of cached tokens of sequences."""

    def __init__(self, pool: BlockPool, *, enable_prefix_caching: bool) -> None:
        self._pool = pool
        self._caches = enable_prefix_caching

    def place(self, sequence: Sequence, num_growing: int) -> bool:
        """Take the blocks of all of its tokens, known prefix first; ``num_growing`` tables of others grow.
        Without room False, and nothing taken."""
        pool, tables = self._pool, sequence.tables
        hits = self._lookup(sequence)
        num_known = len(hits[0])
        needed = pool.blocks_for(len(sequence.token_ids)) - num_known
        if not policy.has_room(needed * len(tables), pool.num_free, num_growing):
            for known in hits:
                pool.free(known)
            return False
        for table, known in zip(tables, hits, strict=True):
            table[:] = known + pool.allocate(needed)
        sequence.num_computed_tokens = num_known * pool.block_size
        sequence.num_cached_tokens = min(sequence.num_computed_tokens, sequence.num_prompt_tokens)
        return True

    def num_missing(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks to allocate before the next ``num_tokens`` can be computed."""
        end = sequence.num_computed_tokens + num_tokens
        missing = max(0, self._pool.blocks_for(end) - len(sequence.block_table))
        return missing * len(sequence.tables)

    def grow(self, sequence: Sequence, num_blocks: int) -> None:
        """By as many as `num_missing` said."""
        if num_blocks:
            tables = sequence.tables
            for table in tables:
                table += self._pool.allocate(num_blocks // len(tables))

    def advance(self, sequence: Sequence, end: int) -> None:
        """The entries up to ``end`` are written: full blocks among them may be found by others from now."""
        size = self._pool.block_size
        first, last = sequence.num_computed_tokens // size, end // size
        sequence.num_computed_tokens = end
        if self._caches and last > first:
            for table, hashes in zip(sequence.tables, self._hashes(sequence, last), strict=True):
                for index in range(first, last):
                    self._pool.register(table[index], hashes[index])

    def free(self, sequence: Sequence) -> None:
        """Give all blocks back; what was computed is to be computed (or found) again."""
        for table in sequence.tables:
            self._pool.free(table)
            table.clear()
        sequence.num_computed_tokens = 0

    def _lookup(self, sequence: Sequence) -> list[list[int]]:
        """The known blocks of each table, so many as are known in all of them."""
        if not self._caches or sequence.request.sampling.prompt_logprobs is not None:
            return [[] for _ in sequence.tables]
        num_full = (len(sequence.token_ids) - 1) // self._pool.block_size
        found = [self._pool.lookup(hashes[:num_full]) for hashes in self._hashes(sequence, num_full)]
        num_known = min(map(len, found))
        for known in found:
            self._pool.free(known[num_known:])
        return [known[:num_known] for known in found]

    def _hashes(self, sequence: Sequence, num_full: int) -> tuple[list[bytes], ...]:
        """The hash chain of each table, extended to the first ``num_full`` blocks: each is hashed once in its
        life."""
        turns = [(turn, _mix_at(sequence, turn)) for turn in sequence.turns]
        self._extend(sequence.block_hashes, sequence, num_full, [(0, _mix_at(sequence, 0)), *turns])
        if not sequence.scouts:
            return (sequence.block_hashes,)
        self._extend(sequence.scout_hashes, sequence, num_full, [(0, ())])
        return sequence.block_hashes, sequence.scout_hashes

    def _extend(
        self,
        hashes: list[bytes],
        sequence: Sequence,
        num_full: int,
        mixes: Ordered[tuple[int, Mix]],
    ) -> None:
        """``mixes``: what acts from a position on, the first from 0."""
        (_, first), *turns = mixes
        size = self._pool.block_size
        parent = hashes[-1] if hashes else root_hash(first, sequence.request.cache_salt)
        for start in range(len(hashes) * size, num_full * size, size):
            for turn, mix in turns:
                if start <= turn < start + size:
                    parent = turn_hash(parent, turn, mix)
            parent = block_hash(parent, sequence.token_ids[start : start + size])
            hashes.append(parent)


def _mix_at(sequence: Sequence, position: int) -> Mix:
    return tuple(compress(sequence.mix, sequence.acting(position)))
