"""Blocks are held, cached or blank; hashes tell apart everything that changes what is in them."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from timbre_server.engine.kv_blocks import BlockPool, block_hash, resolved_mix, root_hash
from timbre_server.engine.messages import AdapterUse


def chain(length: int, salt: str = "") -> list[bytes]:
    hashes = [root_hash((), salt)]
    for index in range(length):
        hashes.append(block_hash(hashes[-1], [index, index + 1]))
    return hashes[1:]


def test_the_padding_block_is_never_given_out() -> None:
    pool = BlockPool(4, 2)
    assert sorted(pool.allocate(3)) == [1, 2, 3]
    pool.check_integrity()


def test_a_pool_gives_nothing_where_it_cannot_give_all() -> None:
    pool = BlockPool(4, 2)
    with pytest.raises(ValueError, match="4 KV blocks were asked for, 3 are free"):
        pool.allocate(4)
    assert pool.num_free == 3


def test_a_pool_of_padding_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 blocks"):
        BlockPool(1, 16)


def test_a_freed_prefix_is_found_again_until_its_block_is_reused() -> None:
    pool, hashes = BlockPool(4, 2), chain(2)
    blocks = pool.allocate(2)
    for block, identity in zip(blocks, hashes, strict=True):
        pool.register(block, identity)
    pool.free(blocks)
    assert pool.num_free == 3
    assert pool.lookup(hashes) == blocks
    pool.free(blocks)
    pool.allocate(3)
    assert pool.lookup(hashes) == []
    pool.check_integrity()


def test_blank_blocks_are_used_before_cached_ones_and_the_end_of_a_prefix_before_its_beginning() -> None:
    pool, hashes = BlockPool(5, 2), chain(2)
    first, second = blocks = pool.allocate(2)
    for block, identity in zip(blocks, hashes, strict=True):
        pool.register(block, identity)
    pool.free(blocks)
    assert set(pool.allocate(2)).isdisjoint(blocks)
    assert pool.allocate(1) == [second]
    assert pool.lookup(hashes) == [first]


def test_the_cached_block_unused_for_longest_goes_first() -> None:
    pool, hashes = BlockPool(4, 2), [root_hash((), str(name)) for name in range(3)]
    blocks = pool.allocate(3)
    for block, identity in zip(blocks, hashes, strict=True):
        pool.register(block, identity)
    for block in blocks:
        pool.free([block])
    pool.free(pool.lookup(hashes[:1]))
    assert pool.allocate(1) == [blocks[1]]


def test_a_prefix_ends_at_the_first_unknown_block() -> None:
    pool, hashes = BlockPool(4, 2), chain(3)
    blocks = pool.allocate(2)
    pool.register(blocks[0], hashes[0])
    pool.register(blocks[1], hashes[2])
    assert pool.lookup(hashes) == blocks[:1]


def test_a_twin_of_a_registered_block_is_not_registered() -> None:
    pool, identity = BlockPool(4, 2), root_hash((), "")
    first, second = pool.allocate(2)
    pool.register(first, identity)
    pool.register(second, identity)
    pool.free([second])
    pool.check_integrity()
    assert pool.lookup([identity]) == [first]


def test_a_forgotten_block_is_not_found_again() -> None:
    pool, identity = BlockPool(4, 2), root_hash((), "")
    blocks = pool.allocate(1)
    pool.register(blocks[0], identity)
    pool.forget(blocks)
    pool.free(blocks)
    assert pool.lookup([identity]) == []
    pool.check_integrity()


@pytest.mark.parametrize("wrong", ["free", "register", "forget"])
def test_a_block_that_nobody_holds_cannot_be_changed(wrong: str) -> None:
    pool = BlockPool(4, 2)
    arguments = {"free": ([2],), "register": (2, b"name"), "forget": ([2],)}[wrong]
    with pytest.raises(ValueError, match="KV block 2"):
        getattr(pool, wrong)(*arguments)


def test_a_block_is_never_shared_between_salts() -> None:
    assert set(chain(3, "tenant a")).isdisjoint(chain(3, "tenant b"))


def test_a_salt_is_never_taken_for_an_adapter() -> None:
    assert root_hash((("a", 1.0),), "") != root_hash((), "a")
    assert root_hash((("a", 1.0),), "b") != root_hash((("ab", 1.0),), "")


def test_a_block_is_never_shared_between_mixes() -> None:
    mixes = [(), (("a", 1.0),), (("a", 0.5),), (("b", 1.0),), (("a", 1.0), ("b", 1.0))]
    assert len({root_hash(mix, "") for mix in mixes}) == len(mixes)


def test_a_block_is_never_shared_between_different_tokens_or_parents() -> None:
    parent = root_hash((), "")
    names = {block_hash(parent, [1, 2]), block_hash(parent, [2, 1]), block_hash(parent, [1]), parent}
    names.add(block_hash(block_hash(parent, [1, 2]), [1, 2]))
    assert len(names) == 5


def test_a_mix_is_known_by_its_effective_weights() -> None:
    uses = [
        AdapterUse("b", 0.25),
        AdapterUse("a"),
        AdapterUse("b", 0.5),
        AdapterUse("c", 1.0),
        AdapterUse("c", -1.0),
    ]
    assert resolved_mix(uses) == (("a", 1.0), ("b", 0.75))
    assert resolved_mix(reversed(uses)) == resolved_mix(uses)
    assert resolved_mix([AdapterUse("a", 0.0)]) == ()


class PoolMachine(RuleBasedStateMachine):
    """Holders come and go in any order; the books always balance and no held block changes its content."""

    tables = Bundle("tables")

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(9, 1)
        self.content: dict[int, bytes] = {}
        self.held: dict[int, int] = {}

    @rule(target=tables, salt=st.sampled_from("ab"), length=st.integers(1, 5))
    def place(self, salt: str, length: int) -> object:
        hashes = chain(length, salt)
        hits = self.pool.lookup(hashes)
        assert [self.content[block] for block in hits] == hashes[: len(hits)]
        if length - len(hits) > self.pool.num_free:
            self.pool.free(hits)
            return multiple()
        table = hits + self.pool.allocate(length - len(hits))
        for block in table[len(hits) :]:
            assert self.held.get(block, 0) == 0
        for block, identity in zip(table, hashes, strict=True):
            self.held[block] = self.held.get(block, 0) + 1
            self.content[block] = identity
        return (table, hashes)

    @rule(entry=tables)
    def register(self, entry: tuple[list[int], list[bytes]]) -> None:
        for block, identity in zip(*entry, strict=True):
            self.pool.register(block, identity)

    @rule(entry=consumes(tables))
    def free(self, entry: tuple[list[int], list[bytes]]) -> None:
        self.pool.free(entry[0])
        for block in entry[0]:
            self.held[block] -= 1

    @rule(entry=tables)
    def forget(self, entry: tuple[list[int], list[bytes]]) -> None:
        self.pool.forget(entry[0])

    @invariant()
    def books_balance(self) -> None:
        self.pool.check_integrity()
        assert self.pool.num_used == sum(count > 0 for count in self.held.values())


TestPoolMachine = PoolMachine.TestCase
