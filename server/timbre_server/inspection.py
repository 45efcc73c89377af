"""What the store asks at upload, answered by the methods: does one read this adapter, does it fit the base?

The only place where store and methods meet. Sites are meta tensors made from what the engine said of its
model, so nothing of the base lies in this process.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from timbre_methods.contract import Site, Sites
from timbre_methods.errors import MethodError
from timbre_methods.errors import UnsupportedMethod as MethodUnsupported
from timbre_methods.registry import check_adapter, inspect_adapter, methods
from timbre_server.engine.messages import SiteShape
from timbre_store.errors import InvalidAdapter, UnsupportedMethod
from timbre_store.inspection import Inspect, Inspection
from timbre_store.safetensors_header import TensorHeader


def meta_sites(shapes: Iterable[SiteShape]) -> Sites:
    """The base's linear layers without their values."""
    return {
        shape.path: Site(
            path=shape.path,
            weight_OI=torch.empty(shape.out_features, shape.in_features, device="meta"),
            bias_O=torch.empty(shape.out_features, device="meta") if shape.has_bias else None,
        )
        for shape in shapes
    }


def warm_up() -> None:
    """Checks one small adapter of every method, so that torch's slow first uses are not an upload's."""
    sites = meta_sites(
        [SiteShape("layers.0.q_proj", 16, 16, False), SiteShape("layers.0.down_proj", 16, 16, False)]
    )
    generator = torch.Generator().manual_seed(0)
    for method in methods().values():
        config, tensors = method.example(sites, generator)
        check_adapter(config, tensors, sites)


def inspector(sites: Sites, *, budget_bytes: int) -> Inspect:
    """The store's `Inspect` for one base model. An adapter that could never be loaded is refused here."""

    def inspect(config: dict[str, Any], header: TensorHeader, tensors_path: Path) -> Inspection:
        shapes = {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()}
        try:
            found = inspect_adapter(config, shapes, sites)
            if found.prepared_bytes > budget_bytes:
                raise InvalidAdapter(
                    f"the adapter takes {found.prepared_bytes} bytes of memory, but {budget_bytes} are there "
                    "for all adapters together; the server's setting is adapter_memory_mib"
                )
            check_adapter(config, load_file(tensors_path), sites)
        except MethodUnsupported as error:
            raise UnsupportedMethod(str(error)) from error
        except MethodError as error:
            raise InvalidAdapter(str(error)) from error
        return Inspection(found.method, found.sites, found.parameters, found.prepared_bytes)

    return inspect
