"""What the store must know of a method at upload, handed in by whoever builds the server.

The store knows no method. `Inspect` is its only view of one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timbre_store.safetensors_header import TensorHeader


@dataclass(frozen=True, slots=True)
class Inspection:
    method: str
    sites: tuple[str, ...]
    parameters: int
    prepared_bytes: int
    virtual_tokens: int = 0
    invocation_tokens: tuple[int, ...] = ()
    row_copies: int = 1
    scouts: bool = False


Inspect = Callable[[dict[str, Any], TensorHeader, Path, Path], Inspection]
"""``inspect(config, header, tensors_path, derived_path)``: does a method read this, and does it fit the base?

Called after every format check has passed, on any thread, and before anything is stored. The paths are valid
during the call. What the adapter's file leaves out and the base's weights give may be written to
``derived_path``: it is stored with the adapter, and never computed again. Where equal files were registered
for the same base before, it lies there already.

A `ValueError` refuses the adapter and becomes `InvalidAdapter` with the same message; an `InvalidAdapter` or
a subclass of it passes through as it is.
"""
