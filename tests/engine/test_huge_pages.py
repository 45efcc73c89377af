"""Copies in large pieces of memory are like any others."""

from __future__ import annotations

from itertools import pairwise

import torch

from timbre_server.engine import huge_pages
from timbre_server.engine.huge_pages import HugePages


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
