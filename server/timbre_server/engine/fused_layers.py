"""A model's modules replaced by ones that run as a single call, by means of the chosen kernels."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from transformers import PreTrainedModel

from timbre_server.engine.fused_activation import GatedMLP, fuse_activations
from timbre_server.engine.fused_rotary import RotaryAttention, fuse_rotary
from timbre_server.engine.layer_kernels import LayerKernels, in_cpp
from timbre_server.engine.probe import LayerAttention
from timbre_server.native.library import LibraryUnavailable

_log = logging.getLogger(__name__)


def fuse_layers(model: PreTrainedModel, layers: Iterable[LayerAttention], kernels: str) -> None:
    """Replace what can be, in place; to be called before adapters take the places of linear layers.

    ``kernels``: as `adapters.kernels.choose_kernels` names them.
    """
    chosen = _layer_kernels(kernels, model)
    if chosen is None or model.dtype not in chosen.dtypes:
        return
    fuse_activations(model, chosen)
    fuse_rotary(model, layers, chosen)
    kinds = [type(module) for module in model.modules()]
    counts = kinds.count(RotaryAttention), kinds.count(GatedMLP)
    _log.info("one call each: rotary positions of %d layers of attention, %d gated MLPs", *counts)


def _layer_kernels(kernels: str, model: PreTrainedModel) -> LayerKernels | None:
    """None where the model's own modules go on."""
    if kernels == "native" and model.device.type == "cpu":
        try:
            return in_cpp()
        except LibraryUnavailable:
            return None
    if kernels == "triton" and model.device.type == "cuda":
        # Triton is not installed everywhere.
        from timbre_server.engine.triton_layers import in_triton

        return in_triton(model.device)
    return None
