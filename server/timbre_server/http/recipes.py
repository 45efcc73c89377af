"""``POST /v1/recipes``: a new adapter made of stored ones, under a name of its own.

A recipe of kind ``linear`` is a named mix: nothing is computed, and a request that names it gets the weighted
sum that it could have written out. All other kinds make tensors, which go through the registration of every
upload: one LoRA, or a mixture whose experts the parents are. Nothing is stored unless all of it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from timbre_methods.errors import MethodError
from timbre_server.errors import AdapterMismatch, AdapterNotFound, InvalidRequest, ServerError
from timbre_server.http.adapters import adapter_json
from timbre_server.http.json_bodies import JSON_ONLY, JsonRoute
from timbre_server.http.mixes import Wanted, WeightedAdapter, expanded, refuse_twins, summable
from timbre_server.http.recipe_schema import READ, RecipeBody, check_fields
from timbre_server.made import Compress, MadeFiles, Merge
from timbre_store.errors import NameConflict, NotFound, StoreError
from timbre_store.recipe import Parent, Recipe
from timbre_store.records import AdapterRecord
from timbre_store.store import Store
from timbre_store.upload import Arrival

ARROW_TOP_K = 3
"""Unless a recipe says otherwise; PEFT's."""


@dataclass(frozen=True, slots=True)
class RecipeRoom:
    """What the recipes' routes are given."""

    store: Store
    base_names: tuple[str, ...]
    """No adapter may be called so."""
    base_digest: str
    adapter_budget_bytes: int
    merge: Merge
    compress: Compress
    on_recipe: Callable[[str, Sequence[AdapterRecord]], None]
    """Told the kind and what came of it; nothing where it was refused."""


def recipe_router(room: RecipeRoom) -> APIRouter:
    router = APIRouter(prefix="/v1/recipes", tags=["recipes"], route_class=JsonRoute)

    @router.post("", status_code=201, dependencies=[JSON_ONLY])
    async def create(body: RecipeBody) -> Response:
        """Makes an adapter of others and stores it as the name's next version."""
        try:
            record, relative_error = await _created(room, body)
        except (StoreError, ServerError, MethodError, HTTPException):
            room.on_recipe(body.kind, ())
            raise
        room.on_recipe(body.kind, (record,))
        headers = {"Location": f"/v1/adapters/{record.name}@{record.version}"}
        answer = {**adapter_json(record), "relative_error": relative_error}
        return JSONResponse(answer, status_code=201, headers=headers)

    return router


async def _created(room: RecipeRoom, body: RecipeBody) -> tuple[AdapterRecord, float]:
    await check_new_name(room, body.name)
    check_fields(body)
    wanted = [
        Wanted(parent.name, parent.weight, f"parents.{index}.name")
        for index, parent in enumerate(body.parents)
    ]
    parents = await resolve_parents(room, wanted)
    if body.kind == "linear":
        return await _named_mix(room, body.name, parents), 0.0
    refuse_mixes(parents, wanted)
    general = await _general(room, body)
    if body.router is not None and not await run_in_threadpool(room.store.has_blob, body.router):
        raise InvalidRequest(
            f"no file {body.router} is here; send the router's to PUT /v1/blobs/{body.router} first",
            param="router",
        )
    adapters = [each.adapter for each in (*parents, *general)]
    made = await room.merge(_recipe(body, parents, general), adapters)
    (record,) = await register_made(room, [(body.name, made)])
    return record, made.relative_error


async def _general(room: RecipeRoom, body: RecipeBody) -> list[WeightedAdapter]:
    wanted = [Wanted(name, 1.0, f"general.{index}") for index, name in enumerate(body.general or ())]
    general = await resolve_parents(room, wanted)
    refuse_mixes(general, wanted)
    return general


def _recipe(
    body: RecipeBody, parents: Sequence[WeightedAdapter], general: Sequence[WeightedAdapter]
) -> Recipe:
    """With what is left out filled in, so that the manifest says it."""
    recipe = recipe_of(body.kind, parents)
    if body.kind == "arrow":
        return replace(
            recipe,
            top_k=body.top_k or min(ARROW_TOP_K, len(parents)),
            temperature=1.0 if body.temperature is None else body.temperature,
            general=tuple(each.adapter.digest for each in general),
        )
    if body.kind == "routed":
        return replace(
            recipe,
            top_k=body.top_k or len(parents),
            renormalised=body.renormalised is not False,
            router=body.router,
        )
    seed = (body.seed or 0) if "seed" in READ[body.kind] else None
    return replace(recipe, rank=body.rank, density=body.density, seed=seed)


async def check_new_name(room: RecipeRoom, name: str) -> None:
    """Before anything is computed. Raises: InvalidName; NameConflict for the base's name or an alias."""
    await run_in_threadpool(room.store.check_name, name)
    if name in room.base_names:
        raise NameConflict(f"{name!r} is the base model's name; choose another for the adapter")


async def resolve_parents(room: RecipeRoom, wanted: Sequence[Wanted]) -> list[WeightedAdapter]:
    """The adapters of the names, in order.

    Raises: AdapterNotFound; AdapterMismatch for one of another base; InvalidRequest for one named twice.
    """
    found = []
    for each in wanted:
        if each.name in room.base_names:
            raise AdapterNotFound(f"{each.name!r} is the base model, not an adapter", param=each.param)
        try:
            adapter = await run_in_threadpool(room.store.resolve, each.name)
        except NotFound as error:
            raise AdapterNotFound(str(error), param=each.param) from error
        if adapter.manifest.base_model_digest != room.base_digest:
            raise AdapterMismatch(
                f"adapter {adapter.name}@{adapter.version} was made for the base model "
                f"{adapter.manifest.base_model_digest}; this server serves {room.base_digest}",
                param=each.param,
            )
        found.append(WeightedAdapter(adapter, each.weight))
    refuse_twins(found, wanted)
    return found


def refuse_mixes(parents: Sequence[WeightedAdapter], wanted: Sequence[Wanted]) -> None:
    for parent, asked in zip(parents, wanted, strict=True):
        if parent.adapter.parts:
            raise InvalidRequest(
                f"{parent.label} is a mix, which has no tensors of its own to merge; name its adapters",
                param=asked.param,
            )


def recipe_of(kind: str, parents: Sequence[WeightedAdapter]) -> Recipe:
    return Recipe(kind, tuple(Parent(parent.adapter.digest, parent.weight) for parent in parents))


async def _named_mix(room: RecipeRoom, name: str, parents: Sequence[WeightedAdapter]) -> AdapterRecord:
    """Raises: MixNotServed for what no request could mix; InvalidRequest where nothing has a weight."""
    acting = summable(expanded(parents, "parents"), room.adapter_budget_bytes, "parents")
    if not acting:
        raise InvalidRequest("every weight is 0: that is the base model itself", param="parents")
    recipe = recipe_of("linear", acting)
    return await run_in_threadpool(room.store.register_mix, name, recipe, room.base_digest)


async def register_made(room: RecipeRoom, made: Sequence[tuple[str, MadeFiles]]) -> tuple[AdapterRecord, ...]:
    """All of them or none, checked as every upload is. Raises as `Store.register`."""

    def register() -> tuple[AdapterRecord, ...]:
        with room.store.begin_upload() as upload:
            arrivals = []
            for name, files in made:
                digests = []
                for content in (files.config, files.tensors):
                    with upload.begin_blob() as writer:
                        writer.write(content)
                        digests.append(writer.commit())
                arrivals.append(Arrival(name, digests[0], digests[1], files.recipe))
            return room.store.register_all(arrivals, room.base_digest)

    return await run_in_threadpool(register)
