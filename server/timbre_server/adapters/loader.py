"""Reads one adapter from the store and prepares it, off the step loop.

Nothing here touches the running batch: a load ends in a `LoadedAdapter`, which the loop places between
two steps, or in an `AdapterLoadFailed`.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Thread
from typing import cast
from weakref import ref

import torch
from safetensors import SafetensorError
from torch import Tensor

from timbre_methods.contract import Sites
from timbre_methods.errors import MethodError
from timbre_methods.program import AdapterProgram, owned_tensors
from timbre_methods.prompt_contract import NO_FRAME, Frame
from timbre_methods.registry import compile_adapter, method_for, methods
from timbre_server.adapters.packed_sites import PackedSites
from timbre_server.adapters.placement import AS_GIVEN, Layout, placed_program
from timbre_server.adapters.tensor_views import tensors_in
from timbre_server.adapters.transfer import transfer_to
from timbre_server.errors import AdapterLoadFailed
from timbre_store.errors import StoreError
from timbre_store.manifest import Manifest
from timbre_store.reader import AdapterFiles, open_adapter, read_blob

MAX_ROOM_BYTES = 64 << 20
"""Of what is kept to read files into."""


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """A prepared adapter, on its device and owned by nobody else."""

    digest: str
    method: str
    program: AdapterProgram
    seconds_by_phase: dict[str, float]
    prepared_bytes: int = field(init=False)
    """The program's, as below; counted once, where it holds up no step."""
    shared_bytes: dict[int, int] = field(init=False)

    def __post_init__(self) -> None:
        sites, program = self.program.sites, self.program
        if isinstance(sites, PackedSites):
            program = replace(program, sites={})
            prepared_bytes = sites.prepared_bytes + program.prepared_bytes
            shared_bytes = sites.shared_bytes  # What acts outside of sites shares nothing.
        else:
            prepared_bytes, shared_bytes = program.prepared_bytes, program.shared_bytes
        object.__setattr__(self, "prepared_bytes", prepared_bytes)
        object.__setattr__(self, "shared_bytes", shared_bytes)


class AdapterLoader:
    """Loads adapters for one base model. Stateless between loads; safe to call from any thread."""

    def __init__(
        self,
        store_root: Path,
        base_model_digest: str,
        sites: Sites,
        device: torch.device | str = "cpu",
        frame: Frame = NO_FRAME,
        groups: Sequence[Sequence[str]] = (),
        layout: Layout = AS_GIVEN,
    ) -> None:
        """``groups``: paths of layers that read one input and are bound together."""
        self._store_root = store_root
        self._base_model_digest = base_model_digest
        self._sites = sites
        self._frame = frame
        self._transfer = transfer_to(torch.device(device))
        self._groups, self._layout = groups, layout
        self._rooms: deque[bytearray] = deque(maxlen=1)
        """What a file was read into, if nothing is there any more."""
        # A second of imports, that no load shall wait for.
        Thread(target=methods, name="read-methods").start()

    def load(self, digest: str) -> LoadedAdapter:
        """Read, verify, compile and place one adapter. Raises `AdapterLoadFailed`, and nothing else, for
        an adapter that is gone, damaged, or bound to another base."""
        seconds: dict[str, float] = {}
        try:
            with _timed(seconds, "verify"):
                files = open_adapter(self._store_root, digest)
                if files.manifest.base_model_digest != self._base_model_digest:
                    raise AdapterLoadFailed(
                        f"adapter {digest} was made for the base {files.manifest.base_model_digest}, "
                        f"this server runs {self._base_model_digest}: upload it to this server"
                    )
            with self._tensors(files, seconds) as tensors:
                # Methods read the base's own weights on its device, too.
                with _timed(seconds, "compile"), torch.inference_mode(), self._transfer.aside():
                    program = compile_adapter(files.config, tensors, self._sites, self._frame)
                    _check_promises(files.manifest, program)
                with _timed(seconds, "place"), torch.inference_mode(), self._transfer.aside():
                    program = placed_program(program, self._transfer, self._groups, self._layout)
                    _check_finite(digest, program)
        except (StoreError, MethodError, SafetensorError, OSError) as error:
            raise AdapterLoadFailed(f"adapter {digest} could not be loaded: {error}") from error
        return LoadedAdapter(digest, method_for(files.config).name, program, seconds)

    @contextmanager
    def _tensors(self, files: AdapterFiles, seconds: dict[str, float]) -> Iterator[dict[str, Tensor]]:
        """Verified. Where nothing holds on to any of them afterwards, the next load reads into their memory:
        a file's worth of fresh pages takes longer than to read it."""
        with _timed(seconds, "verify"):
            room: bytearray | None = None
            with suppress(IndexError):
                room = self._rooms.pop()
            content = read_blob(files.tensors_path, files.manifest.tensors_digest, room)
            tensors = tensors_in(content)
            if files.derived_path is not None:
                tensors |= tensors_in(read_blob(files.derived_path, files.manifest.derived_digest or ""))
        yield tensors
        tensors.clear()
        room, held = cast(bytearray, content.obj), ref(content)
        del content
        if held() is None and len(room) <= MAX_ROOM_BYTES:
            self._rooms.append(room)


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start


def _check_promises(manifest: Manifest, program: AdapterProgram) -> None:
    """Requests were laid out by what the manifest says: rows that are the adapter's must be so here, too."""
    said = (manifest.virtual_tokens, manifest.invocation_tokens, manifest.row_copies, manifest.scouts)
    found = (
        program.virtual_tokens,
        program.invocation_tokens,
        program.row_copies,
        program.scout is not None,
    )
    if said != found:
        raise AdapterLoadFailed(
            f"adapter {manifest.digest}: its manifest says {said[0]} virtual tokens, invocation tokens "
            f"{said[1][:32]}, {said[2]} copies of each row and scouts={said[3]}, its files {found[0]}, "
            f"{found[1][:32]}, {found[2]} and {found[3]}: upload it again"
        )


def _check_finite(digest: str, program: AdapterProgram) -> None:
    """Finite values may overflow where they are multiplied, or rounded; every answer would then be an error.
    Bases that adapters share have been looked at where they were made."""
    sites = program.sites
    if isinstance(sites, PackedSites) and all(map(_is_finite, sites.numbers)):
        program = replace(program, sites={})
    owned = ((place, tensor) for place, part in program.placed_parts() for tensor in owned_tensors(part))
    for place, tensor in owned:
        if not _is_finite(tensor):
            held = str(tensor.dtype).removeprefix("torch.")
            raise AdapterLoadFailed(
                f"adapter {digest} cannot be used: at {place} its values come to more than {held} holds; "
                "train it with smaller ones"
            )


def _is_finite(tensor: Tensor) -> bool:
    """A sum is finite of finite numbers alone, but may overflow where they are large; a NaN is the least and
    the most of them. Nobody can tell on the meta device."""
    if not tensor.is_floating_point() or tensor.is_meta or math.isfinite(tensor.sum()):
        return True
    return all(map(math.isfinite, torch.aminmax(tensor)))
