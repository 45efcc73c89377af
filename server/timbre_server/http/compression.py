"""``POST /v1/recipes/compress``: LoRAs that shall share one basis, each under a name of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from pydantic import Field
from starlette.responses import JSONResponse, Response

from timbre_methods.errors import MethodError
from timbre_server.errors import InvalidRequest, ServerError
from timbre_server.http.adapters import adapter_json
from timbre_server.http.bounds import items
from timbre_server.http.json_bodies import JSON_ONLY, JsonRoute
from timbre_server.http.mixes import Wanted
from timbre_server.http.recipe_schema import MAX_RANK, Name, RecipePart
from timbre_server.http.recipes import (
    RecipeRoom,
    check_new_name,
    recipe_of,
    refuse_mixes,
    register_made,
    resolve_parents,
)
from timbre_store.errors import StoreError
from timbre_store.records import AdapterRecord

MAX_MEMBERS = 64


class MemberBody(RecipePart):
    parent: Name
    name: Name


class CompressBody(RecipePart):
    kind: Literal["joint_full", "joint_diagonal", "reversible"]
    rank: int = Field(ge=1, le=MAX_RANK)
    members: Annotated[list[MemberBody], items(MAX_MEMBERS, least=1)]


def compression_router(room: RecipeRoom) -> APIRouter:
    router = APIRouter(tags=["recipes"], route_class=JsonRoute)

    @router.post("/v1/recipes/compress", status_code=201, dependencies=[JSON_ONLY])
    async def compress(body: CompressBody) -> Response:
        """Stores each member's approximation in the shared basis; all of them or none."""
        try:
            records, answer = await _compressed(room, body)
        except (StoreError, ServerError, MethodError):
            room.on_recipe(body.kind, ())
            raise
        room.on_recipe(body.kind, records)
        return JSONResponse(answer, status_code=201)

    return router


async def _compressed(
    room: RecipeRoom, body: CompressBody
) -> tuple[tuple[AdapterRecord, ...], dict[str, Any]]:
    await _check_names(room, body.members)
    wanted = [
        Wanted(member.parent, 1.0, f"members.{index}.parent") for index, member in enumerate(body.members)
    ]
    parents = await resolve_parents(room, wanted)
    refuse_mixes(parents, wanted)
    recipe = replace(recipe_of(body.kind, parents), rank=body.rank)
    made = await room.compress(recipe, [parent.adapter for parent in parents])
    names = [member.name for member in body.members]
    records = await register_made(room, list(zip(names, made.members, strict=True)))
    members = [
        {
            **adapter_json(record),
            "relative_error": files.relative_error,
            "parent_prepared_bytes": parent.adapter.manifest.prepared_bytes,
        }
        for record, files, parent in zip(records, made.members, parents, strict=True)
    ]
    return records, {"object": "list", "basis_bytes": made.basis_bytes, "data": members}


async def _check_names(room: RecipeRoom, members: Sequence[MemberBody]) -> None:
    """Raises: InvalidName, NameConflict; InvalidRequest for a name given twice."""
    seen: set[str] = set()
    for index, member in enumerate(members):
        await check_new_name(room, member.name)
        if member.name in seen:
            raise InvalidRequest(f"the name {member.name!r} is given twice", param=f"members.{index}.name")
        seen.add(member.name)
