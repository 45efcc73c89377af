"""What the store asks at upload, answered by the methods: does one read this adapter, does it fit the base?

The only place where store and methods meet. Sites are meta tensors made from what the engine said of its
model, so nothing of the base lies in this process.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import astuple
from safetensors.torch import load_file

from timbre_methods.contract import Site, Sites
from timbre_methods.errors import MethodError
from timbre_methods.errors import UnsupportedMethod as MethodUnsupported
from timbre_methods.prompt_contract import NO_FRAME, AttentionLayer, Frame
from timbre_methods.registry import Inspection as MethodInspection
from timbre_methods.registry import check_adapter, inspect_adapter, methods, sites_of
from timbre_server.engine.client import Engine
from timbre_server.engine.messages import DeriveTensors, Ready, SiteShape
from timbre_server.errors import AdapterLoadFailed, QueueFull
from timbre_store.errors import InvalidAdapter, StoreFull, UnsupportedMethod
from timbre_store.inspection import Inspect, Inspection
from timbre_store.safetensors_header import TensorHeader

DERIVATION_RETRY_S = 30.0

Derive = Callable[[dict[str, Any], Path, Path], None]
"""``derive(config, tensors_path, derived_path)``: have what the file leaves out and the base's weights give
written to ``derived_path``. Any thread, may take long. Raises InvalidAdapter, StoreFull, QueueFull,
EngineError."""


def meta_sites(shapes: Iterable[SiteShape]) -> Sites:
    """The base's layers without their values."""
    return {shape.path: _meta_site(shape) for shape in shapes}


def _meta_site(shape: SiteShape) -> Site:
    size = (shape.out_features,) if shape.kind == "norm" else (shape.out_features, shape.in_features)
    return Site(
        path=shape.path,
        weight_OI=torch.empty(size, device="meta"),
        bias_O=torch.empty(shape.out_features, device="meta") if shape.has_bias else None,
        kind=shape.kind,
        is_transposed=shape.is_transposed,
        tied_to=shape.tied_to,
        slices=shape.slices,
        scale=shape.scale,
    )


def frame_of(info: Ready) -> Frame:
    """What the linear layers stand in."""
    attention = tuple(AttentionLayer(*astuple(layer)) for layer in info.attention)
    return Frame(info.hidden_size, attention, info.stack)


def warm_up() -> None:
    """Finds the methods and checks one small LoRA: slow imports and first uses are not to be an upload's."""
    sites = meta_sites(
        [
            SiteShape("embed_tokens", 16, 32, False, "embedding", is_transposed=True),
            SiteShape("layers.0.q_proj", 16, 16, False),
            SiteShape("layers.0.down_proj", 16, 16, False),
            SiteShape("layers.0.norm", 16, 16, False, "norm"),
        ]
    )
    generator = torch.Generator().manual_seed(0)
    method = methods()["lora"]
    config, tensors = method.example(sites_of(method, sites), generator)
    check_adapter(config, tensors, sites)


def derive_in_engine(engine: Engine, loop: asyncio.AbstractEventLoop) -> Derive:
    """The `Derive` of an engine that belongs to ``loop``; call it on any other thread."""

    def derive(config: dict[str, Any], tensors_path: Path, derived_path: Path) -> None:
        message = DeriveTensors(json.dumps(config).encode(), str(tensors_path), str(derived_path))
        answer = asyncio.run_coroutine_threadsafe(engine.derive_tensors(message), loop).result()
        if answer.error_code == "invalid_adapter":
            raise InvalidAdapter(answer.error_message)
        if answer.error_code == "disk_full":
            raise StoreFull(answer.error_message)
        if answer.error_code == "busy":
            raise QueueFull(answer.error_message, retry_after_s=DERIVATION_RETRY_S)
        if answer.error_code is not None:
            raise AdapterLoadFailed(answer.error_message)

    return derive


def _refuse_too_large(found: MethodInspection, budget_bytes: int, max_derived_bytes: int | None) -> None:
    needed = found.least_bytes + found.shared_bytes  # How much more, the engine finds when it loads it.
    if needed > budget_bytes:
        shared = f", {found.shared_bytes} of them for its basis" if found.shared_bytes else ""
        raise InvalidAdapter(
            f"the adapter takes {needed} bytes of memory{shared}, or more, but {budget_bytes} are there for "
            "all adapters together; the server's setting is adapter_memory_mib"
        )
    if max_derived_bytes is not None and found.derived_bytes > max_derived_bytes:
        raise InvalidAdapter(
            f"what the base's weights give for this adapter takes {found.derived_bytes} bytes to store, but "
            f"at most {max_derived_bytes} are kept; the server's setting is max_upload_mib"
        )


def inspector(
    sites: Sites,
    *,
    budget_bytes: int,
    derive: Derive,
    frame: Frame = NO_FRAME,
    max_model_len: int | None = None,
    max_derived_bytes: int | None = None,
) -> Inspect:
    """The store's `Inspect` for one base model. An adapter that could never be used is refused here."""

    def inspect(
        config: dict[str, Any], header: TensorHeader, tensors_path: Path, derived_path: Path
    ) -> Inspection:
        shapes = {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()}
        try:
            found = inspect_adapter(config, shapes, sites, frame)
            _refuse_too_large(found, budget_bytes, max_derived_bytes)
            if max_model_len is not None and found.virtual_tokens >= max_model_len - 1:
                raise InvalidAdapter(
                    f"the adapter puts {found.virtual_tokens} virtual tokens before each request, but this "
                    f"server's context holds {max_model_len} tokens in all"
                )
            check_adapter(config, load_file(tensors_path), sites, frame)
        except MethodUnsupported as error:
            raise UnsupportedMethod(str(error)) from error
        except MethodError as error:
            raise InvalidAdapter(str(error)) from error
        if found.derives and not derived_path.exists():
            derive(config, tensors_path, derived_path)
        return Inspection(
            method=found.method,
            sites=found.sites,
            parameters=found.parameters,
            prepared_bytes=found.prepared_bytes,
            virtual_tokens=found.virtual_tokens,
            invocation_tokens=found.invocation_tokens,
            row_copies=found.row_copies,
            scouts=found.scouts,
        )

    return inspect
