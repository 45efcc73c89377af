"""What the files of all prompt methods share: PEFT's config of virtual tokens, and tensors without a site.

This module knows no method.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, Literal

from torch import Tensor

from timbre_methods.config import Count, PeftConfig
from timbre_methods.contract import Tensors
from timbre_methods.errors import InvalidTensors
from timbre_methods.site_tensors import FLOATS, check_tensor

EMBEDDINGS = "prompt_embeddings"
"""PEFT's name of what was learned, whatever it is the embedding of."""


class VirtualTokensConfig(PeftConfig):
    """The fields that matter at inference; an encoder that made the embeddings is not in the file."""

    takes_beside = False

    num_virtual_tokens: Count
    num_transformer_submodules: Literal[1] | None = None
    """2: an encoder and a decoder, each with its own prompt."""


class EmbeddingsConfig(VirtualTokensConfig):
    """The same, where the tensors are embeddings: attention's sizes do not matter."""

    inert = frozenset({"num_attention_heads", "num_layers", "token_dim"})


def take_all(tensors: Tensors, shapes: Mapping[str, tuple[int | str, ...]]) -> dict[str, Tensor]:
    """Exactly these tensors. Raises `InvalidTensors` for a missing, surplus or misshapen one."""
    surplus = next((name for name in tensors if name not in shapes), None)
    if surplus is not None:
        raise InvalidTensors(f"{surplus[:200]!r} is surplus: expected only {_few(shapes)}")
    missing = next((name for name in shapes if name not in tensors), None)
    if missing is not None:
        raise InvalidTensors(f"{missing} is missing, while the file holds {_few(tensors) or 'no tensor'}")
    for name, shape in shapes.items():
        check_tensor(name, tensors[name], shape, FLOATS)
    return {name: tensors[name] for name in shapes}


def _few(names: Iterable[str]) -> str:
    shown = [name[:100] for name in islice(names, 3)]
    return ", ".join(shown) + (", ..." if len(shown) == 3 else "")


def prompt_file(peft_type: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """An ``adapter_config.json`` of a prompt with the keys that PEFT always writes."""
    common = {
        "auto_mapping": None,
        "base_model_name_or_path": "tiny",
        "inference_mode": True,
        "modules_to_save": None,
        "num_transformer_submodules": 1,
        "peft_type": peft_type,
        "peft_version": "0.21.2",
        "revision": None,
        "task_type": "CAUSAL_LM",
    }
    return dict(sorted({**common, **options}.items()))
