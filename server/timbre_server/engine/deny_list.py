"""Which models cannot be served, by their configuration alone, before any weight is read.

Each of these computes something else than plain attention over a paged cache would, and most would do so
silently: the text would be wrong, no error would tell. What a configuration cannot tell, the probe does.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from timbre_server.errors import UnsupportedModel

_SERVED_LAYER_TYPES = {"full_attention", "sliding_attention"}
_BATCH_WIDE_ROPE = {"dynamic", "longrope"}


def refuse_by_config(config: PreTrainedConfig) -> None:
    """Raises `UnsupportedModel`, naming the family and the reason, for what cannot be served."""
    text = config.get_text_config()
    family = family_name(config)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"{family}: an encoder-decoder model; only decoder-only causal models are served."
        )
    strange = sorted(set(getattr(text, "layer_types", None) or ()) - _SERVED_LAYER_TYPES)
    if strange:
        raise UnsupportedModel(
            f"{family}: has layers of type {', '.join(strange)}; only full and sliding-window attention "
            "layers can be served, since other kinds keep state outside the KV cache or mask by other rules."
        )
    chunk_size = getattr(text, "attention_chunk_size", None)
    if chunk_size is not None:
        raise UnsupportedModel(
            f"{family}: uses chunked attention (attention_chunk_size = {chunk_size}), a pattern that exists "
            "only in the mask and cannot be served."
        )
    rope = sorted(_rope_types(text) & _BATCH_WIDE_ROPE)
    if rope:
        raise UnsupportedModel(
            f"{family}: its rotary embedding is of type {', '.join(rope)}, which picks the frequencies of "
            "every row by the longest sequence of the batch: a request's text would depend on the others."
        )


def family_name(config: PreTrainedConfig) -> str:
    """The family as a person would search for it: model type, and architecture where it is known."""
    architectures = getattr(config, "architectures", None) or ()
    return f"{config.model_type} ({architectures[0]})" if architectures else str(config.model_type)


def _rope_types(config: PreTrainedConfig) -> set[str]:
    found: set[str] = set()
    pending: list[Any] = [getattr(config, "rope_parameters", None), getattr(config, "rope_scaling", None)]
    while pending:
        entry = pending.pop()
        if isinstance(entry, dict):
            found.update(str(entry[key]) for key in ("rope_type", "type") if isinstance(entry.get(key), str))
            pending.extend(entry.values())
    return found
