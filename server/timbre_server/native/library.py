"""The C++ kernels as one shared library: compiled at the first start on a machine, then taken from a cache.

Compiled for the very processor, without Python's or PyTorch's headers, and called with addresses of tensors.
OpenMP's runtime is the one that PyTorch has loaded, so that both share their threads; where PyTorch has
another, the kernels run on one thread.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import struct
import subprocess
import tempfile
import time
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from timbre_server.native.notes import KernelCall, notable

COMPILERS = ("g++", "clang++")
SOURCES = Path(__file__).with_name("source")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-Wall", "-Wextra")
_COMPILER_TIMEOUT_S = 300
_UNUSED_S = 30 * 24 * 3600.0
"""A library in the cache that nobody loaded for so long is removed when another is built."""
_BUILDING = "building-"
"""How the name of a folder begins where one is built: what a killed build has left goes in the same way."""

ADDRESS, NUMBER, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
"""Of arguments of a `kernel`."""


class ROWS(ctypes.c_int64):
    """Of one that counts the rows that a kernel reads, or the numbers in them: what lies where is the same
    for fewer of them."""


class LibraryUnavailable(Exception):
    """There can be none on this machine; the message says why and what to do."""


@cache
def library() -> ctypes.CDLL:
    """The library, built if need be. Raises: LibraryUnavailable."""
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise LibraryUnavailable(f"no C++ compiler was found; install one of {', '.join(COMPILERS)}")
    runtime = _openmp_runtime() if "clang" not in Path(compiler).name else None
    try:
        name = f"kernels-{_fingerprint(compiler, runtime)}.so"
        folder = _cache_folder()
        if folder is not None:
            built = folder / name
            try:
                loaded = ctypes.CDLL(str(built))
            except OSError:  # There is none, or a damaged one.
                _build(compiler, runtime, built)
                _remove_unused(folder)
                return ctypes.CDLL(str(built))
            with suppress(OSError):  # Whoever may read it need not own it.
                os.utime(built)
            return loaded
        with tempfile.TemporaryDirectory() as temporary:
            built = Path(temporary) / name
            _build(compiler, runtime, built)
            return ctypes.CDLL(str(built))
    except (OSError, subprocess.SubprocessError) as error:
        raise LibraryUnavailable(f"the C++ kernels could not be built with {compiler}: {error}") from error


def is_loaded() -> bool:
    """Whether something has asked for it, and got it: what works without builds none."""
    return library.cache_info().currsize > 0


@cache
def kernel(name: str, *types: type[Any]) -> Callable[..., None]:
    """A kernel of the library, of arguments of these types and the number of threads: plain integers may be
    given for all, which takes less time than to make objects of ctypes for each call.

    Raises: LibraryUnavailable.
    """
    found = getattr(library(), name)
    found.argtypes = (*(NUMBER if each is ROWS else each for each in types), ctypes.c_int)
    found.restype = None
    played = ctypes.cast(getattr(library(), f"{name}_played"), ADDRESS).value
    assert played is not None
    words = struct.Struct("".join("f4x" if each is REAL else "q" for each in found.argtypes))
    counts = [n for n, each in enumerate(types) if each is ROWS]

    def written(args: Sequence[Any], num_rows: int) -> KernelCall:
        counted = [(n, args[n] // num_rows) for n in counts if args[n] % num_rows == 0]
        own = words.pack(*(0 if each is None else each for each in args))
        return KernelCall(played, array("q", own), counted)

    return notable(found, written)


@cache
def least_work() -> ctypes.c_int64:
    """Multiplications below which waking other threads costs more than they do, as kernels read it."""
    return NUMBER.in_dll(library(), "timbre_least_work")


def num_threads(work: int) -> int:
    """For so many multiplications."""
    return torch.get_num_threads() if work >= least_work().value else 1


def compute_alone() -> None:
    """From now on, what this thread computes takes one processor, and no other thread takes part.

    For threads beside the one that steps. OpenMP lets threads wait for each other awake only while it has
    no more of them than there are processors, counting every thread that ever shared work and those it shared
    it with; else they sleep between two kernels of a step, and a kernel's start takes 10 µs in place of one.
    """
    torch.set_num_threads(1)


def least_count(work: int) -> int:
    """Of things with so many multiplications each, for which other threads are worth waking."""
    return -(-least_work().value // max(work, 1))


def _openmp_runtime() -> Path | None:
    """GNU's runtime as PyTorch brings it."""
    return next((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"), None)


def _cache_folder() -> Path | None:
    """A folder that nobody else can write to, since what lies there is run; None: there is none."""
    try:
        folder = Path.home() / ".cache" / "timbre"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError):
        return None
    is_own = found.st_uid == os.geteuid() and not found.st_mode & 0o022
    is_safe = is_own and all(map(_is_kept, folder.resolve().parents))
    return folder if is_safe and os.access(folder, os.W_OK) else None


def _is_kept(folder: Path) -> bool:
    """Whether nobody else can put another folder in the place of one in it."""
    found = folder.stat()
    is_shared = found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX
    return found.st_uid in (0, os.geteuid()) and not is_shared


def _fingerprint(compiler: str, runtime: Path | None) -> str:
    """Of all that the library follows from."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    known = [*_FLAGS, compiler, version.decode(errors="replace"), str(runtime), _processor()]
    digest = hashlib.sha256("\n".join(known).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:24]


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return f"{platform.machine()} {platform.processor()}"
    told = ("model name", "flags", "Features", "CPU part")
    lines = cpuinfo.read_text(errors="replace").splitlines()
    return "\n".join(sorted({line for line in lines if line.startswith(told)}))


def _build(compiler: str, runtime: Path | None, target: Path) -> None:
    """Appears at ``target`` whole, whoever else builds it at the same time."""
    with tempfile.TemporaryDirectory(prefix=_BUILDING, dir=target.parent) as folder:
        threads = ["-fopenmp"] if runtime is not None else []

        def compiled(source: Path) -> str:
            target = f"{folder}/{source.stem}.o"
            _run([compiler, *_FLAGS, *threads, "-c", str(source), "-o", target])
            return target

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compiled, sorted(SOURCES.glob("*.cpp"))))
        linked = f"{folder}/linked.so"
        libraries = [str(runtime)] if runtime is not None else []
        _run([compiler, "-shared", *objects, *libraries, "-o", linked])
        with open(linked, "rb") as written:
            os.fsync(written.fileno())  # To load a torn file would end the process.
        os.replace(linked, target)


def _remove_unused(folder: Path) -> None:
    """A process that has loaded a library keeps it; another may be removing the same."""
    before_s = time.time() - _UNUSED_S
    for left in (*folder.glob("kernels-*.so"), *folder.glob(f"{_BUILDING}*")):
        with suppress(OSError):
            if left.stat().st_mtime < before_s:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, check=False, timeout=_COMPILER_TIMEOUT_S)
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip()[-2000:]
        raise OSError(f"{' '.join(command[:2])} ... ended with status {done.returncode}: {last}")
