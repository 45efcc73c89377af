"""Adapters, files and a method for the store's tests. Child processes import it too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from timbre_store.failpoints import Reach, pass_by
from timbre_store.inspection import Inspection
from timbre_store.limits import StoreLimits
from timbre_store.records import AdapterRecord
from timbre_store.safetensors_header import TensorHeader
from timbre_store.store import Store
from timbre_store.writer import BlobWriter

BASE = "sha256:" + "b" * 64
ELEMENTS = 12


class OpensBlobs(Protocol):
    def begin_blob(self, max_bytes: int | None = None) -> BlobWriter: ...


def raw_file(header: bytes, content: bytes = b"", *, claimed_bytes: int | None = None) -> bytes:
    """A safetensors file from its parts, lies included."""
    length = len(header) if claimed_bytes is None else claimed_bytes
    return length.to_bytes(8, "little") + header + content


def tensor_file(tensors: Mapping[str, tuple[str, list[int], bytes]]) -> bytes:
    """An honest safetensors file from name -> (dtype, shape, bytes)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    content = b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [len(content), len(content) + len(raw)],
        }
        content += raw
    return raw_file(json.dumps(header).encode(), content)


def adapter(seed: int) -> tuple[bytes, bytes]:
    """Config and tensors of a small adapter, another for each seed. Configs repeat every third."""
    config = json.dumps({"peft_type": "LORA", "r": 2 + seed % 3}).encode()
    values = np.arange(ELEMENTS, dtype="<f4") + np.float32(seed)
    return config, tensor_file({"layers.0.q_proj.lora_A.weight": ("F32", [3, 4], values.tobytes())})


def inspect(
    config: dict[str, Any], header: TensorHeader, tensors_path: Path, derived_path: Path
) -> Inspection:
    """A method that reads everything, unless the config's ``refuse`` says why not."""
    if "refuse" in config:
        raise ValueError(config["refuse"])
    elements = sum(entry.elements for entry in header.tensors.values())
    return Inspection("toy", ("layers.0.q_proj",), elements, 4 * elements)


def open_store(root: Path, *, reach: Reach = pass_by) -> Store:
    return Store(root, inspect=inspect, limits=StoreLimits(), reach=reach)


def put(into: OpensBlobs, content: bytes) -> str:
    with into.begin_blob() as writer:
        writer.write(content)
        return writer.commit()


def upload(store: Store, name: str, seed: int) -> AdapterRecord:
    return upload_files(store, name, *adapter(seed))


def upload_files(store: Store, name: str, config: bytes, tensors: bytes) -> AdapterRecord:
    with store.begin_upload() as together:
        return store.register(name, put(together, config), put(together, tensors), BASE)


def files_of(root: Path) -> set[str]:
    """What lies in the store besides catalogue and lock: ``blobs/<hex>``, ``manifests/<hex>``, ``tmp/…``."""
    folders = {"blobs": "sha256/*/*", "manifests": "sha256/*/*", "tmp": "*"}
    return {f"{name}/{path.name}" for name, below in folders.items() for path in (root / name).glob(below)}
