"""The seam to transformers: one attention function, registered through its public interface.

Every layer of every supported family calls this function with its query, key and value; it checks what
came with them and hands over to the context of the running step (`context.py`). It neither knows the
cache nor computes anything. The name is deliberately absent from transformers' mask registry: the mask
builders then build no mask, and causality, windows and sequence boundaries are the context's business.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from timbre_server.engine.context import AttentionCall, current
from timbre_server.errors import UnsupportedModel

ATTENTION_NAME = "timbre"

_HARMLESS_TENSORS = frozenset({"position_ids", "cache_position", "position_embeddings"})
"""Given by several families to every layer; they say nothing that query, key and the rows do not."""


def install_attention(model: PreTrainedModel) -> None:
    """Make the model's layers call our attention function. Idempotent.

    A class that does not use transformers' attention interface keeps its own attention, with a log line
    only: the probe finds out.
    """
    AttentionInterface.register(ATTENTION_NAME, attend)
    model.set_attn_implementation(ATTENTION_NAME)


def attend(
    module: nn.Module,
    query_1HTD: Tensor,
    key_1GTD: Tensor,
    value_1GTE: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer over the step's rows: [1, T, H, E], as transformers expects it.

    Raises:
        UnsupportedModel: the layer passed something that changes attention and that we do not apply.
    """
    name = type(module).__name__
    if attention_mask is not None:
        raise UnsupportedModel(
            f"{name} passed its own attention mask; only causal and sliding masks are served."
        )
    if query_1HTD.shape[0] != 1:
        raise UnsupportedModel(
            f"{name} reshaped the flattened batch to {tuple(query_1HTD.shape)}, expected [1, ...]."
        )
    if not getattr(module, "is_causal", True) or options.get("is_causal") is False:
        raise UnsupportedModel(f"{name} attends in both directions; only causal attention is served.")
    _refuse_unknown_tensors(name, options)
    scale = options.get("scaling")
    call = AttentionCall(
        layer=_layer_index(module),
        q_HTD=query_1HTD[0],
        k_GTD=key_1GTD[0],
        v_GTE=value_1GTE[0],
        scale=query_1HTD.shape[-1] ** -0.5 if scale is None else float(scale),
        window=options.get("sliding_window"),
        softcap=options.get("softcap"),
        sinks_H=options.get("s_aux"),
    )
    return current().attend(call).unsqueeze(0), None


def _layer_index(module: nn.Module) -> int:
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise UnsupportedModel(
            f"{type(module).__name__} has no layer_idx; its KV entries could not be told apart."
        )
    return layer


def _refuse_unknown_tensors(name: str, options: dict[str, Any]) -> None:
    known = _HARMLESS_TENSORS | {"s_aux"}
    unknown = sorted(key for key, value in options.items() if torch.is_tensor(value) and key not in known)
    if unknown:
        raise UnsupportedModel(
            f"{name} passed the tensors {', '.join(unknown)} to attention; what they mean is not known here, "
            "so the model cannot be served correctly."
        )
