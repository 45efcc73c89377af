"""``timbre convert``: from a pickle of tensors, as other tools save adapters, to an adapter's two files.

A pickle is a program, so it is read in a process of its own, which can make nothing but tensors of it and
has limits (`unpickle`). This module reads no byte of it, and needs no server.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PICKLES = (".bin", ".pt", ".pth")
PROGRAM = Path(__file__).with_name("unpickle.py")
START_SECONDS = 120
"""Of processor time, for loading torch and for a small file."""
BYTES_A_SECOND = 20 * 2**20
"""What a slow machine converts at least."""

DESCRIPTION = (
    "Makes an adapter that the server takes, adapter_config.json and adapter_model.safetensors, of one whose "
    "tensors were saved with torch.save. A pickle is a program: this reads it in a process of its own, under "
    "limits, and refuses whatever is not a tensor without running it."
)
EPILOG = (
    "A whole model's checkpoint is reduced to its adapter with --inside, --strip-prefix and --keep: "
    "timbre convert model.pt adapter --inside state_dict --strip-prefix llm. --keep '*.lora_*' "
    "--config adapter_config.json"
)


class ConversionError(Exception):
    """The message says what was found and what to do."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """What to convert, as the command line says it."""

    source: Path
    target: Path
    config: Path | None
    inside: list[str]
    strip_prefix: str
    keep: list[str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.add_argument(
        "source", type=Path, help="a .bin, .pt or .pth file, or the folder that has one adapter_model.bin"
    )
    parser.add_argument("target", type=Path, help="the folder to write; it may not hold an adapter yet")
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="the config (default: adapter_config.json beside the source)",
    )
    parser.add_argument(
        "--inside",
        action="append",
        default=[],
        metavar="KEY",
        help="the tensors are in the entry of this name, as in state_dict; again for one inside of that",
    )
    parser.add_argument(
        "--strip-prefix",
        default="",
        metavar="TEXT",
        help="take this from the beginning of names that have it",
    )
    parser.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="PATTERN",
        help="keep tensors whose name, without that prefix, matches, as in '*.lora_*'; may be given again",
    )


def convert(wanted: Conversion) -> str:
    """Writes the two files and says what was written. On a failure no file is left behind.

    Raises `ConversionError`.
    """
    pickle, config = _pickle_of(wanted.source), _config_of(wanted)
    taken = next((name for name in (CONFIG, TENSORS) if (wanted.target / name).exists()), None)
    if taken is not None:
        raise ConversionError(f"{wanted.target / taken} exists already; name another folder")
    is_new = not wanted.target.exists()
    try:
        wanted.target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=wanted.target, prefix=".converting-") as folder:
            made = Path(folder) / TENSORS
            written = _run(wanted, pickle, made)
            (Path(folder) / CONFIG).write_bytes(config)
            for name in (TENSORS, CONFIG):
                os.replace(Path(folder) / name, wanted.target / name)
    except (ConversionError, OSError) as error:
        if is_new and wanted.target.is_dir():
            shutil.rmtree(wanted.target)
        raise ConversionError(str(error)) from None
    return f"{wanted.target}: {written['bytes']} bytes of tensors under {written['tensors']} names"


def _pickle_of(source: Path) -> Path:
    path = source / "adapter_model.bin" if source.is_dir() else source
    if not path.is_file():
        raise ConversionError(f"{path} is no file; expected one of {', '.join(PICKLES)}")
    if path.suffix not in PICKLES:
        raise ConversionError(f"{path} is not called as a pickle is; expected one of {', '.join(PICKLES)}")
    return path


def _config_of(wanted: Conversion) -> bytes:
    folder = wanted.source if wanted.source.is_dir() else wanted.source.parent
    path = wanted.config or folder / CONFIG
    if not path.is_file():
        raise ConversionError(
            f"there is no {path}; a server needs it, so write one for this method and name it with --config"
        )
    content = path.read_bytes()
    try:
        is_config = isinstance(json.loads(content), dict)
    except ValueError:
        is_config = False
    if not is_config:
        raise ConversionError(f"{path} is not JSON of an object")
    return content


def _run(wanted: Conversion, pickle: Path, made: Path) -> dict[str, Any]:
    """The numbers of what the other process has written."""
    seconds = START_SECONDS + pickle.stat().st_size // BYTES_A_SECOND
    job = {
        "source": str(pickle.resolve()),
        "target": str(made.resolve()),
        "inside": wanted.inside,
        "strip_prefix": wanted.strip_prefix,
        "keep": wanted.keep,
        "cpu_seconds": seconds,
    }
    command = [sys.executable, "-I", str(PROGRAM), json.dumps(job)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=4 * seconds)
    except subprocess.TimeoutExpired:
        raise ConversionError(f"{pickle}: it took more than {4 * seconds} seconds") from None
    try:
        said = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        raise ConversionError(f"{pickle}: {_end_of(done)}") from None
    if "error" in said:
        raise ConversionError(f"{pickle}: {said['error']}")
    return dict(said)


def _end_of(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return f"it needs more memory or time than its size explains; its reading was ended by {name}"
    last = done.stderr.strip().splitlines()
    return f"its reading ended with status {done.returncode}: {last[-1][:300] if last else 'no message'}"
