"""The KV blocks of one sequence: its known prefix, its growth, what it leaves for others. Nothing of order.

A full block is found by others once its entries are written (`register`), never before. The block that
holds a sequence's last token is never taken from the cache: at least one row must run to draw a token.
"""

from __future__ import annotations

from itertools import compress

from timbre_server.engine import policy
from timbre_server.engine.kv_blocks import BlockPool, Mix, block_hash, root_hash, turn_hash
from timbre_server.engine.sequence import Sequence


class BlockTables:
    """Keeps ``block_table``, ``block_hashes`` and the two counters of cached tokens of sequences."""

    def __init__(self, pool: BlockPool, *, enable_prefix_caching: bool) -> None:
        self._pool = pool
        self._caches = enable_prefix_caching

    def place(self, sequence: Sequence, num_running: int) -> bool:
        """Take the blocks of all of its tokens, known prefix first. Without room False, and nothing taken."""
        pool = self._pool
        hits = self._lookup(sequence)
        needed = pool.blocks_for(len(sequence.token_ids)) - len(hits)
        if not policy.has_room(needed, pool.num_free, num_running):
            pool.free(hits)
            return False
        sequence.block_table = hits + pool.allocate(needed)
        sequence.num_computed_tokens = len(hits) * pool.block_size
        sequence.num_cached_tokens = min(sequence.num_computed_tokens, sequence.num_prompt_tokens)
        return True

    def num_missing(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks to allocate before the next ``num_tokens`` can be computed."""
        end = sequence.num_computed_tokens + num_tokens
        return max(0, self._pool.blocks_for(end) - len(sequence.block_table))

    def grow(self, sequence: Sequence, num_blocks: int) -> None:
        if num_blocks:
            sequence.block_table += self._pool.allocate(num_blocks)

    def advance(self, sequence: Sequence, end: int) -> None:
        """The entries up to ``end`` are written: full blocks among them may be found by others from now."""
        size = self._pool.block_size
        first, last = sequence.num_computed_tokens // size, end // size
        sequence.num_computed_tokens = end
        if self._caches and last > first:
            self._hash(sequence, last)
            for index in range(first, last):
                self._pool.register(sequence.block_table[index], sequence.block_hashes[index])

    def free(self, sequence: Sequence) -> None:
        """Give all blocks back; what was computed is to be computed (or found) again."""
        self._pool.free(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed_tokens = 0

    def _lookup(self, sequence: Sequence) -> list[int]:
        if not self._caches or sequence.request.sampling.prompt_logprobs is not None:
            return []
        num_full = (len(sequence.token_ids) - 1) // self._pool.block_size
        self._hash(sequence, num_full)
        return self._pool.lookup(sequence.block_hashes[:num_full])

    def _hash(self, sequence: Sequence, num_full: int) -> None:
        """Extend the hash chain to the first ``num_full`` blocks: each is hashed once in its life."""
        hashes, size = sequence.block_hashes, self._pool.block_size
        parent = hashes[-1] if hashes else root_hash(_mix_at(sequence, 0), sequence.request.cache_salt)
        for start in range(len(hashes) * size, num_full * size, size):
            for turn in sequence.turns:
                if start <= turn < start + size:
                    parent = turn_hash(parent, turn, _mix_at(sequence, turn))
            parent = block_hash(parent, sequence.token_ids[start : start + size])
            hashes.append(parent)


def _mix_at(sequence: Sequence, position: int) -> Mix:
    return tuple(compress(sequence.mix, sequence.acting(position)))
