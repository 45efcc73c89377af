"""``/v1/adapters/{name}/pin``: the one adapter, or named mix, that a replica keeps merged.

An operator's decision, for an adapter that has most of the traffic; off unless the server was started with
it. A pin is of the digest that the name led to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import ConfigDict
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from timbre_server.engine.client import Engine
from timbre_server.engine.pin_messages import PinnedAdapter
from timbre_server.errors import AdapterMismatch, PinConflict
from timbre_server.http.adapters import adapter_json, pinned_json
from timbre_server.http.bounds import FewFields
from timbre_server.http.json_bodies import JSON_ONLY, JsonRoute
from timbre_server.http.mixes import WeightedAdapter, summable
from timbre_store.records import AdapterRecord

OFF = "Pinning is off on this server; start it with --allow-merged-pin."


@dataclass(frozen=True, slots=True)
class PinRoom:
    """What the pins' routes are given."""

    engine: Engine
    resolve: Callable[[str], AdapterRecord]
    """As requests resolve names. Blocking; called in a thread. Raises: NotFound."""
    name_of: Callable[[str], str | None]
    """What a digest was last asked for by."""
    is_allowed: bool


class PinBody(FewFields):
    model_config = ConfigDict(extra="forbid")

    mode: Literal["merged"]


def pin_router(room: PinRoom) -> APIRouter:
    router = APIRouter(prefix="/v1/adapters", tags=["adapters"], route_class=JsonRoute)

    @router.post("/{reference}/pin", dependencies=[JSON_ONLY])
    async def pin(reference: str, body: PinBody) -> Response:
        """Answers when the adapter is merged. Raises: PinConflict beside another pin; PinNotServed."""
        record = await _resolved(room, reference)
        pinned = room.engine.latest.pinned
        if pinned is not None and pinned.digest != record.digest:
            raise PinConflict(
                f"{_called(room, pinned)} is pinned, and one is pinned at a time; unpin it first"
            )
        pinned = await room.engine.pin_adapter(record.digest, _mix(room, record))
        return JSONResponse(_body(record, pinned))

    @router.delete("/{reference}/pin")
    async def unpin(reference: str) -> Response:
        """Answers when the merged weights are gone. Raises: PinConflict where it is not pinned."""
        record = await _resolved(room, reference)
        pinned = room.engine.latest.pinned
        if pinned is not None and pinned.digest != record.digest:
            raise PinConflict(f"{record.name}@{record.version} is not pinned; {_called(room, pinned)} is")
        await room.engine.unpin_adapter(record.digest)
        return JSONResponse(_body(record, None))

    return router


async def _resolved(room: PinRoom, reference: str) -> AdapterRecord:
    if not room.is_allowed:
        raise HTTPException(403, OFF)
    record = await run_in_threadpool(room.resolve, reference)
    made_for, served = record.manifest.base_model_digest, room.engine.info.model_digest
    if made_for not in (None, served):
        raise AdapterMismatch(
            f"adapter {record.name}@{record.version} was made for the base model {made_for}; this server "
            f"serves {served}"
        )
    return record


def _mix(room: PinRoom, record: AdapterRecord) -> tuple[tuple[str, float], ...]:
    """What a request of that name is told to the engine as. Raises: MixNotServed."""
    if not record.parts:
        return ((record.digest, 1.0),)
    parts = [WeightedAdapter(part.adapter, part.weight) for part in record.parts]
    acting = summable(parts, room.engine.info.adapter_budget_bytes, "reference")
    return tuple((each.adapter.digest, each.weight) for each in acting)


def _called(room: PinRoom, pinned: PinnedAdapter) -> str:
    name = room.name_of(pinned.digest)
    return pinned.digest if name is None else f"{name} ({pinned.digest})"


def _body(record: AdapterRecord, pinned: PinnedAdapter | None) -> dict[str, Any]:
    return {**adapter_json(record), "pinned": pinned_json(pinned)}
