"""The identity of a base model: what adapters are bound to.

SHA-256 over the checkpoint as it lies on disk, not as it was loaded: the configuration without the entries
that say nothing of the computation, then of every tensor in name order its name, stored dtype and shape
and three samples of 64 bytes (beginning, middle, end). So the dtype and the device that serve it, and how
the tensors are spread over files, do not change it; another fine-tune of the same shapes does, and so does
another stack of its layers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timbre_server.errors import UnsupportedModel

_SAMPLE_BYTES = 64
_VOLATILE = {"_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache"}
_MAX_HEADER_BYTES = 100_000_000


def model_digest(folder: Path) -> str:
    """``sha256:<hex>`` of the safetensors checkpoint in ``folder``.

    Raises:
        UnsupportedModel: there is no readable safetensors checkpoint.
    """
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    essentials = {key: value for key, value in config.items() if key not in _VOLATILE}
    digest = hashlib.sha256(b"timbre base model 1\n")
    digest.update(json.dumps(essentials, sort_keys=True, separators=(",", ":")).encode())
    entries = [entry for file in _weight_files(folder) for entry in _sampled_tensors(file)]
    for name, description, sample in sorted(entries):
        digest.update(f"\n{name} {description} ".encode())
        digest.update(sample)
    return f"sha256:{digest.hexdigest()}"


def stacked_digest(digest: str, stack: Sequence[int]) -> str:
    """Of a checkpoint whose layers are laid out anew; the same where ``stack`` is empty."""
    if not stack:
        return digest
    return f"sha256:{hashlib.sha256(f'{digest} layers {list(stack)}'.encode()).hexdigest()}"


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    single = folder / "model.safetensors"
    if single.exists():
        return [single]
    raise UnsupportedModel(
        f"{folder}: holds neither model.safetensors nor model.safetensors.index.json. Only safetensors "
        "weights are read; convert the checkpoint with save_pretrained() first."
    )


def _sampled_tensors(file: Path) -> list[tuple[str, str, bytes]]:
    """(name, dtype and shape, sampled bytes) of each tensor in one safetensors file."""
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        if not 2 <= header_bytes <= _MAX_HEADER_BYTES:
            raise UnsupportedModel(f"{file}: not a safetensors file (header of {header_bytes} bytes).")
        header: dict[str, Any] = json.loads(stream.read(header_bytes))
        header.pop("__metadata__", None)
        entries = []
        for name, tensor in header.items():
            begin, end = tensor["data_offsets"]
            sample = bytearray()
            for offset in (begin, (begin + end) // 2, max(begin, end - _SAMPLE_BYTES)):
                stream.seek(8 + header_bytes + offset)
                sample += stream.read(min(_SAMPLE_BYTES, end - offset))
            entries.append((name, f"{tensor['dtype']} {tensor['shape']}", bytes(sample)))
        return entries
