"""Who answers a request: the base model, or one version of one adapter, resolved once to its digest.

Everything below this line works with digests; names appear again only in the answer.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from timbre_server.engine.messages import AdapterUse
from timbre_server.errors import AdapterMismatch, AdapterNotFound, InvalidRequest
from timbre_server.http.context import ServingContext
from timbre_store.errors import NotFound
from timbre_store.records import AdapterRecord

ADAPTER_HEADER = "x-timbre-adapter"
DIGEST_HEADER = "x-timbre-adapter-digest"


@dataclass(frozen=True, slots=True)
class Voice:
    """``adapter`` None: the base model itself."""

    model: str
    """As the client wrote it; echoed in the answer."""
    adapter: AdapterRecord | None

    def uses(self, prompt_token_ids: list[int]) -> tuple[AdapterUse, ...]:
        """What the engine is told for one prompt.

        Raises: InvalidRequest where the adapter waits for a sequence that the prompt lacks: the answer would
        be the base's, in the adapter's name.
        """
        if self.adapter is None:
            return ()
        invocation = list(self.adapter.manifest.invocation_tokens)
        position = last_occurrence(invocation, prompt_token_ids) if invocation else 0
        if position is None:
            raise InvalidRequest(
                f"adapter {self.label} acts only from its invocation sequence on, the tokens "
                f"{invocation[:32]}, and the prompt does not hold them; put them where it shall begin",
                param="prompt",
            )
        return (AdapterUse(self.adapter.digest, 1.0, self.virtual_tokens, position),)

    @property
    def virtual_tokens(self) -> int:
        """Positions of each request that are the adapter's, of which no answer tells."""
        return 0 if self.adapter is None else self.adapter.manifest.virtual_tokens

    @property
    def label(self) -> str | None:
        """``name@version``, or None for the base."""
        return f"{self.adapter.name}@{self.adapter.version}" if self.adapter is not None else None

    def body(self) -> dict[str, str | int] | None:
        """What stands under ``adapter`` in an answer."""
        if self.adapter is None:
            return None
        return {"name": self.adapter.name, "version": self.adapter.version, "digest": self.adapter.digest}

    def headers(self) -> dict[str, str]:
        if self.adapter is None or self.label is None:
            return {}
        return {ADAPTER_HEADER: self.label, DIGEST_HEADER: self.adapter.digest}


def last_occurrence(sought: list[int], token_ids: list[int]) -> int | None:
    """Where the last occurrence of a sequence begins; None where there is none."""
    starts = range(len(token_ids) - len(sought), -1, -1)
    return next((at for at in starts if token_ids[at : at + len(sought)] == sought), None)


async def resolve_voice(context: ServingContext, model: str | None, adapter_id: str | None) -> Voice:
    """Who is meant by ``model`` and ``adapter_id``; the second wins, and must not contradict the first.

    Raises: InvalidRequest where neither is given or they disagree; AdapterNotFound; AdapterMismatch where
    the adapter was made for another base.
    """
    if model is None and adapter_id is None:
        raise InvalidRequest(
            f"model is required: {context.base_names[0]!r} for the base model, or an adapter's name",
            param="model",
        )
    by_model = await _adapter_of(context, model, "model") if model is not None else None
    if adapter_id is None:
        assert model is not None
        return Voice(model, by_model)
    adapter = await _adapter_of(context, adapter_id, "adapter_id")
    if adapter is None:
        raise AdapterNotFound(f"{adapter_id!r} is the base model, not an adapter", param="adapter_id")
    if by_model is not None and by_model.digest != adapter.digest:
        raise InvalidRequest(
            f"model {model!r} and adapter_id {adapter_id!r} name different adapters; send one of them",
            param="adapter_id",
        )
    return Voice(model if model is not None else adapter_id, adapter)


async def _adapter_of(context: ServingContext, name: str, param: str) -> AdapterRecord | None:
    """The adapter of a name, or None for the base model's."""
    if name in context.base_names:
        return None
    reference = _without_base(name, context.base_names)
    try:
        adapter = await asyncio.to_thread(context.resolve, reference)
    except NotFound as error:
        raise AdapterNotFound(f"the model {name!r} does not exist: {error}", param=param) from error
    made_for, served = adapter.manifest.base_model_digest, context.engine.info.model_digest
    if made_for is not None and made_for != served:
        raise AdapterMismatch(
            f"adapter {adapter.name}@{adapter.version} was made for the base model {made_for}; "
            f"this server serves {served}",
            param=param,
        )
    return adapter


def _without_base(name: str, base_names: tuple[str, ...]) -> str:
    """``base:name``, as Ray Serve writes it, is ``name``."""
    for base in base_names:
        if name.startswith(f"{base}:"):
            return name[len(base) + 1 :]
    return name
