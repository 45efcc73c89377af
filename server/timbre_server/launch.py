"""``timbre serve``: listen at once, then start the engine, then everything that serves on it.

The order makes a start quick and honest: probes are answered before anything heavy is imported, and the
engine's process loads the model while this one imports what its routes need.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import uvloop
from starlette.concurrency import run_in_threadpool

from timbre_server.engine.client import EngineProcess
from timbre_server.engine.options import EngineOptions
from timbre_server.errors import NotReady, ServerError
from timbre_server.http.app import AppOptions, Surroundings, create_app
from timbre_server.http.drain import Lifecycle, Phase
from timbre_server.http.probes import Probes
from timbre_server.http.server import HttpServer, ServerOptions
from timbre_server.http.supervision import Supervised, Supervisor
from timbre_server.logs import configure_logs
from timbre_server.model_source import model_folder
from timbre_server.settings import KIB, MIB, Settings
from timbre_store.errors import StoreError

if TYPE_CHECKING:
    from timbre_server.build import Rooms

BUILD_MODULE = "timbre_server.build"
GPU_DEVICE = Path("/dev/nvidiactl")
GPU_STEP_TOKENS, CPU_STEP_TOKENS = 2048, 512

Say = Callable[[str], None]


def serve(settings: Settings, say: Say) -> int:
    """Runs the server until it is told to stop. The process' exit status; ``say`` shows progress."""
    configure_logs(settings.log_level, settings.log_format)
    try:
        return uvloop.run(_serve(settings, say))
    except (ServerError, StoreError, OSError) as error:
        say(f"The server stopped: {error}")
        return 1


async def _serve(settings: Settings, say: Say) -> int:
    process = ServerProcess(settings, say)
    supervisor = Supervisor(
        process.http, process.lifecycle, lead_s=settings.drain_lead_s, timeout_s=settings.drain_timeout_s
    )
    return await supervisor.run(Supervised(process.start, process.is_alive, process.close))


class ServerProcess:
    """Everything in the server's process. Listens from the moment it is made; `start` does the rest.

    Raises: OSError if the address cannot be had.
    """

    def __init__(self, settings: Settings, say: Say) -> None:
        self._settings = settings
        self._say = say
        self.lifecycle = Lifecycle()
        self._probes = Probes(self.lifecycle, stall_timeout_s=settings.stall_timeout_s)
        self._engine: EngineProcess | None = None
        self._rooms: Rooms | None = None
        surroundings = Surroundings(
            self.lifecycle, self._probes, self._render_metrics, self._on_answered, self._on_store_error
        )
        self._app = create_app(app_options(settings), surroundings)
        self.http = HttpServer(
            self._app,
            ServerOptions(
                settings.host,
                settings.port,
                settings.max_header_kib * KIB,
                settings.keep_alive_timeout_s,
                settings.head_timeout_s,
            ),
        )

    async def start(self) -> None:
        """Loads the model and begins to serve. Raises: ServerError, StoreError, OSError."""
        settings, began = self._settings, time.monotonic()
        self._say(f"Listening on {settings.host}:{self.http.port}; the model is loading.")
        model = await run_in_threadpool(model_folder, settings.model, settings.cache_dir, self._say)
        preparing = asyncio.create_task(run_in_threadpool(_prepared_build))
        try:
            options = engine_options(settings, model)
            engine = self._engine = await EngineProcess.start(options, on_progress=self._say)
        finally:
            build = await preparing
        loop = asyncio.get_running_loop()
        rooms: Rooms = await run_in_threadpool(build.open_rooms, settings, engine, model, self._say, loop)
        self._rooms = rooms
        rooms.attach(self._app)
        self._probes.watch(engine)
        self.lifecycle.phase = Phase.SERVING
        first = rooms.first_request(self.http.port)
        self._say(f"Ready after {time.monotonic() - began:.1f} s. {first.introduction()}")
        self._say(first.curl())

    def is_alive(self) -> bool:
        return self._engine is not None and self._engine.alive

    async def close(self) -> None:
        """Ends what was started; requests that are left end with an error."""
        if self._rooms is not None:
            await self._rooms.close_work()
        if self._engine is not None:
            await self._engine.close()
        if self._rooms is not None:
            await run_in_threadpool(self._rooms.close_files)

    def _on_answered(self, route: str, code: int) -> None:
        if self._rooms is not None:
            self._rooms.tally.on_answered(route, code)

    def _on_store_error(self, operation: str) -> None:
        if self._rooms is not None:
            self._rooms.tally.on_store_error(operation)

    def _render_metrics(self, accept: str) -> tuple[bytes, str]:
        if self._rooms is None:
            raise NotReady("There are no metrics before the model is loaded.")
        return self._rooms.metrics.render(accept)


def _prepared_build() -> ModuleType:
    build = import_module(BUILD_MODULE)
    build.prepare()
    return build


def app_options(settings: Settings) -> AppOptions:
    """What the application needs of the settings."""
    return AppOptions(
        api_keys=settings.keys(),
        public_metrics=settings.public_metrics,
        allowed_hosts=settings.answered_hosts(),
        max_body_bytes=settings.max_body_mib * MIB,
        max_upload_bytes=settings.max_upload_mib * MIB,
        max_header_bytes=settings.max_header_kib * KIB,
        serve_openapi=settings.serve_openapi,
    )


def engine_options(settings: Settings, model: str) -> EngineOptions:
    """What the engine needs of the settings. ``auto`` devices are told apart without importing torch."""
    has_gpu = settings.device == "cuda" or (settings.device == "auto" and GPU_DEVICE.exists())
    step_tokens = settings.max_num_batched_tokens or (GPU_STEP_TOKENS if has_gpu else CPU_STEP_TOKENS)
    return EngineOptions(
        model=model,
        layer_replication=settings.layer_replication,
        adapters_dir=str(settings.store_dir),
        dtype=settings.dtype,
        device=settings.device,
        kernels=settings.kernels,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=step_tokens,
        kv_cache_bytes=settings.kv_cache_mib * MIB if settings.kv_cache_mib is not None else None,
        enable_prefix_caching=settings.enable_prefix_caching,
        adapter_memory_bytes=settings.adapter_memory_mib * MIB,
        lora_dtype=settings.lora_dtype,
        num_threads=settings.num_threads,
    )
