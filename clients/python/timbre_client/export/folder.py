"""The two files of an adapter, written from arrays by layer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from safetensors.numpy import save_file

PREFIX = "base_model.model."


def write_folder(
    folder: str | Path,
    method: str,
    options: Mapping[str, Any],
    layers: Mapping[str, Mapping[str, ArrayLike]],
    whole: Mapping[str, ArrayLike] | None = None,
) -> Path:
    """Write an adapter: ``layers`` are arrays by key by module path (``model.layers.0.self_attn.q_proj``),
    ``whole`` those of the whole adapter, by key.

    64-bit floats become 32-bit ones; other types stay as they are. Makes the folder; returns it. Raises
    ValueError without a layer.
    """
    if not layers:
        raise ValueError("an adapter needs at least one layer, found none")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": method, **options}
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tensors = {
        f"{PREFIX}{path}.{key}": _stored(value)
        for path, arrays in layers.items()
        for key, value in arrays.items()
    }
    tensors |= {f"base_model.{key}": _stored(value) for key, value in (whole or {}).items()}
    save_file(tensors, target / "adapter_model.safetensors")
    return target


def _stored(value: ArrayLike) -> np.ndarray[Any, np.dtype[Any]]:
    array = np.ascontiguousarray(value)
    return array.astype(np.float32) if array.dtype == np.float64 else array
