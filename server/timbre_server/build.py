"""The one file that knows every room: store, methods, tokenizer, metrics and routes, made for one engine.

Importing it is slow (it brings torch and transformers), so `launch` does that while the engine loads.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog
from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from timbre_methods.registry import derivations
from timbre_server.engine.client import Engine
from timbre_server.example_adapters import PLAIN_EXAMPLE, register_examples
from timbre_server.http.adapters import AdapterRoom, Retirement, adapter_router
from timbre_server.http.app import add_routes
from timbre_server.http.blobs import blob_router
from timbre_server.http.chat import chat_router
from timbre_server.http.completions import completions_router
from timbre_server.http.compression import compression_router
from timbre_server.http.context import ServingContext, ServingLimits
from timbre_server.http.limits import Admission
from timbre_server.http.models import models_router
from timbre_server.http.pins import PinRoom, pin_router
from timbre_server.http.recipes import RecipeRoom, recipe_router
from timbre_server.http.text import TextCodec, load_text_codec
from timbre_server.http.vllm_compat import vllm_router
from timbre_server.inspection import derive_in_engine, frame_of, inspector, meta_sites, warm_up
from timbre_server.merging import Merges
from timbre_server.metrics import Metrics
from timbre_server.model_source import base_names, codec_folder
from timbre_server.series import RecentNames
from timbre_server.settings import MIB, Settings
from timbre_server.tally import Tally
from timbre_server.welcome import FirstRequest, Key
from timbre_store.errors import StoreError
from timbre_store.limits import StoreLimits
from timbre_store.records import AdapterRecord
from timbre_store.store import Store

UPKEEP_PERIOD_S = 3600.0
UNUSED_BLOB_AGE_S = 86400.0
REMEMBERED_NAMES = 4096

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Parts:
    """What was opened for one engine."""

    engine: Engine
    store: Store
    text: TextCodec | None
    base_names: tuple[str, ...]


def prepare() -> None:
    """What can be done before the engine is ready. Blocking."""
    warm_up()


def open_rooms(
    settings: Settings, engine: Engine, model: str, say: Say, loop: asyncio.AbstractEventLoop
) -> Rooms:
    """Opens store and tokenizer for an engine that is ready and belongs to ``loop``. Blocking: on a thread.

    Raises: StoreUnavailable, StoreFull, UnsupportedModel.
    """
    text = load_text_codec(Path(codec_folder(model)))
    if text is None:
        say("The model has no tokenizer: prompts are lists of token ids.")
    names = base_names(settings.model, engine.info.model_name, settings.served_model_name)
    store = open_store(settings, engine, loop)
    if settings.examples_dir is not None:
        register_examples(store, settings.examples_dir, engine.info.model_digest, say)
    return Rooms(settings, Parts(engine, store, text, names))


def open_store(settings: Settings, engine: Engine, loop: asyncio.AbstractEventLoop) -> Store:
    """The store, which checks uploads against the engine's model. Raises: StoreUnavailable, StoreFull."""
    info = engine.info
    inspect = inspector(
        meta_sites(info.sites),
        budget_bytes=info.adapter_budget_bytes,
        max_derived_bytes=settings.max_upload_mib * MIB,
        derive=derive_in_engine(engine, loop),
        frame=frame_of(info),
        max_model_len=info.max_model_len,
    )
    limits = StoreLimits(max_blob_bytes=settings.max_upload_mib * MIB)
    return Store(settings.store_dir, inspect=inspect, limits=limits, derivations=derivations())


class Rooms:
    """The parts connected: what the application serves, and what it counts."""

    def __init__(self, settings: Settings, parts: Parts) -> None:
        self._settings = settings
        self._parts = parts
        info, most = parts.engine.info, settings.metrics_max_adapters
        self._names = RecentNames(limit=max(REMEMBERED_NAMES, most))
        self.tally = Tally(parts.base_names[0], info.max_model_len, max_adapters=most)
        self.metrics = Metrics(self.tally, info, name_of=self._names.get, max_adapters=most)
        self._retirement = Retirement(parts.engine.unload_adapter)
        self._merges = Merges(parts.store.root, meta_sites(info.sites), frame_of(info))
        self._log = structlog.get_logger("timbre.store")
        self._upkeep: asyncio.Task[None] | None = None

    def attach(self, app: FastAPI) -> None:
        """Gives the application its routes. On the event loop."""
        self._parts.engine.on_output(self.tally.on_output)
        context, room = self._serving_context(), self._adapter_room()
        routers = [completions_router(context), chat_router(context), models_router(context)]
        routers += [adapter_router(room), blob_router(room.store, max_upload_bytes=room.max_upload_bytes)]
        pins = PinRoom(
            self._parts.engine, self._resolve, self._names.get, is_allowed=self._settings.allow_merged_pin
        )
        routers.append(pin_router(pins))
        recipes = self._recipe_room()
        routers += [recipe_router(recipes), compression_router(recipes)]
        if self._settings.lora_path_root is not None:
            routers.append(vllm_router(room, self._settings.lora_path_root, self._parts.engine.load_adapter))
        add_routes(app, routers)
        self._upkeep = asyncio.create_task(self._keep_up())

    async def close_work(self) -> None:
        """Ends what runs in the background."""
        if self._upkeep is not None:
            self._upkeep.cancel()
        self._merges.close()
        await self._retirement.close()

    def close_files(self) -> None:
        """Lets go of the store and the tokenizer's threads. Blocking."""
        if self._parts.text is not None:
            self._parts.text.close()
        self._parts.store.close()

    def first_request(self, port: int) -> FirstRequest:
        """A request that works now: to an adapter for this base, first an example, else to the base."""
        text, page = self._parts.text, self._parts.store.list(100, None)
        digest, settings = self._parts.engine.info.model_digest, self._settings
        fitting = [item.name for item in page.items if item.manifest.base_model_digest == digest]
        key_file = None if settings.api_keys else settings.api_key_file
        return FirstRequest(
            host=settings.host,
            port=port,
            model=PLAIN_EXAMPLE if PLAIN_EXAMPLE in fitting else [*fitting, self._parts.base_names[0]][0],
            has_tokenizer=text is not None,
            has_chat_template=text is not None and text.has_chat_template,
            key=Key(key_file) if settings.keys() else None,
        )

    def _serving_context(self) -> ServingContext:
        settings, parts = self._settings, self._parts
        return ServingContext(
            engine=parts.engine,
            text=parts.text,
            resolve=self._resolve,
            list_names=parts.store.names,
            base_names=parts.base_names,
            admission=Admission(
                max_requests=settings.max_queued_requests,
                max_tokens=settings.max_queued_tokens,
                on_rejected=self.tally.on_rejected,
            ),
            started_s=int(time.time()),
            on_submitted=self.tally.on_submitted,
            on_finished=self.tally.on_finished,
            limits=ServingLimits(max_logprobs=settings.max_logprobs),
        )

    def _adapter_room(self) -> AdapterRoom:
        return AdapterRoom(
            store=self._parts.store,
            base_names=self._parts.base_names,
            base_digest=self._parts.engine.info.model_digest,
            max_upload_bytes=self._settings.max_upload_mib * MIB,
            retirement=self._retirement,
            on_upload=self._on_upload,
            pinned=lambda: self._parts.engine.latest.pinned,
        )

    def _recipe_room(self) -> RecipeRoom:
        return RecipeRoom(
            store=self._parts.store,
            base_names=self._parts.base_names,
            base_digest=self._parts.engine.info.model_digest,
            adapter_budget_bytes=self._parts.engine.info.adapter_budget_bytes,
            merge=self._merges.merge,
            compress=self._merges.compress,
            on_recipe=self._on_recipe,
        )

    def _resolve(self, reference: str) -> AdapterRecord:
        """`Store.resolve`, remembering which name a digest was asked for by. On any thread."""
        record = self._parts.store.resolve(reference)
        for each in (record, *(part.adapter for part in record.parts)):
            self._names.note(each.digest, each.name)
        return record

    def _on_upload(self, record: AdapterRecord | None) -> None:
        if record is not None:
            self._names.note(record.digest, record.name)
        self.tally.on_upload(None if record is None else record.manifest.stored_bytes)

    def _on_recipe(self, kind: str, records: Sequence[AdapterRecord]) -> None:
        for record in records:
            self._names.note(record.digest, record.name)
        self.tally.on_recipe(kind, is_stored=bool(records))

    async def _keep_up(self) -> None:
        """Removes files that nothing refers to any more, now and then."""
        while True:
            await asyncio.sleep(UPKEEP_PERIOD_S)
            try:
                await run_in_threadpool(self._parts.store.collect_garbage, UNUSED_BLOB_AGE_S)
            except (StoreError, OSError) as error:
                self.tally.on_store_error("collect_garbage")
                self._log.warning("upkeep_failed", message=str(error))
