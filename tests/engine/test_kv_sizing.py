"""How large the KV cache becomes, and the two ways in which it cannot be."""

from __future__ import annotations

import pytest

from timbre_server.engine.kv_sizing import (
    KVRequest,
    KVSize,
    available_memory_bytes,
    default_kv_bytes,
    size_kv_cache,
)
from timbre_server.errors import UnsupportedModel

GIB = 1 << 30


def request(*, asked_bytes: int | None = None, asked_len: int | None = None) -> KVRequest:
    return KVRequest(1000, 16, model_len=100, asked_bytes=asked_bytes, asked_len=asked_len)


def test_a_cpu_gives_a_fifth_of_what_is_available_but_at_most_a_gibibyte() -> None:
    assert default_kv_bytes(GIB, reserved_bytes=0, on_gpu=False) == GIB // 5
    assert default_kv_bytes(64 * GIB, reserved_bytes=0, on_gpu=False) == GIB


def test_a_gpu_gives_four_fifths_of_what_adapters_leave() -> None:
    assert default_kv_bytes(11 * GIB, reserved_bytes=GIB, on_gpu=True) == 8 * GIB
    assert default_kv_bytes(GIB, reserved_bytes=2 * GIB, on_gpu=True) == 0


def test_without_wishes_the_default_is_taken_and_the_model_s_length() -> None:
    assert size_kv_cache(request(), 50_500) == KVSize(num_blocks=50, max_model_len=100)


def test_an_asked_size_wins_over_the_default() -> None:
    assert size_kv_cache(request(asked_bytes=9000), 50_000) == KVSize(num_blocks=9, max_model_len=100)


def test_the_length_shrinks_to_what_fits_where_it_was_not_asked_for() -> None:
    assert size_kv_cache(request(asked_bytes=4000), 0) == KVSize(num_blocks=4, max_model_len=48)


def test_a_length_that_was_asked_for_and_just_fits_is_kept() -> None:
    assert size_kv_cache(request(asked_bytes=4000, asked_len=48), 0).max_model_len == 48


def test_a_length_that_was_asked_for_and_does_not_fit_is_refused_with_both_figures() -> None:
    with pytest.raises(UnsupportedModel, match=r"max_model_len = 49 tokens needs 5000 bytes.*it has 4000"):
        size_kv_cache(request(asked_bytes=4000, asked_len=49), 0)


def test_a_length_beyond_the_model_s_positions_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"max_model_len is 101.*end at 100"):
        size_kv_cache(request(asked_len=101), GIB)


def test_a_cache_of_less_than_two_blocks_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"has 1999 bytes.*two blocks of 1000 bytes"):
        size_kv_cache(request(asked_bytes=1999), 0)


def test_available_memory_is_read_from_linux_s_own_figures() -> None:
    assert available_memory_bytes("MemTotal: 100 kB\nMemAvailable:    7 kB\n") == 7 * 1024
    assert available_memory_bytes("MemTotal: 100 kB\n") == 0
