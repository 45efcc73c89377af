"""X-LoRA as PEFT trains it, a folder of a classifier and one of each expert, packed as one adapter."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
CLASSIFIER = "base_model.internal_xlora_classifier.layers."
ENDINGS = (".lora_A.weight", ".lora_B.weight")


def xlora(folder: str | Path, source: str | Path, experts: Sequence[str | Path] | None = None) -> Path:
    """Pack ``source``, where PEFT saved the classifier, and the experts' folders into ``folder``; returns it.

    ``experts`` are the folders in the order of the classifier's outputs; without them they are those below
    ``source`` that are named 0, 1, ... The paths in its config are the trainer's and are not read. All
    tensors keep their dtypes and bytes.

    Nothing is written before all is read. Raises ValueError for a classifier that is not whole, a wrong
    number of experts and one that is no plain LoRA on linear layers, FileNotFoundError for a missing file.
    """
    origin, target = Path(source), Path(folder)
    config = _config(origin, "XLORA")
    count = len(config.get("adapters") or {})
    folders = (
        [Path(each) for each in experts] if experts is not None else [origin / str(e) for e in range(count)]
    )
    if not folders or len(folders) != count:
        raise ValueError(f"{origin / CONFIG} names {count} adapters, found {len(folders)} folders of experts")
    if target.resolve() in {each.resolve() for each in (origin, *folders)}:
        raise ValueError(f"{target} is one of the folders that are packed; choose another")
    own = {str(e): _config(each, "LORA") for e, each in enumerate(folders)}
    files = [(origin / TENSORS, _classifier_name), *((f / TENSORS, _namer(e)) for e, f in enumerate(folders))]
    content, text = _joined(files), json.dumps({**config, "adapters": own}, indent=2, sort_keys=True)
    target.mkdir(parents=True, exist_ok=True)
    (target / CONFIG).write_text(text + "\n")
    (target / TENSORS).write_bytes(content)
    return target


def _config(folder: Path, peft_type: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    if config.get("peft_type") != peft_type:
        found = config.get("peft_type")
        raise ValueError(f"{folder / CONFIG}: peft_type: found {found!r}, expected {peft_type!r}")
    return config


def _classifier_name(name: str) -> str:
    if not name.startswith(CLASSIFIER):
        raise ValueError(
            f"{name!r} is no tensor of a classifier; expected names that begin with {CLASSIFIER!r}"
        )
    return name


def _namer(number: int) -> Callable[[str], str]:
    """From an expert's names to those of the packed file."""

    def named(name: str) -> str:
        ending = next((ending for ending in ENDINGS if name.endswith(ending)), None)
        if ending is None:
            raise ValueError(f"expert {number}: {name!r} is no factor of a LoRA on a linear layer")
        return f"{name.removesuffix(ending)}.experts.{number}{ending}"

    return named


def _joined(files: Sequence[tuple[Path, Callable[[str], str]]]) -> bytes:
    """One safetensors file of several, each tensor under its new name."""
    header: dict[str, Any] = {}
    pieces: list[bytes] = []
    start = 0
    for path, named in files:
        content = path.read_bytes()
        for name, entry in _entries(content):
            begin, end = entry["data_offsets"]
            header[named(name)] = {**entry, "data_offsets": [start + begin, start + end]}
        pieces.append(content[8 + _header_size(content) :])
        start += len(pieces[-1])
    if f"{CLASSIFIER}0.weight" not in header:
        raise ValueError(
            f"{files[0][0]} lacks {CLASSIFIER}0.weight: PEFT leaves a classifier's layer out where its "
            "number is an expert's name; save what model.state_dict() has of internal_xlora_classifier there"
        )
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([struct.pack("<Q", len(text)), text, *pieces])


def _entries(content: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    header: dict[str, Any] = json.loads(content[8 : 8 + _header_size(content)])
    yield from ((name, entry) for name, entry in header.items() if name != "__metadata__")


def _header_size(content: bytes) -> int:
    if len(content) < 8:
        raise ValueError(f"{len(content)} bytes are no safetensors file")
    (size,) = struct.unpack("<Q", content[:8])
    return int(size)
