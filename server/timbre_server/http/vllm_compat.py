"""vLLM's two routes that load and unload a LoRA adapter from a folder beside the server, over our own store.

Off unless an operator names the folder that paths are confined to. A path is a client's text: it is resolved,
compared with the folder, and opened component by component without following links, so that nothing outside
can be reached, whatever changes in between.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path

from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response

from timbre_server.errors import AdapterLoadFailed, AdapterTooLarge, InvalidRequest
from timbre_server.http.adapters import MAX_CONFIG_BYTES, AdapterRoom, register
from timbre_server.http.json_bodies import JSON_ONLY, JsonRoute
from timbre_server.http.upload import CONFIG_PART, PIECE_BYTES, TENSORS_PART
from timbre_store.errors import NotFound, StoreError
from timbre_store.records import AdapterRecord
from timbre_store.upload import Upload

MAX_PATH_CHARS = 4096


class LoadBody(BaseModel):
    lora_name: str = Field("", max_length=512)
    lora_path: str = Field("", max_length=MAX_PATH_CHARS)
    load_inplace: bool = False
    is_3d_lora_weight: bool = False


class UnloadBody(BaseModel):
    lora_name: str = Field("", max_length=512)
    lora_int_id: int | None = None


def vllm_router(room: AdapterRoom, root: Path, load: Callable[[str], Awaitable[object]]) -> APIRouter:
    """The two routes. ``load(digest)`` brings an adapter into the engine's memory."""
    router = APIRouter(prefix="/v1", tags=["vllm"], dependencies=[JSON_ONLY], route_class=JsonRoute)

    @router.post("/load_lora_adapter")
    async def load_lora_adapter(body: LoadBody) -> Response:
        """Registers and loads the adapter in a folder below the configured one."""
        if not body.lora_name or not body.lora_path:
            raise InvalidRequest("Both 'lora_name' and 'lora_path' must be provided.")
        if body.lora_name in room.base_names:
            raise InvalidRequest(
                f"The name {body.lora_name!r} is the base model's; choose another.", param="lora_name"
            )
        before = await _latest(room, body.lora_name)
        if before is not None and not body.load_inplace:
            raise InvalidRequest(
                f"The lora adapter '{body.lora_name}' has already been loaded; see 'load_inplace'.",
                param="lora_name",
            )
        limits = {CONFIG_PART: MAX_CONFIG_BYTES, TENSORS_PART: room.max_upload_bytes}
        with room.store.begin_upload() as upload:
            digests = await run_in_threadpool(_copy_in, root, body.lora_path, upload, limits)
            record = await register(room, body.lora_name, digests, None)
        room.on_upload(record)
        try:
            await load(record.digest)
        except (AdapterLoadFailed, AdapterTooLarge):
            if before is None or before.version != record.version:  # As if it had not been asked for.
                freed = await run_in_threadpool(room.store.delete, f"{record.name}@{record.version}")
                room.retirement.begin(freed)
            raise
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post("/unload_lora_adapter")
    async def unload_lora_adapter(body: UnloadBody) -> Response:
        """Takes the name away; requests that run on it finish."""
        if not body.lora_name:
            raise InvalidRequest("'lora_name' must be provided.", param="lora_name")
        try:
            digests = await run_in_threadpool(room.store.delete, body.lora_name)
        except NotFound as error:
            raise HTTPException(404, f"The lora adapter '{body.lora_name}' cannot be found.") from error
        room.retirement.begin(digests)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return router


async def _latest(room: AdapterRoom, name: str) -> AdapterRecord | None:
    try:
        return await run_in_threadpool(room.store.resolve, name)
    except StoreError:
        return None


def _copy_in(root: Path, path: str, upload: Upload, limits: dict[str, int]) -> dict[str, str]:
    """The digests of the folder's two files, copied.

    Raises: HTTPException 404 for what is not a folder within the root that holds both; the answer does not
    tell whether something else is there.
    """
    digests = {}
    for name, max_bytes in limits.items():
        with ExitStack() as stack:
            try:
                descriptor = open_within(root, Path(path) / name)
                file = stack.enter_context(os.fdopen(descriptor, "rb", buffering=0))
            except (OSError, ValueError) as error:
                raise HTTPException(
                    404,
                    f"No adapter found in {path[:200]!r}; expected a folder with {name} in the served one.",
                ) from error
            writer = stack.enter_context(upload.begin_blob(max_bytes))
            while piece := file.read(PIECE_BYTES):
                writer.write(piece)
            digests[name] = writer.commit()
    return digests


def open_within(root: Path, path: Path) -> int:
    """A descriptor of a regular file below ``root``, for reading.

    Links are followed only as far as they stay below the root.

    Raises: OSError, ValueError.
    """
    real_root = Path(os.path.realpath(root))
    real = Path(os.path.realpath(real_root / path, strict=True))
    parts = real.relative_to(real_root).parts
    if not parts:
        raise OSError("a folder, not a file")
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    current = os.open(real_root, flags | os.O_DIRECTORY)
    try:
        for part in parts[:-1]:
            current, parent = os.open(part, flags | os.O_DIRECTORY, dir_fd=current), current
            os.close(parent)
        descriptor = os.open(parts[-1], flags, dir_fd=current)
    finally:
        os.close(current)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("not a regular file")
    return descriptor
