"""Attention layers of a float32 model, their rotary positions applied in C++ (``rotary.cpp``) and in place:

    o(attention(rotated(q(x)), rotated(k(x)), v(x))),    rotated(u) = u ∘ cos + (-u₂, u₁) ∘ sin

with u₁ and u₂ the halves of a head, and with norms of the heads of q and k where a layer has some. A layer is
replaced if it gives what this gives, tried on what the model gives it; what was probed of it says how it
calls attention.

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
from timbre_server.engine.linears import is_linear
from timbre_server.engine.probe import LayerAttention, Recording
from timbre_server.native.library import ADDRESS, NUMBER, LibraryUnavailable, kernel, num_threads

_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORMS = ("q_norm", "k_norm")
_TOKEN_IDS = (1, 2, 3, 4, 5)
_FAR = 100_000
"""Added to the positions that a layer is given beside cos and sin: what depends on them shows."""
_TOLERANCE = 1e-5
"""Relative to the largest number."""

_Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def fuse_rotary(model: PreTrainedModel, layers: Iterable[LayerAttention]) -> None:
    """Replace what can be, in place; to be called before adapters take the places of linear layers."""
    by_path = {layer.path: layer for layer in layers}
    for path, inputs in _inputs_of(model, by_path).items():
        fused = _fused(model.get_submodule(path), by_path[path], inputs)
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

    def __init__(self, base: nn.Module, layer: LayerAttention) -> None:
        """Raises: LibraryUnavailable."""
        super().__init__()
        for name, child in base.named_children():
            setattr(self, name, child)
        self._has_norms = hasattr(base, _NORMS[0])
        self._layer = layer
        self.layer_idx = layer.shape.layer
        """As transformers' own layers say."""
        types = (ADDRESS, NUMBER, ADDRESS, NUMBER, ADDRESS, ADDRESS, NUMBER, NUMBER)
        self._kernel = kernel("timbre_rotary", *types)

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
        num_rows, num_heads, key_dim = q_THD.shape
        assert q_THD.dtype is k_TGD.dtype is cos_1TD.dtype is sin_1TD.dtype is torch.float32
        assert cos_1TD.shape == sin_1TD.shape == (1, num_rows, key_dim)
        cos_1TD, sin_1TD = cos_1TD.contiguous(), sin_1TD.contiguous()
        self._kernel(
            q_THD.data_ptr(),
            num_heads,
            k_TGD.data_ptr(),
            k_TGD.shape[1],
            cos_1TD.data_ptr(),
            sin_1TD.data_ptr(),
            num_rows,
            key_dim,
            num_threads(q_THD.numel()),
        )


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
def _fused(module: nn.Module, layer: LayerAttention, inputs: _Inputs) -> RotaryAttention | None:
    names = {name for name, _ in module.named_children()}
    if names not in ({*_LINEARS}, {*_LINEARS, *_NORMS}) or layer.has_sinks or layer.shape.key_dim % 2:
        return None
    if not all(is_linear(module.get_submodule(name)) for name in _LINEARS):
        return None
    try:
        fused = RotaryAttention(module, layer)
        want, got = _given(module, inputs), _given(fused, inputs)
    except (AssertionError, AttributeError, LibraryUnavailable, RuntimeError, TypeError, ValueError):
        return None
    tolerance = _TOLERANCE * float(want.abs().max())
    return fused if got.shape == want.shape and torch.allclose(got, want, rtol=0, atol=tolerance) else None


def _given(module: nn.Module, inputs: _Inputs) -> Tensor:
    """What a layer gives, far from the first token."""
    args, kwargs = inputs
    far = {
        name: value + _FAR if isinstance(value, Tensor) and not value.is_floating_point() else value
        for name, value in kwargs.items()
    }
    with active(Recording()):
        output, weights = module(*args, **far)
    assert weights is None
    return output  # type: ignore[no-any-return]
