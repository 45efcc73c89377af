"""How many KV blocks to hold and how long a sequence may be: pure arithmetic on what was measured.

Knows neither torch nor the model: it gets bytes per block and the memory that is free.
"""

from __future__ import annotations

from dataclasses import dataclass

from timbre_server.errors import UnsupportedModel

_CPU_SHARE = 0.2
_CPU_CEILING_BYTES = 1 << 30
_GPU_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class KVSize:
    num_blocks: int
    """Block 0, which no sequence gets, included."""
    max_model_len: int


@dataclass(frozen=True, slots=True)
class KVRequest:
    """What is known before sizing. ``model_len`` is what the model's positions allow."""

    bytes_per_block: int
    block_size: int
    model_len: int
    asked_bytes: int | None
    """None: choose by what is free."""
    asked_len: int | None
    """None: as long as the model and the cache allow."""


def default_kv_bytes(free_bytes: int, *, reserved_bytes: int, on_gpu: bool) -> int:
    """The share of free memory that the cache takes when no size is asked for.

    On a CPU a fifth of what is available, at most 1 GiB: others live there too. On a GPU four fifths of
    what is left after ``reserved_bytes`` (adapters, recorded steps); the rest is for activations.
    """
    if on_gpu:
        return max(0, int((free_bytes - reserved_bytes) * _GPU_SHARE))
    return min(_CPU_CEILING_BYTES, int(free_bytes * _CPU_SHARE))


def size_kv_cache(request: KVRequest, default_bytes: int) -> KVSize:
    """The number of blocks, and the longest sequence, such that one of that length always fits.

    ``default_bytes`` is taken where no size was asked for.

    Raises:
        UnsupportedModel: a length was asked for that does not fit, or not even one block fits.
    """
    budget = default_bytes if request.asked_bytes is None else request.asked_bytes
    num_blocks = budget // request.bytes_per_block
    fits_len = (num_blocks - 1) * request.block_size
    wanted_len = request.model_len if request.asked_len is None else request.asked_len
    if wanted_len > request.model_len:
        raise UnsupportedModel(
            f"max_model_len is {wanted_len}, but the model's positions end at {request.model_len}. "
            "Ask for no more."
        )
    if request.asked_len is not None and fits_len < wanted_len:
        needed = (1 - (-wanted_len // request.block_size)) * request.bytes_per_block
        raise UnsupportedModel(
            f"One sequence of max_model_len = {wanted_len} tokens needs {needed} bytes of KV cache, "
            f"but it has {budget}. Raise kv_cache_bytes or lower max_model_len."
        )
    if fits_len < 1:
        raise UnsupportedModel(
            f"The KV cache has {budget} bytes, but its smallest size is two blocks of "
            f"{request.bytes_per_block} bytes. Raise kv_cache_bytes."
        )
    return KVSize(num_blocks, min(wanted_len, fits_len))


def available_memory_bytes(meminfo: str) -> int:
    """MemAvailable of the text of Linux's /proc/meminfo, 0 where it is missing."""
    for line in meminfo.splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
