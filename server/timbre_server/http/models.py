"""``GET /v1/models``: the base model, and adapters by name and alias, as routers and SDKs read them."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query
from starlette.responses import Response

from timbre_server.http.answer import json_response
from timbre_server.http.context import ServingContext
from timbre_server.http.voice import resolve_voice
from timbre_store.records import AdapterRecord, Named

OWNER = "timbre"
MAX_PAGE = 1000


def models_router(context: ServingContext) -> APIRouter:
    router = APIRouter(tags=["openai"])

    @router.get("/v1/models", response_model=None)
    async def list_models(
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = MAX_PAGE,
        after: Annotated[str | None, Query(max_length=256)] = None,
    ) -> Response:
        """The base model's names first, then the names and aliases of adapters in one order. ``after``: an id
        of the list."""
        bases = list(context.base_names)
        if after is not None:
            bases = bases[bases.index(after) + 1 :] if after in bases else []
        data = [_base(context, name) for name in bases[:limit]]
        room = limit - len(data)
        has_more = len(bases) > len(data)
        if not has_more:
            cursor = None if after in context.base_names else after
            named, has_more = await _named(context, room, cursor)
            data += [_adapter(context, each.record, each.name) for each in named]
        ids = [entry["id"] for entry in data]
        return json_response(
            {
                "object": "list",
                "data": data,
                "first_id": ids[0] if ids else None,
                "last_id": ids[-1] if ids else None,
                "has_more": has_more,
            }
        )

    @router.get("/v1/models/{model:path}", response_model=None)
    async def get_model(model: str) -> Response:
        """One model: the base, or an adapter by any of its references."""
        voice = await resolve_voice(context, model, None)
        if not voice.mix:
            return json_response(_base(context, model))
        assert voice.alone is not None
        return json_response(_adapter(context, voice.alone, model), headers=voice.headers())

    return router


async def _named(context: ServingContext, limit: int, after: str | None) -> tuple[tuple[Named, ...], bool]:
    """The next names, and whether there are more. One is looked up even where none is wanted."""
    page = await asyncio.to_thread(context.list_names, max(limit, 1), after)
    if limit == 0:
        return (), bool(page.items)
    return page.items, page.next_after is not None


def _base(context: ServingContext, name: str) -> dict[str, Any]:
    return _model(name, context.started_s, context.base_names[0], None, context)


def _adapter(context: ServingContext, record: AdapterRecord, name: str) -> dict[str, Any]:
    """``name`` may be an alias; ``root`` is what it leads to now."""
    root = f"{record.name}@{record.digest}"
    model = _model(name, int(record.created_s), root, context.base_names[0], context)
    identity = {"name": record.name, "version": record.version, "digest": record.digest}
    return model | {"adapter": identity | {"method": record.manifest.method}}


def _model(name: str, created: int, root: str, parent: str | None, context: ServingContext) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": OWNER,
        "root": root,
        "parent": parent,
        "max_model_len": context.engine.info.max_model_len,
        "permission": [],
    }
