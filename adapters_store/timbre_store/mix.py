"""A mix as the store keeps it: two files that hold no tensor, and a manifest made of its parents'."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict

from timbre_store.digests import digest_of_bytes
from timbre_store.manifest import Manifest
from timbre_store.recipe import Recipe

METHOD = "mix"
NO_TENSORS = (8).to_bytes(8, "little") + b"{}      "
"""A safetensors file without a tensor, its header padded as the format's writers do."""


def mix_config(recipe: Recipe) -> bytes:
    """What stands in the place of an ``adapter_config.json``: no method reads it, whoever is given it."""
    parents = [asdict(parent) for parent in recipe.parents]
    return json.dumps({"adapters": parents}, sort_keys=True, separators=(",", ":")).encode("ascii")


def mix_manifest(recipe: Recipe, parents: Sequence[Manifest], base_model: str | None) -> Manifest:
    """Its sites are its parents', and its sizes theirs together: it takes their memory and none beside."""
    config = mix_config(recipe)
    return Manifest(
        method=METHOD,
        peft_type=None,
        base_model_digest=base_model,
        sites=tuple(dict.fromkeys(site for parent in parents for site in parent.sites)),
        parameters=sum(parent.parameters for parent in parents),
        stored_bytes=len(config) + len(NO_TENSORS),
        prepared_bytes=sum(parent.prepared_bytes for parent in parents),
        config_digest=digest_of_bytes(config),
        tensors_digest=digest_of_bytes(NO_TENSORS),
        virtual_tokens=sum(parent.virtual_tokens for parent in parents),
        row_copies=math.prod(parent.row_copies for parent in parents),
        scouts=any(parent.scouts for parent in parents),
        recipe=recipe,
    )
