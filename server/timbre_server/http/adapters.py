"""Adapters as a client manages them: upload, list, look at, alias, delete.

A name is resolved by the store alone; deleting takes the name away at once, and the memory when the last
request that uses the adapter has ended.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import structlog
from fastapi import APIRouter, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BeforeValidator, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from timbre_server.engine.pin_messages import PinnedAdapter
from timbre_server.errors import AdapterMismatch, InvalidRequest, ServerError
from timbre_server.http.bounds import FewFields, fields
from timbre_server.http.json_bodies import JSON_ONLY, JsonRoute, parse_json
from timbre_server.http.upload import CONFIG_PART, MAX_TEXT_BYTES, TENSORS_PART, read_adapter_form
from timbre_store.digests import is_digest
from timbre_store.errors import BlobTooLarge, NameConflict, StoreError
from timbre_store.records import AdapterRecord
from timbre_store.store import Store

MAX_CONFIG_BYTES = 1 << 20
MAX_JSON_BYTES = 1 << 16
MAX_FILES = 8
MAX_PAGE = 1000


@dataclass(frozen=True, slots=True)
class AdapterRoom:
    """What the adapter routes are given."""

    store: Store
    base_names: tuple[str, ...]
    """No adapter may be called so."""
    base_digest: str
    max_upload_bytes: int
    retirement: Retirement
    on_upload: Callable[[AdapterRecord | None], None]
    """Told of each adapter that came in; None for one that was refused."""
    pinned: Callable[[], PinnedAdapter | None] = lambda: None
    """What the engine keeps merged."""


class RegisterBody(FewFields):
    """An adapter made of two blobs that are already here."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=MAX_TEXT_BYTES)
    files: Annotated[dict[str, str], BeforeValidator(fields(MAX_FILES))]
    base_model: str | None = Field(None, max_length=MAX_TEXT_BYTES)


class AliasBody(FewFields):
    model_config = ConfigDict(extra="forbid")

    alias: str = Field(max_length=MAX_TEXT_BYTES)


class Retirement:
    """Has deleted adapters dropped from the engine's memory, each once nobody uses it any more."""

    def __init__(self, unload: Callable[[str], Awaitable[None]]) -> None:
        self._unload = unload
        self._tasks: set[asyncio.Task[None]] = set()
        self._log = structlog.get_logger("timbre.adapters")

    def begin(self, digests: Iterable[str]) -> tuple[asyncio.Task[None], ...]:
        """Starts, and lets the caller wait for the end by awaiting the tasks."""
        tasks = tuple(asyncio.create_task(self._retire(digest)) for digest in digests)
        for task in tasks:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return tasks

    async def close(self) -> None:
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _retire(self, digest: str) -> None:
        try:
            await self._unload(digest)
        except ServerError as error:
            self._log.warning("unload_failed", digest=digest, message=str(error))


def adapter_json(record: AdapterRecord) -> dict[str, Any]:
    """An adapter as all answers show it."""
    manifest = record.manifest
    return {
        "id": f"{record.name}@{record.version}",
        "object": "adapter",
        "name": record.name,
        "version": record.version,
        "digest": record.digest,
        "created": int(record.created_s),
        "state": "ready",
        "method": manifest.method,
        "peft_type": manifest.peft_type,
        "base_model_digest": manifest.base_model_digest,
        "sites": list(manifest.sites),
        "parameters": manifest.parameters,
        "stored_bytes": manifest.stored_bytes,
        "prepared_bytes": manifest.prepared_bytes,
        "virtual_tokens": manifest.virtual_tokens,
        "invocation_tokens": list(manifest.invocation_tokens),
        "row_copies": manifest.row_copies,
        "scouts": manifest.scouts,
        "recipe": None if manifest.recipe is None else manifest.recipe.to_raw(),
        "files": {CONFIG_PART: manifest.config_digest, TENSORS_PART: manifest.tensors_digest},
    }


def pinned_json(pinned: PinnedAdapter | None) -> dict[str, Any] | None:
    """How an adapter is pinned; None: it is not."""
    if pinned is None:
        return None
    return {"mode": "merged", "sites": pinned.num_sites, "bytes": pinned.merged_bytes}


async def register(
    room: AdapterRoom, name: str, digests: dict[str, str], base_model: str | None
) -> AdapterRecord:
    """Checks two stored blobs and gives them the name's next version.

    Raises: NameConflict for a base model's name; AdapterMismatch for another base; as `Store.register`.
    """
    if name in room.base_names:
        raise NameConflict(f"{name!r} is the base model's name; choose another for the adapter")
    if base_model is not None and base_model not in (*room.base_names, room.base_digest):
        raise AdapterMismatch(
            f"the adapter is for {base_model[:120]!r}, but this server serves {room.base_names[0]!r}",
            param="base_model",
        )
    return await run_in_threadpool(
        room.store.register, name, digests[CONFIG_PART], digests[TENSORS_PART], room.base_digest
    )


def adapter_router(room: AdapterRoom) -> APIRouter:
    """All routes under ``/v1/adapters``."""
    router = APIRouter(prefix="/v1/adapters", tags=["adapters"], route_class=JsonRoute)
    _add_upload(router, room)
    _add_reading(router, room)
    _add_changes(router, room)
    return router


def _add_upload(router: APIRouter, room: AdapterRoom) -> None:
    @router.post("", status_code=201)
    async def upload(request: Request) -> Response:
        """Stores an adapter: a form with its two files, or JSON with the digests of two stored blobs."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        try:
            if kind == "multipart/form-data":
                record = await _register_form(request, room)
            elif kind == "application/json":
                record = await _register_blobs(request, room)
            else:
                raise HTTPException(
                    415, "The body must be multipart/form-data with two files, or application/json."
                )
        except (StoreError, ServerError, HTTPException, RequestValidationError):
            room.on_upload(None)
            raise
        room.on_upload(record)
        headers = {"Location": f"/v1/adapters/{record.name}@{record.version}"}
        return JSONResponse(adapter_json(record), status_code=201, headers=headers)


async def _register_form(request: Request, room: AdapterRoom) -> AdapterRecord:
    limits = {CONFIG_PART: MAX_CONFIG_BYTES, TENSORS_PART: room.max_upload_bytes}
    with room.store.begin_upload() as upload:
        form = await read_adapter_form(
            request.headers["content-type"], request.stream(), upload, max_bytes_by_file=limits
        )
        return await register(room, form.texts["name"], form.digests, form.texts.get("base_model"))


async def _register_blobs(request: Request, room: AdapterRoom) -> AdapterRecord:
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > MAX_JSON_BYTES:
            raise BlobTooLarge(f"the JSON body has more than {MAX_JSON_BYTES} bytes")
    try:
        body = RegisterBody.model_validate(parse_json(content))
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False)) from error
    if body.files.keys() != {CONFIG_PART, TENSORS_PART}:
        found = ", ".join(sorted(body.files))[:200] or "none"
        raise InvalidRequest(
            f"The files are {found}; expected the digests of {CONFIG_PART} and {TENSORS_PART}.", param="files"
        )
    for part, digest in body.files.items():
        if not is_digest(digest):
            raise InvalidRequest(
                f"files.{part} is {digest[:100]!r}; expected sha256:<64 hex digits>", param=f"files.{part}"
            )
    return await register(room, body.name, body.files, body.base_model)


def _add_reading(router: APIRouter, room: AdapterRoom) -> None:
    store = room.store

    @router.get("")
    async def list_adapters(
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
        after: Annotated[str | None, Query(max_length=MAX_TEXT_BYTES)] = None,
    ) -> Response:
        """The latest version of each name, in order of names; go on with ``after`` = ``last_id``."""
        page = await run_in_threadpool(store.list, limit, after)
        names = [record.name for record in page.items]
        return JSONResponse(
            {
                "object": "list",
                "data": [adapter_json(record) for record in page.items],
                "first_id": names[0] if names else None,
                "last_id": names[-1] if names else None,
                "has_more": page.next_after is not None,
            }
        )

    @router.get("/{reference}")
    async def show(reference: str) -> Response:
        """One adapter by name, name@version, name@sha256:… or alias, with its name's versions and aliases."""
        record = await run_in_threadpool(store.get, reference)
        versions = await run_in_threadpool(store.versions, record.name)
        aliases = await run_in_threadpool(store.aliases, record.name)
        pinned = room.pinned()
        return JSONResponse(
            {
                **adapter_json(record),
                "pinned": pinned_json(pinned if pinned and pinned.digest == record.digest else None),
                "versions": [{"version": item.version, "digest": item.digest} for item in versions],
                "aliases": [{"alias": item.alias, "target": item.target} for item in aliases],
            }
        )


def _add_changes(router: APIRouter, room: AdapterRoom) -> None:
    @router.put("/{reference}/alias", dependencies=[JSON_ONLY])
    async def set_alias(reference: str, body: AliasBody) -> Response:
        """Points an alias, new or old, at ``name`` (its latest version, always) or at ``name@version``."""
        if body.alias in room.base_names:
            raise NameConflict(f"{body.alias!r} is the base model's name; choose another for the alias")
        record = await run_in_threadpool(room.store.set_alias, body.alias, reference)
        return JSONResponse({"alias": body.alias, "target": reference, **adapter_json(record)})

    @router.delete("/{reference}")
    async def delete(reference: str, wait: bool = False) -> Response:
        """Deletes an adapter, one version of it, or an alias.

        The name is gone at once, the memory when the last request that uses it has ended; ``wait=true``
        answers only then.
        """
        digests = await run_in_threadpool(room.store.delete, reference)
        tasks = room.retirement.begin(digests)
        if wait:
            await asyncio.gather(*(asyncio.shield(task) for task in tasks))
        return JSONResponse({"id": reference, "object": "adapter", "deleted": True, "digests": list(digests)})
