"""The KV cache as numbered blocks: who holds them, which of them hold a known prefix, which to reuse first.

A block's identity is a hash chain: SHA-256 over its parent's hash and its token ids; the first parent is a
hash of everything else that changes hidden states (the mix of adapter digests and weights) and of the
tenant's salt. Where another mix begins to act within a sequence, that enters the chain at its block, so that
blocks before it are shared with requests of the mix before. The base model is not in it: a pool belongs to
one model.

A block is in exactly one of three states: held (reference count > 0), cached (free, but still readable by
its hash; reused in order of last use) or blank (free). Block 0 is none of them: padding rows point at it.

No tensors here, and nothing about requests: that is `scheduler`. All operations are O(1) a block.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from timbre_server.engine.messages import AdapterUse

PADDING_BLOCK = 0

Mix = tuple[tuple[str, float], ...]


def resolved_mix(adapters: Iterable[AdapterUse]) -> Mix:
    """The effective (digest, weight) pairs: equal digests summed, weight 0 left out, in order of digest."""
    weights: dict[str, list[float]] = {}
    for use in adapters:
        weights.setdefault(use.digest, []).append(use.weight)
    summed = ((digest, math.fsum(weights[digest])) for digest in sorted(weights))
    return tuple((digest, weight) for digest, weight in summed if weight != 0)


def root_hash(mix: Mix, salt: str) -> bytes:
    """The parent of a sequence's first block: equal only for equal mixes and equal salts."""
    return hashlib.sha256(b"timbre.kv.root\0" + _written(mix) + _prefixed(salt)).digest()


def turn_hash(parent: bytes, position: int, mix: Mix) -> bytes:
    """The parent of a block in which, from ``position`` on, another mix acts than before."""
    return hashlib.sha256(b"timbre.kv.turn\0" + parent + struct.pack("<Q", position) + _written(mix)).digest()


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The identity of a full block after ``parent``."""
    count = len(token_ids)
    return hashlib.sha256(
        b"timbre.kv.block\0" + parent + struct.pack(f"<Q{count}Q", count, *token_ids)
    ).digest()


def _written(mix: Mix) -> bytes:
    pairs = b"".join(_prefixed(name) + struct.pack("<d", weight) for name, weight in mix)
    return struct.pack("<Q", len(mix)) + pairs


def _prefixed(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


class BlockPool:
    """Blocks 1 to ``num_blocks - 1``. Who is given a block owns one reference until it frees it."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 2 or block_size < 1:
            raise ValueError(
                f"a KV cache of {num_blocks} blocks of {block_size} tokens holds nothing; "
                "expected at least 2 blocks (one is kept for padding) of at least 1 token"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._blank = list(range(num_blocks - 1, PADDING_BLOCK, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        """Free blocks with a hash, least recently used first."""

    @property
    def num_usable(self) -> int:
        return self.num_blocks - 1

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._cached)

    @property
    def num_used(self) -> int:
        return self.num_usable - self.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def lookup(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest known prefix of ``hashes``; the caller now holds a reference to each."""
        found: list[int] = []
        for known in hashes:
            block = self._by_hash.get(known)
            if block is None:
                break
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1
            found.append(block)
        return found

    def allocate(self, count: int) -> list[int]:
        """``count`` blocks to write to: blank ones first, then the cached ones unused for longest.

        Raises ValueError, having taken nothing, where fewer than ``count`` are free.
        """
        if count > self.num_free:
            raise ValueError(f"{count} KV blocks were asked for, {self.num_free} are free")
        return [self._take() for _ in range(count)]

    def free(self, block_ids: Sequence[int]) -> None:
        """Give back one reference to each. The last of them are reused first: a prefix outlives its ends."""
        for block in reversed(block_ids):
            if self._references[block] < 1:
                raise ValueError(f"KV block {block} was freed more often than it was given out")
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._hashes[block] is None:
                    self._blank.append(block)
                else:
                    self._cached[block] = None

    def register(self, block: int, identity: bytes) -> None:
        """Say that a held, wholly written block has this identity. A twin written earlier stays the one."""
        if self._references[block] < 1:
            raise ValueError(f"KV block {block} is not held; only its holder may register it")
        if self._hashes[block] is None and identity not in self._by_hash:
            self._hashes[block] = identity
            self._by_hash[identity] = block

    def forget(self, block_ids: Iterable[int]) -> None:
        """Nobody shall find these held blocks by their hash again: what is in them is not to be trusted."""
        for block in block_ids:
            if self._references[block] < 1:
                raise ValueError(f"KV block {block} is not held; only its holder may forget it")
            identity = self._hashes[block]
            if identity is not None:
                del self._by_hash[identity]
                self._hashes[block] = None

    def check_integrity(self) -> None:
        """Raises AssertionError where the pool's books do not agree with each other."""
        held = {block for block, count in enumerate(self._references) if count > 0}
        blank, cached = set(self._blank), set(self._cached)
        assert all(count >= 0 for count in self._references), "a reference count is negative"
        assert len(blank) == len(self._blank), "a block is listed as blank twice"
        assert not held & blank, "a blank block is held"
        assert not held & cached, "a cached block is held"
        assert held | blank | cached == set(range(1, self.num_blocks)), "a block is in no state"
        named = {block: name for block, name in enumerate(self._hashes) if name is not None}
        assert {name: block for block, name in named.items()} == self._by_hash, "hashes and index differ"
        assert len(named) == len(self._by_hash), "two blocks have one hash"
        assert not blank & named.keys(), "a blank block has a hash"
        assert cached <= named.keys(), "a cached block has no hash"

    def _take(self) -> int:
        if self._blank:
            block = self._blank.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            identity = self._hashes[block]
            assert identity is not None, "a cached block has no hash"
            del self._by_hash[identity]
            self._hashes[block] = None
        self._references[block] = 1
        return block
