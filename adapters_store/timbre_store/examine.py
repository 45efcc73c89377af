"""Decides whether two uploaded files are an adapter, and if so, which: config, tensors -> manifest.

Reads only. The checks go from cheap to dear, and every byte is hashed here before it is believed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timbre_store.digests import verify_bytes, verify_file
from timbre_store.errors import InvalidAdapter, UnsafeFile
from timbre_store.finite import check_values
from timbre_store.inspection import Inspect
from timbre_store.limits import StoreLimits
from timbre_store.manifest import Manifest
from timbre_store.safetensors_header import read_header
from timbre_store.strict_json import read_object

CONFIG_NAME = "adapter_config.json"
_MAX_PEFT_TYPE_LENGTH = 64


@dataclass(frozen=True, slots=True)
class UploadedFiles:
    """Two blobs that claim to be an adapter."""

    config_digest: str
    config_path: Path
    tensors_digest: str
    tensors_path: Path
    derived_path: Path
    """Where what registration adds to them is or may be written."""


def examine(files: UploadedFiles, base_model: str | None, inspect: Inspect, limits: StoreLimits) -> Manifest:
    """Raises: InvalidAdapter or a subclass; DigestMismatch if a blob on disk is damaged."""
    config_content = _read_config(files, limits)
    config = read_object(config_content, what=CONFIG_NAME, max_depth=limits.max_config_depth)
    peft_type = _peft_type(config)
    verify_file(files.tensors_path, files.tensors_digest)
    header = read_header(files.tensors_path, limits)
    check_values(files.tensors_path, header)
    try:
        inspection = inspect(config, header, files.tensors_path, files.derived_path)
    except ValueError as error:
        raise InvalidAdapter(str(error)) from error
    return Manifest(
        method=inspection.method,
        peft_type=peft_type,
        base_model_digest=base_model,
        sites=inspection.sites,
        parameters=inspection.parameters,
        stored_bytes=len(config_content) + files.tensors_path.stat().st_size,
        prepared_bytes=inspection.prepared_bytes,
        config_digest=files.config_digest,
        tensors_digest=files.tensors_digest,
        virtual_tokens=inspection.virtual_tokens,
        invocation_tokens=inspection.invocation_tokens,
        row_copies=inspection.row_copies,
        scouts=inspection.scouts,
    )


def _read_config(files: UploadedFiles, limits: StoreLimits) -> bytes:
    with files.config_path.open("rb") as file:
        content = file.read(limits.max_config_bytes + 1)
    if len(content) > limits.max_config_bytes:
        raise UnsafeFile(f"{CONFIG_NAME} has more than {limits.max_config_bytes} bytes")
    verify_bytes(content, files.config_digest)
    return content


def _peft_type(config: dict[str, Any]) -> str | None:
    peft_type = config.get("peft_type")
    if peft_type is None:
        return None
    if not isinstance(peft_type, str) or len(peft_type) > _MAX_PEFT_TYPE_LENGTH:
        raise UnsafeFile(f"{CONFIG_NAME} has peft_type {str(peft_type)[:80]!r}; expected a short string")
    return peft_type
