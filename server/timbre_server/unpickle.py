"""Writes the tensors of one pickle as safetensors, under limits on memory, time and files.

Run as a file, by `timbre_server.convert`, in a process of its own that imports nothing of ours; nothing
imports it. `torch.load` is told to make tensors and nothing else, which names code in the file by refusing
it; the limits stand should that fail. What it says is one line of JSON on standard output: the number of
``tensors`` and their ``bytes``, or the ``error``.
"""

from __future__ import annotations

import json
import resource
import sys
import zipfile
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

MiB = 2**20
MAX_GROWTH = 2
"""Tensors may share memory in the pickle, as tied weights do, and never in safetensors."""
SPARE_BYTES = 1024 * MiB
OPEN_FILES = 64
DTYPES = frozenset(
    {
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    }
)


class Refused(Exception):
    """The message says what was found and what to do."""


@dataclass(frozen=True, slots=True)
class Job:
    """What to read and what to make of it."""

    source: str
    target: str
    inside: list[str]
    """Keys to go down before the dict of tensors."""
    strip_prefix: str
    keep: list[str]
    """Patterns of names after that; all where there is none."""
    cpu_seconds: int

    @property
    def max_bytes(self) -> int:
        return MAX_GROWTH * Path(self.source).stat().st_size + MiB


def main(arguments: list[str]) -> int:
    job = Job(**json.loads(arguments[0]))
    try:
        _limit(job)
        tensors = chosen_tensors(job, read(job.source))
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, job.target)
    except Exception as error:  # noqa: BLE001  (torch.load raises a dozen kinds on damaged files)
        sys.stdout.write(json.dumps({"error": _told(error)}))
        return 1
    total = sum(tensor.nbytes for tensor in tensors.values())
    sys.stdout.write(json.dumps({"tensors": len(tensors), "bytes": total}))
    return 0


def _told(error: Exception) -> str:
    """What to say of it. torch names what a pickle would call after the word GLOBAL."""
    if isinstance(error, Refused):
        return str(error)
    words = str(error).split()
    code = next((after for word, after in pairwise(words) if word == "GLOBAL"), None)
    if code is not None:
        return (
            f"it calls {code[:100]}, which makes no tensor; nothing of it was run. Do not trust this file; "
            "if it is yours, save a dict of tensors alone"
        )
    if "weights_only" in str(error):  # What torch says then is how to run the file's code.
        return "it is no file of tensors that torch.save wrote, or it is cut short"
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return f"it cannot be read as tensors: {first.split('. ')[0][:300]}"


def _limit(job: Job) -> None:
    """From here on this process cannot use more, whatever the file makes it do."""
    torch.set_num_threads(1)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    memory = in_use + Path(job.source).stat().st_size + 2 * job.max_bytes + SPARE_BYTES
    for kind, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, job.cpu_seconds),
        (resource.RLIMIT_FSIZE, job.max_bytes + 64 * MiB),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        lowest = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (lowest, lowest))


def read(source: str) -> Any:
    """The whole pickle; of tensors in torch's present format no byte is read before it is used."""
    return torch.load(source, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(source))


def chosen_tensors(job: Job, whole: Any) -> dict[str, Tensor]:
    """The tensors to write, by their names in safetensors. Raises `Refused`."""
    found = whole
    for key in job.inside:
        if not isinstance(found, dict) or key not in found:
            raise Refused(f"it has no entry {key!r} to look inside; it {_description(found)}")
        found = found[key]
    if not isinstance(found, dict):
        raise Refused(f"it {_description(found)}, expected a dict of tensors by name")
    chosen: dict[str, Tensor] = {}
    total = 0
    for key, value in found.items():
        name = str(key).removeprefix(job.strip_prefix)
        if job.keep and not any(fnmatchcase(name, pattern) for pattern in job.keep):
            continue
        tensor = _checked(str(key), key, value)
        if name in chosen:
            raise Refused(f"two tensors are called {name[:200]!r} without their prefix")
        if name == "__metadata__":
            raise Refused("a tensor is called '__metadata__', a name that safetensors keeps for itself")
        total += tensor.nbytes
        if total > job.max_bytes:
            raise Refused(
                f"its tensors up to {name[:200]!r} need {total} bytes, far more than the file has; expected "
                f"at most {job.max_bytes}"
            )
        chosen[name] = tensor
    if not chosen:
        names = ", ".join(str(key)[:100] for key in list(found)[:4]) or "none"
        raise Refused(f"no tensor is left to convert; the first names are {names}")
    return chosen


def _checked(name: str, key: object, value: object) -> Tensor:
    """A plain tensor under a plain name."""
    if not isinstance(key, str):
        raise Refused(f"an entry is called {name[:200]}, {_article(key)}; expected a name")
    if not isinstance(value, Tensor):
        inside = f"; look into it with --inside {name[:200]}" if isinstance(value, dict) else ""
        raise Refused(
            f"{name[:200]!r} is {_article(value)}, expected a tensor{inside}; or leave it out with --keep"
        )
    if value.layout != torch.strided or value.is_quantized or value.dtype not in DTYPES:
        kind = "sparse" if value.layout != torch.strided else str(value.dtype).removeprefix("torch.")
        raise Refused(f"{name[:200]!r} is a tensor of a kind that no adapter has: {kind}")
    return value.detach()


def _article(value: object) -> str:
    kind = type(value).__name__
    return f"an {kind}" if kind[0] in "aeiouAEIOU" else f"a {kind}"


def _description(found: object) -> str:
    if isinstance(found, dict):
        return f"has {', '.join(str(key)[:100] for key in list(found)[:4]) or 'no entry'}"
    return f"is {_article(found)}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
