"""Copies in large pieces of memory are like any others."""

from __future__ import annotations

import errno
import mmap
from itertools import pairwise

import pytest
import torch

from timbre_server.native import huge_pages
from timbre_server.native.huge_pages import HugePages, move_together


def test_copies_are_equal_apart_and_where_lines_of_the_cache_begin() -> None:
    pages = HugePages()
    given = [
        torch.randn(3, 5),
        torch.randn(7).bfloat16(),
        torch.empty(0),
        torch.randn(8, 4).T,
        torch.arange(huge_pages._PIECE // 4 + 3, dtype=torch.int32),
        torch.randn(2, 2),
    ]
    copies = [pages.copied(tensor) for tensor in given]
    for copy, tensor in zip(copies, given, strict=True):
        assert copy.dtype is tensor.dtype
        assert torch.equal(copy, tensor)
        assert copy.is_contiguous()
    places = sorted((copy.data_ptr(), copy.nbytes) for copy in copies if copy.nbytes)
    assert all(place % 64 == 0 for place, _ in places)
    assert all(place + size <= after for (place, size), (after, _) in pairwise(places))


def test_a_copy_outlives_who_made_it() -> None:
    given = torch.randn(1000)
    copy = HugePages().copied(given)
    assert torch.equal(copy, given)
    copy += 1
    assert torch.equal(copy, given + 1)


def test_what_is_moved_together_stays_what_it_is_and_where_it_is_in_each_other() -> None:
    joined = torch.randn(600, 1000)
    first, second = joined.split([250, 350])
    turned = torch.randn(8, 1000).bfloat16().T
    empty = torch.empty(0, 8)
    each = [first, second, turned, turned, empty, torch.arange(77)]
    want = [(tensor.clone(), tensor.stride()) for tensor in each]
    given = {tensor.data_ptr() for tensor in each}
    move_together(each)
    for tensor, (numbers, stride) in zip(each, want, strict=True):
        assert torch.equal(tensor, numbers)
        assert tensor.stride() == stride
    assert given.isdisjoint(tensor.data_ptr() for tensor in each if tensor.numel())
    assert all(tensor.data_ptr() % 64 == 0 for tensor in (first, turned, each[-1]))
    assert first.data_ptr() % huge_pages._PAGE == 0
    assert second.data_ptr() == first.data_ptr() + first.nbytes
    assert len({tensor.untyped_storage().data_ptr() for tensor in each if tensor.numel()}) == 1


def test_less_than_a_page_stays_where_it_is() -> None:
    small = torch.randn(100, 100)
    place = small.data_ptr()
    move_together([small])
    assert small.data_ptr() == place


def test_where_the_system_gives_no_more_pieces_all_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*args: object, **flags: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", none_left)
    large = torch.arange(huge_pages._PAGE)
    place = large.data_ptr()
    move_together([large])
    assert large.data_ptr() == place
    assert torch.equal(large, torch.arange(huge_pages._PAGE))


def test_one_of_them_keeps_all_that_was_moved() -> None:
    each = [torch.full((300_000,), float(n)) for n in range(4)]
    move_together(each)
    last = each.pop()
    each.clear()
    assert torch.equal(last, torch.full((300_000,), 3.0))
