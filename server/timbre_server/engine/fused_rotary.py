"""Attention layers whose rotary positions are applied by one call (`layer_kernels`) and in place:

    o(attention(rotated(q(x)), rotated(k(x)), v(x))),    rotated(u) = u ∘ cos + (-u₂, u₁) ∘ sin

with u₁ and u₂ the halves of a head, and with norms of the heads of q and k where a layer has some. A layer is
replaced if it asks attention for what this asks, and makes the same of an answer, tried on what the model
gives it; what was probed of it says how it calls attention. In 16 bits transformers rounds each product and
their sum, and the call once.

Legend: T rows, H query heads, G KV heads, D key dim, E value dim.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from timbre_server.engine.batch import run_model
from timbre_server.engine.context import AttentionCall, active, current
from timbre_server.engine.layer_kernels import LayerKernels
from timbre_server.engine.linears import is_linear
from timbre_server.engine.probe import LayerAttention, Recording

_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORMS = ("q_norm", "k_norm")
_REFUSALS: tuple[type[Exception], ...] = (AssertionError, AttributeError, RuntimeError, TypeError, ValueError)
"""What a layer raises that does not run like this."""
_TOKEN_IDS = (1, 2, 3, 4, 5)
_FAR = 100_000
"""Added to the positions that a layer is given beside cos and sin: what depends on them shows."""
_TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Relative to the largest number of a column: a few are far larger than the others."""

_Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def fuse_rotary(model: PreTrainedModel, layers: Iterable[LayerAttention], kernels: LayerKernels) -> None:
    """Replace what can be, in place; to be called before adapters take the places of linear layers."""
    by_path = {layer.path: layer for layer in layers}
    for path, inputs in _inputs_of(model, by_path).items():
        fused = _fused(model.get_submodule(path), by_path[path], kernels, inputs)
        if fused is not None:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, fused)


class RotaryAttention(nn.Module):
    """One attention layer, of the base's own layers under their own names."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module

    def __init__(self, base: nn.Module, layer: LayerAttention, kernels: LayerKernels) -> None:
        super().__init__()
        for name, child in base.named_children():
            setattr(self, name, child)
        self._has_norms = hasattr(base, _NORMS[0])
        self._layer = layer
        self.layer_idx = layer.shape.layer
        """As transformers' own layers say."""
        self._kernels = kernels

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], *_: object, **others: object
    ) -> tuple[Tensor, None]:
        shape, layer = self._layer.shape, self._layer
        num_rows = hidden_states.shape[1]
        q_1THD = self.q_proj(hidden_states).view(1, num_rows, layer.num_heads, shape.key_dim)
        k_1TGD = self.k_proj(hidden_states).view(1, num_rows, shape.num_kv_heads, shape.key_dim)
        v_TGE = self.v_proj(hidden_states).view(num_rows, shape.num_kv_heads, shape.value_dim)
        if self._has_norms:
            q_1THD, k_1TGD = self.q_norm(q_1THD), self.k_norm(k_1TGD)
        q_THD, k_TGD = q_1THD[0].contiguous(), k_1TGD[0].contiguous()
        self._rotate(q_THD, k_TGD, *position_embeddings)
        q_HTD, k_GTD, v_GTE = q_THD.transpose(0, 1), k_TGD.transpose(0, 1), v_TGE.transpose(0, 1)
        call = AttentionCall(shape.layer, q_HTD, k_GTD, v_GTE, layer.scale, layer.window, layer.softcap)
        out_THE = current().attend(call)
        return self.o_proj(out_THE.reshape(1, num_rows, -1)), None

    def _rotate(self, q_THD: Tensor, k_TGD: Tensor, cos_1TD: Tensor, sin_1TD: Tensor) -> None:
        """In place."""
        assert q_THD.dtype is k_TGD.dtype is cos_1TD.dtype is sin_1TD.dtype
        assert q_THD.dtype in self._kernels.dtypes
        assert cos_1TD.shape == sin_1TD.shape == (1, len(q_THD), q_THD.shape[2])
        self._kernels.rotate(q_THD, k_TGD, cos_1TD.contiguous(), sin_1TD.contiguous())


@torch.inference_mode()
def _inputs_of(model: PreTrainedModel, paths: Iterable[str]) -> Mapping[str, _Inputs]:
    """What each of these layers is given in a forward of the model."""
    found: dict[str, _Inputs] = {}

    def note(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found[path] = args, kwargs

    hooks = [
        model.get_submodule(path).register_forward_pre_hook(partial(note, path), with_kwargs=True)
        for path in paths
    ]
    try:
        run_model(model, Recording(), _TOKEN_IDS, range(len(_TOKEN_IDS)), (0,))
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.inference_mode()
def _fused(
    module: nn.Module, layer: LayerAttention, kernels: LayerKernels, inputs: _Inputs
) -> RotaryAttention | None:
    names = {name for name, _ in module.named_children()}
    if names not in ({*_LINEARS}, {*_LINEARS, *_NORMS}) or layer.has_sinks or layer.shape.key_dim % 2:
        return None
    if not all(is_linear(module.get_submodule(name)) for name in _LINEARS):
        return None
    fused = RotaryAttention(module, layer, kernels)
    try:
        want, got = _Asked.by(module, inputs), _Asked.by(fused, inputs)
    except _REFUSALS + kernels.failures:
        return None
    return fused if got.how == want.how and all(map(_agree, got.tensors, want.tensors)) else None


class _Asked:
    """An attention context that answers with random numbers, always the same: what rounds differently before
    it does not show after it."""

    how: tuple[object, ...]
    """The numbers that attention is called with."""
    tensors: tuple[Tensor, ...]
    """What it is called with, and what the layer gives."""

    @classmethod
    def by(cls, module: nn.Module, inputs: _Inputs) -> _Asked:
        """What a layer does, far from the first token."""
        args, kwargs = inputs
        far = {
            name: value + _FAR if isinstance(value, Tensor) and not value.is_floating_point() else value
            for name, value in kwargs.items()
        }
        asked = cls()
        with active(asked):
            output, weights = module(*args, **far)
        assert weights is None
        asked.tensors = *asked.tensors, output
        return asked

    def attend(self, call: AttentionCall) -> Tensor:
        self.how = call.layer, call.scale, call.window, call.softcap
        self.tensors = call.q_HTD, call.k_GTD, call.v_GTE
        (num_heads, num_rows, _), value_dim = call.q_HTD.shape, call.v_GTE.shape[2]
        generator = torch.Generator().manual_seed(0)
        return torch.randn(num_rows, num_heads, value_dim, generator=generator).to(call.v_GTE)


def _agree(got: Tensor, want: Tensor) -> bool:
    if got.shape != want.shape or got.dtype is not want.dtype:
        return False
    most = want.abs().amax(dim=(0, 1)).float()
    return bool(((got.float() - want.float()).abs() <= _TOLERANCES[want.dtype] * most).all())
