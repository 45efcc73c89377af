"""Several adapters in one request: three spellings, read as one list of names and weights, and its limits.

Ours is ``adapters``; ``merged_adapters`` is LoRAX's and ``lora`` is llama.cpp's. All of them mean the exact
sum ``W + Σ w_k (W_k - W)``, and what cannot be had as that sum is refused. Knows no store and no engine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from timbre_server.errors import InvalidRequest, MixNotServed, UnsupportedParameter
from timbre_server.http.openai_schema import MAX_MIX, MAX_WEIGHT, GenerationRequest, MergedAdapters
from timbre_store.records import AdapterRecord, MixPart

LINEAR = "linear"
MAX_ROW_COPIES = 32
"""As the methods have it for one adapter."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """One adapter of a mix, as the client wrote it."""

    name: str
    weight: float
    param: str
    """Where in the request: ``adapters.0.name``."""


@dataclass(frozen=True, slots=True)
class WeightedAdapter:
    adapter: AdapterRecord
    weight: float

    @property
    def label(self) -> str:
        return f"{self.adapter.name}@{self.adapter.version}"


def wanted_mix(request: GenerationRequest) -> tuple[Wanted, ...]:
    """The adapters that a request names with weights; empty where it names none.

    Raises: InvalidRequest where two fields name some; UnsupportedParameter for another merge than the sum.
    """
    spellings = {
        "adapters": tuple(
            Wanted(each.name, each.weight, f"adapters.{index}.name")
            for index, each in enumerate(request.adapters or ())
        ),
        "merged_adapters": _merged(request.merged_adapters),
        "lora": tuple(
            Wanted(each.id, each.scale, f"lora.{index}.id") for index, each in enumerate(request.lora)
        ),
    }
    used = [field for field, mix in spellings.items() if mix]
    if len(used) > 1:
        raise InvalidRequest(f"{used[0]} and {used[1]} both name adapters; send one of them", param=used[1])
    return spellings[used[0]] if used else ()


def _merged(merged: MergedAdapters | None) -> tuple[Wanted, ...]:
    if merged is None:
        return ()
    if merged.merge_strategy != LINEAR:
        raise UnsupportedParameter(
            f"merge_strategy {merged.merge_strategy!r} is not served here; expected {LINEAR!r}, the exact "
            "sum of the adapters' changes",
            param="merged_adapters.merge_strategy",
        )
    weights = merged.weights or [1.0] * len(merged.ids)
    return tuple(
        Wanted(name, weight, f"merged_adapters.ids.{index}")
        for index, (name, weight) in enumerate(zip(merged.ids, weights, strict=True))
    )


def refuse_twins(mix: Sequence[WeightedAdapter], wanted: Sequence[Wanted]) -> None:
    """Raises: InvalidRequest where two names lead to one adapter: nothing says which weight is meant."""
    seen: dict[str, Wanted] = {}
    for found, asked in zip(mix, wanted, strict=True):
        first = seen.setdefault(found.adapter.digest, asked)
        if first is not asked:
            raise InvalidRequest(
                f"{first.name!r} and {asked.name!r} are one and the same adapter, {found.label}; name it "
                "once, with the sum of the weights",
                param=asked.param,
            )


def expanded(mix: Sequence[WeightedAdapter], param: str) -> tuple[WeightedAdapter, ...]:
    """With each named mix in its parts' place, and what then comes twice once, with the sum of its weights.

    Raises: MixNotServed for too many in the end; InvalidRequest for weights that multiply to too large ones.
    """
    found: dict[str, WeightedAdapter] = {}
    for each in mix:
        for part in each.adapter.parts or (MixPart(each.adapter, 1.0),):
            before = found.get(part.adapter.digest)
            weight = each.weight * part.weight + (before.weight if before else 0.0)
            found[part.adapter.digest] = WeightedAdapter(part.adapter, weight)
    large = next((each for each in found.values() if abs(each.weight) > MAX_WEIGHT), None)
    if large is not None:
        raise InvalidRequest(
            f"with the named mixes in it {large.label} has the weight {large.weight!r}; expected at most "
            f"{MAX_WEIGHT:g} either way",
            param=param,
        )
    if len(found) > MAX_MIX:
        raise MixNotServed(
            f"with the named mixes in it these are {len(found)} adapters; at most {MAX_MIX} answer together",
            param=param,
        )
    return tuple(found.values())


def summable(mix: Sequence[WeightedAdapter], budget_bytes: int, param: str) -> tuple[WeightedAdapter, ...]:
    """What of a mix acts: all but weight 0.

    Raises: MixNotServed where their changes have no weighted sum, or can never be in memory together. Bases
    that adapters share are in no manifest's bytes; the engine, which knows them, ends what is too large with
    them.
    """
    acting = tuple(each for each in mix if each.weight != 0)
    if len(acting) == 1 and acting[0].weight == 1:
        return acting
    for each in acting:
        if num_virtual := each.adapter.manifest.virtual_tokens:
            raise MixNotServed(
                f"adapter {each.label} ({each.adapter.manifest.method}) puts {num_virtual} virtual tokens "
                "before the prompt, and those have no weighted sum; send it alone, with weight 1",
                param=param,
            )
    copies = math.prod(each.adapter.manifest.row_copies for each in acting)
    if len(acting) > 1 and copies > MAX_ROW_COPIES:
        raise MixNotServed(
            f"each token would run through a block {copies} times, once for each joint choice of the "
            f"adapters' routers; expected at most {MAX_ROW_COPIES}; mix fewer of those that route",
            param=param,
        )
    # Manifests count float32, half of which lies in 16 bits at best: the engine, too, knows how many do.
    needed = math.ceil(sum(each.adapter.manifest.prepared_bytes for each in acting) / 2)
    if len(acting) > 1 and needed > budget_bytes:
        raise MixNotServed(
            f"the {len(acting)} adapters need {needed} bytes in memory together, or more, and the budget for "
            f"all adapters is {budget_bytes}; mix fewer or smaller ones, or raise the server's "
            "--adapter-memory-mib",
            param=param,
        )
    return acting
