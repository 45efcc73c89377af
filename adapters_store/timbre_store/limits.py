"""The bounds on what a client may hand to the store. Everything that a client sends has one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StoreLimits:
    max_blob_bytes: int = 2 << 30
    max_config_bytes: int = 1 << 20
    max_config_depth: int = 32
    """Nesting of arrays and objects in ``adapter_config.json``."""
    max_header_bytes: int = 1 << 20
    """The JSON header of a safetensors file; 4,096 tensors need about 600 KB."""
    max_tensors: int = 4096
    """A LoRA on 7 sites of 32 layers has 448 tensors, with DoRA's magnitudes 672."""
    max_tensor_rank: int = 8
