"""A fake engine with real everything else: what the administration's tests stand on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from fastapi import FastAPI
from safetensors.torch import save

from timbre_methods.prompt_contract import NO_FRAME
from timbre_methods.registry import methods
from timbre_server.adapters.derivation import write_derived
from timbre_server.engine.messages import (
    AdapterLoaded,
    Ready,
    SiteShape,
    StepOutput,
    StepStats,
    Submit,
    TokenEvent,
)
from timbre_server.engine.pin_messages import PinnedAdapter
from timbre_server.errors import AdapterLoadFailed, PinConflict, PinNotServed
from timbre_server.http.adapters import AdapterRoom, Retirement, adapter_router
from timbre_server.http.app import AppOptions, Surroundings, add_routes, create_app
from timbre_server.http.blobs import blob_router
from timbre_server.http.compression import compression_router
from timbre_server.http.drain import Lifecycle, Phase
from timbre_server.http.pins import PinRoom, pin_router
from timbre_server.http.probes import Probes
from timbre_server.http.recipes import RecipeRoom, recipe_router
from timbre_server.http.vllm_compat import vllm_router
from timbre_server.inspection import inspector, meta_sites
from timbre_server.merging import Merges
from timbre_store.limits import StoreLimits
from timbre_store.records import AdapterRecord
from timbre_store.store import Store

SITES = (
    SiteShape("model.layers.0.self_attn.q_proj", 16, 16, False),
    SiteShape("model.layers.0.mlp.down_proj", 16, 24, False),
)
BASE_DIGEST = "sha256:" + "b" * 64
MAX_UPLOAD_BYTES = 1 << 20


class FakeEngine:
    """Answers with a fixed token, and remembers which adapters it was told to load and drop."""

    def __init__(self) -> None:
        self.info = Ready(
            model_name="tiny", model_digest=BASE_DIGEST, model_type="llama", dtype="float32", device="cpu",
            vocab_size=64, max_model_len=256, eos_token_ids=(2,), sites=SITES, block_size=16,
            num_kv_blocks=10, kv_cache_bytes=1 << 20, model_bytes=1 << 20, adapter_budget_bytes=1 << 20,
        )  # fmt: skip
        self.latest = StepStats()
        self.alive = True
        self.idle_seconds = 0.0
        self.loaded: list[str] = []
        self.unloaded: list[str] = []
        self.may_unload = asyncio.Event()
        self.may_unload.set()
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.load_error: str | None = None
        self.pins: dict[str, tuple[tuple[str, float], ...]] = {}
        self.closed = False

    def seconds_since_last_step(self) -> float:
        return self.idle_seconds

    async def submit(self, request: Submit) -> AsyncIterator[TokenEvent]:
        for _ in range(request.sampling.max_tokens - 1):
            yield TokenEvent(request.request_id, token_ids=(5,))
        await self.may_answer.wait()
        yield TokenEvent(request.request_id, token_ids=(5,), finish_reason="length")

    async def load_adapter(self, digest: str) -> AdapterLoaded:
        if self.load_error:
            raise AdapterLoadFailed(self.load_error)
        self.loaded.append(digest)
        return AdapterLoaded(digest)

    async def unload_adapter(self, digest: str) -> None:
        await self.may_unload.wait()
        self.unloaded.append(digest)

    async def pin_adapter(self, digest: str, mix: tuple[tuple[str, float], ...]) -> PinnedAdapter:
        if len(mix) > 2:
            raise PinNotServed("it has too many parts")
        self.pins[digest] = mix
        self.latest = StepStats(pinned=PinnedAdapter(digest, 7, 1000))
        return PinnedAdapter(digest, 7, 1000)

    async def unpin_adapter(self, digest: str) -> None:
        if self.latest.pinned is None:
            raise PinConflict(f"{digest} is not pinned; nothing is")
        self.latest = StepStats()

    def pinned(self) -> PinnedAdapter | None:
        return self.latest.pinned

    def on_output(self, callback: Callable[[StepOutput], None]) -> None:
        self.callback = callback

    async def close(self) -> None:
        self.closed = True
        self.may_answer.set()


Refused = tuple[dict[str, Any], int, str | None, str]


@dataclass(frozen=True)
class AdapterFiles:
    config: bytes
    tensors: bytes


@dataclass(frozen=True)
class Served:
    """An application that serves, and what is behind it."""

    app: FastAPI
    client: httpx2.AsyncClient
    engine: FakeEngine
    store: Store
    lifecycle: Lifecycle
    probes: Probes
    retirement: Retirement
    answered: list[tuple[str, int]]
    uploads: list[AdapterRecord | None]
    recipes: list[tuple[str, Sequence[AdapterRecord]]]
    lora_root: Path

    async def upload(self, files: AdapterFiles, **changes: object) -> httpx2.Response:
        """One form; a change replaces a part, or takes it away with None."""
        parts = {
            "name": (None, "pirate"),
            "adapter_config.json": ("c", files.config),
            "adapter_model.safetensors": ("t", files.tensors),
            **changes,
        }
        form = {name: part for name, part in parts.items() if part is not None}
        return await self.client.post("/v1/adapters", files=form)

    async def made(self, **recipe: object) -> dict[str, Any]:
        """What the server says of an adapter that it makes of others."""
        response = await self.client.post("/v1/recipes", json=recipe)
        assert response.status_code == 201, response.text
        return dict(response.json())

    async def not_refused_so(self, path: str, bodies: Iterable[Refused]) -> list[object]:
        """Those bodies that are not told their status, param and words, with what each is told."""
        found: list[object] = []
        for fields, status, param, words in bodies:
            response = await self.client.post(path, json=fields)
            error = response.json()["error"]
            if (response.status_code, error["param"]) != (status, param) or words not in error["message"]:
                found.append((fields, response.status_code, error))
        return found

    def stored_files(self) -> list[Path]:
        kinds = ("blobs", "manifests", "tmp")
        return [path for kind in kinds for path in (self.store.root / kind).rglob("*") if path.is_file()]


@pytest.fixture
def adapter_files() -> Callable[..., AdapterFiles]:
    """Makes a small valid adapter of a method, for the fake engine's base."""

    def make(method: str = "lora", seed: int = 0, **config_changes: object) -> AdapterFiles:
        generator = torch.Generator().manual_seed(seed)
        config, tensors = methods()[method].example(meta_sites(SITES), generator)
        real = {name: tensor.contiguous() for name, tensor in tensors.items()}
        return AdapterFiles(json.dumps({**config, **config_changes}).encode(), save(real))

    return make


@pytest.fixture
def lora_files() -> Callable[[int, int], AdapterFiles]:
    """Makes a LoRA of a rank, from a seed, on all sites and with scale 2."""

    def make(rank: int, seed: int) -> AdapterFiles:
        generator, tensors = torch.Generator().manual_seed(seed), {}
        for site in SITES:
            stem = f"base_model.model.{site.path}.lora"
            tensors[f"{stem}_A.weight"] = torch.randn(rank, site.in_features, generator=generator)
            tensors[f"{stem}_B.weight"] = torch.randn(site.out_features, rank, generator=generator)
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank}
        return AdapterFiles(json.dumps(config).encode(), save(tensors))

    return make


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    sites = meta_sites(SITES)
    inspect = inspector(sites, budget_bytes=1 << 20, derive=lambda *files: write_derived(*files, sites))
    with Store(
        tmp_path / "store", inspect=inspect, limits=StoreLimits(max_blob_bytes=MAX_UPLOAD_BYTES)
    ) as opened:
        yield opened


@pytest.fixture
def serve(store: Store, tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Builds an application around the store, with any `AppOptions`."""

    merges = Merges(store.root, meta_sites(SITES), NO_FRAME)

    def build(*, serving: bool = True, allow_pins: bool = True, **options: object) -> Served:
        engine, lifecycle = FakeEngine(), Lifecycle()
        probes = Probes(lifecycle, stall_timeout_s=30)
        answered: list[tuple[str, int]] = []
        uploads: list[AdapterRecord | None] = []
        surroundings = Surroundings(
            lifecycle,
            probes,
            lambda _: (b"# metrics\n", "text/plain"),
            lambda *pair: answered.append(pair),
        )
        app = create_app(AppOptions(**{"max_upload_bytes": MAX_UPLOAD_BYTES, **options}), surroundings)
        retirement = Retirement(engine.unload_adapter)
        room = AdapterRoom(
            store, ("tiny",), BASE_DIGEST, MAX_UPLOAD_BYTES, retirement, uploads.append, engine.pinned
        )
        recipes: list[tuple[str, Sequence[AdapterRecord]]] = []
        kitchen = RecipeRoom(
            store, ("tiny",), BASE_DIGEST, 1 << 20, merges.merge, merges.compress,
            lambda *pair: recipes.append(pair),
        )  # fmt: skip
        root = tmp_path / "loras"
        root.mkdir()
        if serving:
            add_routes(
                app,
                (
                    adapter_router(room),
                    pin_router(PinRoom(engine, store.resolve, lambda _: "the first", is_allowed=allow_pins)),
                    blob_router(store, max_upload_bytes=MAX_UPLOAD_BYTES),
                    vllm_router(room, root, engine.load_adapter),
                    recipe_router(kitchen),
                    compression_router(kitchen),
                ),
            )
            lifecycle.phase = Phase.SERVING
            probes.watch(engine)
        transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
        client = httpx2.AsyncClient(transport=transport, base_url="http://timbre")
        return Served(
            app, client, engine, store, lifecycle, probes, retirement, answered, uploads, recipes, root
        )

    yield build
    merges.close()
