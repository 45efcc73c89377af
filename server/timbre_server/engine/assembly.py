"""The engine put together: model, cache, adapters, scheduler. The one place that knows all its parts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import msgspec
import torch
from torch import nn

from timbre_server.adapters.adapted_model import AdaptedModel, Arithmetic
from timbre_server.adapters.adapted_norm import AdaptedNorm
from timbre_server.adapters.base_sites import base_frame, base_sites
from timbre_server.adapters.derivation import Derivations
from timbre_server.adapters.kernels import choose_kernels
from timbre_server.adapters.loader import AdapterLoader
from timbre_server.adapters.pinning import Pinning
from timbre_server.adapters.placement import Layout
from timbre_server.adapters.runtime import AdapterRuntime, Loader, MakeLoader
from timbre_server.engine.core import EngineCore
from timbre_server.engine.fused_layers import fuse_layers
from timbre_server.engine.fused_norm import norm_of
from timbre_server.engine.kv_blocks import BlockPool
from timbre_server.engine.linears import bias_of, weight_of
from timbre_server.engine.lone_layers import lone_weight_of
from timbre_server.engine.messages import Ready, SiteShape
from timbre_server.engine.model_loader import PreparedModel, factors_rounded_to, prepare_model
from timbre_server.engine.options import EngineOptions, LoraDtype
from timbre_server.engine.packed_linear import LinearPacker
from timbre_server.engine.parameters import parameter_weight_of
from timbre_server.engine.processors import take_processors
from timbre_server.engine.runner import Runner, RunnerOptions
from timbre_server.engine.scheduler import Scheduler, SchedulerLimits

_log = logging.getLogger(__name__)


def assemble(
    options: EngineOptions, on_progress: Callable[[str], None], on_load_ended: Callable[[], None]
) -> tuple[EngineCore, Ready]:
    """Load, probe and check the model and put an engine around it.

    ``on_load_ended`` is called on another thread. Raises UnsupportedModel, KernelsUnavailable.
    """
    take_processors(options.num_threads)
    prepared = prepare_model(
        options.model,
        dtype=options.dtype,
        device=options.device,
        check=options.self_check,
        layers=options.layer_replication,
        on_progress=on_progress,
    )
    return engine_around(prepared, options, on_progress, on_load_ended)


def engine_around(
    prepared: PreparedModel,
    options: EngineOptions,
    on_progress: Callable[[str], None],
    on_load_ended: Callable[[], None],
    make_loader: MakeLoader | None = None,
) -> tuple[EngineCore, Ready]:
    """The engine of a model that is in memory; ``options.model`` is not read.

    Without ``make_loader`` adapters come from the store. Raises KernelsUnavailable.
    """
    model, probed = prepared.loaded.model, prepared.probed
    kernels, why = choose_kernels(options.kernels, model.device)
    on_progress(f"Preparing the layers for adapters, with kernels: {kernels}" + (f" ({why})" if why else ""))
    sites = base_sites(layers_of(model, probed.sites))
    native = kernels == "native"
    packer = LinearPacker(model.dtype, model.device, native=native)
    arithmetic = Arithmetic(packer.product_of, kernels, partial(norm_of, native=native))
    fuse_layers(model, probed.layers, kernels)
    embedding = model.get_input_embeddings()
    adapted = AdaptedModel(
        model, probed.groups, arithmetic, probed.lone, probed.blocks, embedding, probed.parameters
    )
    norms = [module.is_fused for module in model.modules() if isinstance(module, AdaptedNorm)]
    _log.info("products: %s; one call each: %d of %d norms", packer.means, sum(norms), len(norms))
    runner = Runner(prepared, adapted, _runner_options(options, kernels))
    ready = msgspec.structs.replace(runner.info(), kernels=kernels)
    frame = base_frame(ready.hidden_size, map(msgspec.structs.astuple, ready.attention), ready.stack)
    groups = [group.paths for group in probed.groups]
    loader: Loader
    if make_loader is None:
        root = Path(options.adapters_dir)
        layout = layout_for(options.lora_dtype, model.dtype, kernels)
        loader = AdapterLoader(root, ready.model_digest, sites, model.device, frame, groups, layout)
    else:
        loader = make_loader(sites, frame, groups)
    adapters = AdapterRuntime(adapted, loader, options.adapter_memory_bytes, on_load_ended)
    scheduler = Scheduler(_limits(options, ready), BlockPool(runner.num_blocks, options.block_size), adapters)
    pinning = Pinning(adapted, adapters, sites, packer, on_load_ended)
    derivations = Derivations(sites, on_load_ended, model.device)
    return EngineCore(runner, scheduler, adapters, derivations, pinning), ready


def layout_for(lora_dtype: LoraDtype, model_dtype: torch.dtype, kernels: str) -> Layout:
    """How adapters lie in memory that run on these kernels."""
    is_native, rounded_to = kernels == "native", factors_rounded_to(lora_dtype, model_dtype)
    has_pairs = is_native and torch.cpu._is_avx512_bf16_supported()
    in_panels = has_pairs and model_dtype is rounded_to is torch.bfloat16
    return Layout(rounded_to, in_slices=is_native, in_panels=in_panels)


def _limits(options: EngineOptions, ready: Ready) -> SchedulerLimits:
    return SchedulerLimits(
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_model_len=ready.max_model_len,
        vocab_size=ready.vocab_size,
        enable_prefix_caching=options.enable_prefix_caching,
    )


def _runner_options(options: EngineOptions, kernels: str) -> RunnerOptions:
    return RunnerOptions(
        block_size=options.block_size,
        kv_cache_bytes=options.kv_cache_bytes,
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        adapter_memory_bytes=options.adapter_memory_bytes,
        native_attention=kernels == "native",
        record_steps=kernels != "torch",
    )


def layers_of(
    model: nn.Module, shapes: Iterable[SiteShape]
) -> Iterable[tuple[SiteShape, torch.Tensor, torch.Tensor | None]]:
    """Each with its values, as `base_sites` takes them; a block has none."""
    for shape in shapes:
        if shape.kind == "parameter":
            yield shape, parameter_weight_of(model.get_parameter(shape.path)), None
            continue
        module = model.get_submodule(shape.path)
        if shape.kind == "block":
            yield shape, torch.empty(shape.out_features, shape.in_features, device="meta"), None
            continue
        weight = weight_of(module) if shape.kind == "linear" else lone_weight_of(module)
        yield shape, weight, bias_of(module)
