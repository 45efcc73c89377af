"""The manifest: what an adapter is, apart from what it is called.

It holds content only: no name, no version, no time. So equal adapters have equal manifests, and the SHA-256
of the canonical bytes is the adapter's digest, its one identity in queues, caches and logs.

Laws, held by tests:

    Manifest.from_bytes(m.to_bytes()) == m              for every manifest
    Manifest.from_bytes(b).to_bytes() == b              for all bytes that from_bytes accepts

`OPTIONAL` fields came later and are left out where they say nothing: older manifests keep their digests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from timbre_store.digests import digest_of_bytes, is_digest, verify_bytes
from timbre_store.errors import UnsafeFile
from timbre_store.recipe import Recipe
from timbre_store.strict_json import read_object

FORMAT = 1
OPTIONAL: Mapping[str, object] = {
    "derivation": 1,
    "derived_digest": None,
    "invocation_tokens": (),
    "recipe": None,
    "row_copies": 1,
    "scouts": False,
    "virtual_tokens": 0,
}
"""Fields that are left out where they say nothing, and what they hold then."""


@dataclass(frozen=True, slots=True)
class Manifest:
    method: str
    """The method that reads it, e.g. ``lora``."""
    peft_type: str | None
    """As in the config; None where the config has none."""
    base_model_digest: str | None
    """The base that it was checked against; None where it was stored without one."""
    sites: tuple[str, ...]
    """Paths of the linear layers it changes, in model order."""
    parameters: int
    stored_bytes: int
    """Both files together."""
    prepared_bytes: int
    """Memory that it takes in the engine."""
    config_digest: str
    tensors_digest: str
    derived_digest: str | None = None
    """What registration added to the tensors, from the base's weights; left out of the bytes where None."""
    derivation: int = 1
    """How many times its method had changed what it derives, and one."""
    virtual_tokens: int = 0
    """Positions of every request, before its own tokens, that are the adapter's."""
    invocation_tokens: tuple[int, ...] = ()
    """It acts only from their last occurrence in a prompt on."""
    row_copies: int = 1
    """How many times a token runs through a block of the base, once for each expert that a router keeps."""
    scouts: bool = False
    """Whether a pass of the base alone gives its experts their gates."""
    recipe: Recipe | None = None
    """How the server made it of others; None for an adapter that was uploaded."""
    format: int = FORMAT

    def to_bytes(self) -> bytes:
        """Canonical JSON: keys sorted, no spaces, ASCII, no `OPTIONAL` field that says nothing."""
        every = {each.name: getattr(self, each.name) for each in fields(self)}
        every["recipe"] = self.recipe and self.recipe.to_raw()
        raw = {key: value for key, value in every.items() if value != OPTIONAL.get(key, ...)}
        return json.dumps(
            raw, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
        ).encode("ascii")

    @property
    def digest(self) -> str:
        return digest_of_bytes(self.to_bytes())

    @staticmethod
    def from_bytes(content: bytes) -> Manifest:
        """Raises: UnsafeFile for another format, a missing, surplus or mistyped field, or other spelling."""
        raw = read_object(content, what="the manifest", max_depth=4)
        if raw.get("format") != FORMAT:
            raise UnsafeFile(
                f"the manifest has format {raw.get('format')!r}; this version reads format {FORMAT}"
            )
        _check_fields(raw)
        manifest = _from_raw(raw)
        if manifest.to_bytes() != content:
            raise UnsafeFile("the manifest is not in canonical form: keys sorted, no spaces, ASCII")
        return manifest

    @staticmethod
    def of_digest(content: bytes, digest: str) -> Manifest:
        """`from_bytes`, of bytes that this store wrote: their digest stands for all that was checked then.

        Raises: DigestMismatch if they are not those any longer; UnsafeFile if a later version wrote them.
        """
        verify_bytes(content, digest)
        raw = json.loads(content)
        is_ours = raw["format"] == FORMAT and raw.keys() | OPTIONAL.keys() == _FIELDS
        return _from_raw(raw) if is_ours else Manifest.from_bytes(content)


_FIELDS = frozenset(field.name for field in fields(Manifest))


def _from_raw(raw: Mapping[str, Any]) -> Manifest:
    lists = {name: tuple(raw[name]) for name in raw.keys() & {"sites", "invocation_tokens"}}
    recipe = Recipe.from_raw(raw["recipe"]) if "recipe" in raw else None
    return Manifest(**{**raw, **lists, "recipe": recipe})


def _check_fields(raw: dict[str, Any]) -> None:
    if raw.keys() | OPTIONAL.keys() != _FIELDS:
        odd = sorted((raw.keys() ^ _FIELDS) - OPTIONAL.keys())[0]
        raise UnsafeFile(f"the manifest's field {odd!r} is {'unknown' if odd in raw else 'missing'}")
    for name in (
        "format",
        "parameters",
        "stored_bytes",
        "prepared_bytes",
        *(raw.keys() & {"derivation", "virtual_tokens", "row_copies"}),
    ):
        if type(raw[name]) is not int or raw[name] < 0:
            raise UnsafeFile(f"the manifest's {name} is {raw[name]!r}; expected a whole number, 0 or more")
    for name in ("peft_type", "base_model_digest"):
        if not (raw[name] is None or isinstance(raw[name], str)):
            raise UnsafeFile(f"the manifest's {name} is {raw[name]!r}; expected a string or null")
    if not isinstance(raw.get("scouts", False), bool):
        raise UnsafeFile(f"the manifest's scouts is {raw['scouts']!r}; expected true or false")
    if not isinstance(raw["method"], str):
        raise UnsafeFile(f"the manifest's method is {raw['method']!r}; expected a string")
    if not (isinstance(raw["sites"], list) and all(isinstance(site, str) for site in raw["sites"])):
        raise UnsafeFile("the manifest's sites are not a list of strings")
    tokens = raw.get("invocation_tokens", [])
    if not (isinstance(tokens, list) and all(type(token) is int and token >= 0 for token in tokens)):
        raise UnsafeFile("the manifest's invocation_tokens are not a list of token ids")
    for name in ("config_digest", "tensors_digest", *(raw.keys() & {"derived_digest"})):
        if not (isinstance(raw[name], str) and is_digest(raw[name])):
            raise UnsafeFile(f"the manifest's {name} is {raw[name]!r}; expected sha256:<64 hex>")
