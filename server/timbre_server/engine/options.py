"""Everything that the engine process is told when it starts: plain values, the first frame on its socket.

They are checked where they are made (the server's settings); this module knows neither settings nor torch.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
Device = Literal["auto", "cpu", "cuda"]
KernelChoice = Literal["auto", "torch", "native", "triton"]
LoraDtype = Literal["auto", "float32", "bfloat16"]

GIB = 1024**3


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to run one model. Remote code in a model's folder is never run: there is no option for it."""

    model: str
    """A folder or a hub id. (A GGUF file was made a folder before.)"""
    adapters_dir: str
    """The adapter store's root; read only."""
    layer_replication: tuple[tuple[int, int], ...] = ()
    """Ranges of layers that run one after the other; none: each layer once."""
    dtype: Dtype = "auto"
    device: Device = "auto"
    kernels: KernelChoice = "auto"
    max_model_len: int | None = None
    """None: what the model's config says, or less where the KV cache cannot hold it."""
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    kv_cache_bytes: int | None = None
    """None: sized at start."""
    block_size: int = 16
    enable_prefix_caching: bool = True
    adapter_memory_bytes: int = GIB
    lora_dtype: LoraDtype = "auto"
    """What factors of low rank, sparse values and rotations are rounded to: float32, which is what they are;
    "auto": bfloat16 where it is the model's own type."""
    num_threads: int | None = None
    """None: as many as this process, or its container, may use."""
    self_check: bool = True
