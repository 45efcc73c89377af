"""Who answers a request: the base model, or an adapter or a mix of some, resolved once to their digests.

Everything below this line works with digests; names appear again only in the answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from timbre_server.engine.messages import AdapterUse
from timbre_server.errors import AdapterMismatch, AdapterNotFound, InvalidRequest
from timbre_server.http.context import ServingContext
from timbre_server.http.mixes import Wanted, WeightedAdapter, expanded, refuse_twins, summable
from timbre_store.errors import NotFound
from timbre_store.records import AdapterRecord

ADAPTER_HEADER = "x-timbre-adapter"
DIGEST_HEADER = "x-timbre-adapter-digest"


@dataclass(frozen=True, slots=True)
class Voice:
    """One adapter is a mix of one, of weight 1; an empty mix is the base model itself."""

    model: str
    """As the client wrote it; echoed in the answer."""
    mix: tuple[WeightedAdapter, ...] = ()
    named: AdapterRecord | None = None
    """The stored mix that the request named, and that ``mix`` is the parts of."""

    def uses(self, prompt_token_ids: list[int]) -> tuple[AdapterUse, ...]:
        """What the engine is told for one prompt. Each adapter of a mix acts from its own position on.

        Raises: InvalidRequest where an adapter waits for a sequence that the prompt lacks: it would be named
        in the answer without a part in it.
        """
        return tuple(
            AdapterUse(
                each.adapter.digest,
                each.weight,
                each.adapter.manifest.virtual_tokens,
                _position(each, prompt_token_ids),
                each.adapter.manifest.row_copies,
                each.adapter.manifest.scouts,
            )
            for each in self.mix
        )

    @property
    def virtual_tokens(self) -> int:
        """Positions of each request that are the adapter's, of which no answer tells."""
        return sum(each.adapter.manifest.virtual_tokens for each in self.mix)

    @property
    def names(self) -> tuple[str, ...]:
        """Without versions, each once; of a named mix its own."""
        if self.named is not None:
            return (self.named.name,)
        return tuple(dict.fromkeys(each.adapter.name for each in self.mix))

    @property
    def label(self) -> str | None:
        """``name@version``; of a mix ``name@version;weight=0.7, …``; None for the base."""
        if self.alone is not None:
            return f"{self.alone.name}@{self.alone.version}"
        return ", ".join(f"{each.label};weight={each.weight!r}" for each in self.mix) or None

    @property
    def labels(self) -> dict[str, str]:
        """``name@version`` by digest."""
        return {each.adapter.digest: each.label for each in self.mix}

    def body(self) -> Mapping[str, object] | None:
        """What stands under ``adapter`` in an answer."""
        if not self.mix:
            return None
        if self.named is None and self.alone is not None:
            return _stamp(self.alone)
        mix = [{**_stamp(each.adapter), "weight": each.weight} for each in self.mix]
        return {**(_stamp(self.named) if self.named else {}), "mix": mix}

    def headers(self) -> dict[str, str]:
        if self.label is None:
            return {}
        each_digest = [each.adapter.digest for each in self.mix]
        digests = self.alone.digest if self.alone else ", ".join(each_digest)
        return {ADAPTER_HEADER: self.label, DIGEST_HEADER: digests}

    @property
    def alone(self) -> AdapterRecord | None:
        """The one adapter or named mix that speaks; None for the base, and where weights were asked for."""
        if self.named is None and len(self.mix) == 1 and self.mix[0].weight == 1:
            return self.mix[0].adapter
        return self.named


def _stamp(adapter: AdapterRecord) -> dict[str, str | int]:
    return {"name": adapter.name, "version": adapter.version, "digest": adapter.digest}


def _position(each: WeightedAdapter, prompt_token_ids: list[int]) -> int:
    invocation = list(each.adapter.manifest.invocation_tokens)
    position = last_occurrence(invocation, prompt_token_ids) if invocation else 0
    if position is None:
        raise InvalidRequest(
            f"adapter {each.label} acts only from its invocation sequence on, the tokens "
            f"{invocation[:32]}, and the prompt does not hold them; put them where it shall begin",
            param="prompt",
        )
    return position


def last_occurrence(sought: list[int], token_ids: list[int]) -> int | None:
    """Where the last occurrence of a sequence begins; None where there is none."""
    starts = range(len(token_ids) - len(sought), -1, -1)
    first = sought[0]  # Compared alone: a slice at each of a hundred thousand places takes long.
    found = (at for at in starts if token_ids[at] == first and token_ids[at : at + len(sought)] == sought)
    return next(found, None)


async def resolve_voice(
    context: ServingContext, model: str | None, adapter_id: str | None, wanted: Sequence[Wanted] = ()
) -> Voice:
    """Who is meant by ``model`` and ``adapter_id``; the second wins, and must not contradict the first.
    Adapters that are ``wanted`` with weights are all that speak.

    Raises: InvalidRequest where nobody is named or the fields disagree; AdapterNotFound; AdapterMismatch
    where an adapter was made for another base; MixNotServed.
    """
    if wanted:
        return await _mixed(context, model, adapter_id, wanted)
    if model is None and adapter_id is None:
        raise InvalidRequest(
            f"model is required: {context.base_names[0]!r} for the base model, or an adapter's name",
            param="model",
        )
    by_model = await _adapter_of(context, model, "model") if model is not None else None
    if adapter_id is None:
        assert model is not None
        return _alone(context, model, by_model)
    adapter = await _adapter_of(context, adapter_id, "adapter_id")
    if adapter is None:
        raise AdapterNotFound(f"{adapter_id!r} is the base model, not an adapter", param="adapter_id")
    if by_model is not None and by_model.digest != adapter.digest:
        raise InvalidRequest(
            f"model {model!r} and adapter_id {adapter_id!r} name different adapters; send one of them",
            param="adapter_id",
        )
    return _alone(context, model if model is not None else adapter_id, adapter)


async def _mixed(
    context: ServingContext, model: str | None, adapter_id: str | None, wanted: Sequence[Wanted]
) -> Voice:
    field, base = wanted[0].param.partition(".")[0], context.base_names[0]
    if adapter_id is not None:
        raise InvalidRequest(
            f"adapter_id and {field} both name adapters; send one of them", param="adapter_id"
        )
    if model is not None and model not in context.base_names:
        raise InvalidRequest(
            f"model is {model!r} beside {field}; there it must be {base!r}, the base model, or be left out",
            param="model",
        )
    found = []
    for each in wanted:
        adapter = await _adapter_of(context, each.name, each.param)
        if adapter is None:
            raise AdapterNotFound(f"{each.name!r} is the base model, not an adapter", param=each.param)
        found.append(WeightedAdapter(adapter, each.weight))
    refuse_twins(found, wanted)
    mix = summable(expanded(found, field), context.engine.info.adapter_budget_bytes, field)
    return Voice(model if model is not None else base, mix)


def _alone(context: ServingContext, model: str, adapter: AdapterRecord | None) -> Voice:
    if adapter is None:
        return Voice(model)
    if not adapter.parts:
        return Voice(model, (WeightedAdapter(adapter, 1.0),))
    parts = tuple(WeightedAdapter(part.adapter, part.weight) for part in adapter.parts)
    return Voice(model, summable(parts, context.engine.info.adapter_budget_bytes, "model"), named=adapter)


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
