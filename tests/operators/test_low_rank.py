from __future__ import annotations

import pytest
import torch
from torch import Tensor

from timbre_methods.program import LowRank
from timbre_server.operators.low_rank import LowRankOperator, _Alone, _blocks, _Stacked, side_by_side
from timbre_server.operators.row_table import RowTable, Span


def test_several_parts_at_one_site_are_summed() -> None:
    generator = torch.Generator().manual_seed(4)
    parts = [
        LowRank(torch.randn(rank, 6, generator=generator), torch.randn(5, rank, generator=generator))
        for rank in (3, 2)
    ]
    x_TI = torch.randn(3, 6, generator=generator)

    [[change]] = LowRankOperator().bind([{7: parts}], RowTable([Span(3, ((7, 0.5),))])).sums(x_TI)

    dense_OI = parts[0].b_OR @ parts[0].a_RI + parts[1].b_OR @ parts[1].a_RI
    expected = torch.zeros(3, 5).index_add_(0, torch.arange(3), 0.5 * x_TI @ dense_OI.T)
    torch.testing.assert_close(change.values_NO, expected, atol=1e-5, rtol=1e-5)


CPU = torch.device("cpu")


def random_parts(*ranks: int) -> list[LowRank]:
    generator = torch.Generator().manual_seed(sum(ranks))
    return [
        LowRank(torch.randn(r, 6, generator=generator), torch.randn(5, r, generator=generator)) for r in ranks
    ]


def storages(tensors: list[Tensor]) -> dict[int, int]:
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def factors_of(block: _Alone | _Stacked) -> list[Tensor]:
    return [block.factors.a_RI, *(b_RO for b_RO in block.factors.b_RO if b_RO is not None)]


@pytest.mark.parametrize("num_rows", [1, 5], ids=["stacked", "alone"])
def test_factors_side_by_side_are_bound_as_they_lie(num_rows: int) -> None:
    members = [random_parts(3, 1, 2), [], random_parts(4), random_parts(1, 1)]
    placed = side_by_side(members, CPU, Tensor.cpu)
    for before, after in zip(members, placed, strict=True):
        for one, other in zip(before, after, strict=True):
            assert torch.equal(one.a_RI, other.a_RI)
            assert torch.equal(one.b_OR, other.b_OR)
            assert other.b_OR.T.is_contiguous(), "as kernels read it on a CPU"
    own = storages([t for parts in placed for part in parts for t in (part.a_RI, part.b_OR)])
    assert sum(own.values()) == 4 * (6 + 5) * 12
    table = RowTable([Span(num_rows, ((7, 0.5),))])
    x_TI = torch.randn(num_rows, 6, generator=torch.Generator().manual_seed(2))

    (block,) = _blocks([{7: parts} for parts in placed], table)
    (copied,) = _blocks([{7: parts} for parts in members], table)

    a_RI, *_, b_of_one_part_RO, _ = factors_of(block)
    assert storages([a_RI, b_of_one_part_RO]).keys() <= own.keys()
    assert not storages(factors_of(copied)).keys() & own.keys()
    for one, other in zip(block.changes(x_TI), copied.changes(x_TI), strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert torch.equal(one.values_NO, other.values_NO)


@pytest.mark.parametrize("num_rows", [1, 5], ids=["stacked", "alone"])
def test_factors_of_16_bits_take_half_and_compute_the_same_bits(num_rows: int) -> None:
    """The A of a group together, and the B of each member."""
    rounded = [
        [LowRank(part.a_RI.bfloat16().float(), part.b_OR.half().float()) for part in random_parts(*ranks)]
        for ranks in ((3, 1), (2,))
    ]
    whole = [rounded[0], [LowRank(rounded[1][0].a_RI, rounded[1][0].b_OR / 3)]]
    placed = side_by_side(whole, CPU, Tensor.cpu)
    found = [[(part.a_RI.dtype, part.b_OR.dtype) for part in parts] for parts in placed]
    assert found == [[(torch.bfloat16, torch.float16)] * 2, [(torch.bfloat16, torch.float32)]]
    own = storages([t for parts in placed for part in parts for t in (part.a_RI, part.b_OR)])
    assert sum(own.values()) == 2 * 6 * 6 + 2 * 5 * 4 + 4 * 5 * 2

    table = RowTable([Span(num_rows, ((slot, 0.5),)) for slot in (0, 1)])
    # Slot 1 is of float32: what runs together need not lie alike.
    other = [random_parts(3, 1), random_parts(2)]
    x_TI = torch.randn(2 * num_rows, 6, generator=torch.Generator().manual_seed(2))
    results = [
        LowRankOperator()
        .bind([{0: parts, 1: more} for parts, more in zip(of_members, other, strict=True)], table)
        .sums(x_TI)
        for of_members in (placed, whole)
    ]
    for changes, expected in zip(*results, strict=True):
        for one, wanted in zip(changes, expected, strict=True):
            assert torch.equal(one.values_NO, wanted.values_NO)


def test_factors_that_lie_otherwise_are_joined_in_their_own_order() -> None:
    (own,) = side_by_side([random_parts(2, 3, 1)], CPU, Tensor.cpu)
    for parts in ([own[1], own[0], own[2]], [own[0], own[2]], [own[0], own[0]], [own[2], *random_parts(2)]):
        (block,) = _blocks([{7: parts}], RowTable([Span(5, ((7, 1.0),))]))
        assert torch.equal(block.factors.a_RI, torch.cat([part.a_RI for part in parts]))
        (b_RO,) = block.factors.b_RO
        assert b_RO is not None
        assert torch.equal(b_RO, torch.cat([part.b_OR.T for part in parts]))
