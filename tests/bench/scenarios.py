"""What a run measures: which loads, on which adapters, and the requests that each is made of.

A scenario with adapters has a *partner*, the same load on the base alone; ratios are taken to it. Both have
requests of the same sizes in a round, and prompts of their own, so that neither finds a prefix in a cache.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from load import Job

Kind = Literal["decode", "prefill", "mixed"]
Popularity = Literal["uniform", "zipf"]
BASE, EVERY = "base", "all"
MIXED_WAVES = 2
"""Requests that a stream of a mixed load sends, one after another."""
STEP_TOKENS = 512
"""What a server is taken to prefill in a step, where requests are made long enough to outlast that."""
FIRST_TOKEN_ID = 100
"""Lower ids are often special ones."""


@dataclass(frozen=True)
class Scenario:
    kind: Kind
    streams: int
    family: str = BASE
    adapters: int = 0
    popularity: Popularity = "uniform"
    prompt_tokens: tuple[int, ...] = (64,)
    """Lengths that requests take in turn."""

    @property
    def name(self) -> str:
        prompts = "/".join(map(str, self.prompt_tokens))
        load = f"{self.kind}, {self.streams} x {prompts}"
        if self.family == BASE:
            return f"{load}: base"
        return f"{load}: {self.family}, {self.adapters} {self.popularity}"

    @property
    def partner(self) -> Scenario:
        return replace(self, family=BASE, adapters=0, popularity="uniform")

    @property
    def requests(self) -> int:
        return self.streams * (MIXED_WAVES if self.kind == "mixed" else 1)


@dataclass(frozen=True)
class Matrix:
    """Scenarios of one kind: every combination that differs from the others."""

    kind: Kind
    streams: tuple[int, ...]
    adapters: tuple[int, ...]
    families: tuple[str, ...]
    popularities: tuple[Popularity, ...] = ("uniform",)
    prompts: tuple[int, ...] = (64,)

    def scenarios(self) -> Iterator[Scenario]:
        prompts = [self.prompts] if self.kind == "mixed" else [(length,) for length in self.prompts]
        for streams, lengths in product(self.streams, prompts):
            base = Scenario(self.kind, streams, prompt_tokens=lengths)
            yield base
            counts = useful_counts(self.adapters, base.requests)
            for family, count, popularity in product(self.families, counts, self.popularities):
                if popularity == "uniform" or count > 1:
                    yield replace(base, family=family, adapters=count, popularity=popularity)


def useful_counts(counts: Sequence[int], requests: int) -> list[int]:
    """Without those that so few requests cannot tell from the next smaller one."""
    ordered = sorted(set(counts) - {0})
    return [n for n, below in zip(ordered, [0, *ordered], strict=False) if below < requests]


def quick(families: tuple[str, ...]) -> tuple[Matrix, ...]:
    chosen = tuple(f for f in families if f in ("lora", "fourierft", EVERY))
    return (Matrix("decode", (16,), (32,), chosen),)


def usual(families: tuple[str, ...]) -> tuple[Matrix, ...]:
    few = tuple(f for f in families if f in ("lora", EVERY))
    return (
        Matrix("decode", (1, 16), (32,), families),
        Matrix("prefill", (4,), (32,), families, prompts=(512,)),
        Matrix("mixed", (16,), (32,), few, ("uniform", "zipf")),
    )


def full(families: tuple[str, ...]) -> tuple[Matrix, ...]:
    streams, counts, prompts = (1, 8, 16, 32), (1, 8, 32), (64, 512)
    popularities: tuple[Popularity, ...] = ("uniform", "zipf")
    return (
        Matrix("decode", streams, counts, families, popularities, prompts),
        Matrix("prefill", streams, counts, families, popularities, prompts),
        Matrix("mixed", streams, counts, families, popularities, prompts),
    )


def jobs(
    scenario: Scenario, names: Mapping[str, Sequence[str]], *, new_tokens: int, vocab_size: int, round_: int
) -> list[list[Job]]:
    """Of each stream. ``names`` has the adapters of each family, and the base's name under `BASE`."""
    chance = random.Random(f"{round_}: {scenario.name}")
    models = picked(names[scenario.family], scenario, chance, round_)
    length = _outlasting(scenario, new_tokens)
    found = []
    for number, model in enumerate(models):
        size = scenario.prompt_tokens[number % len(scenario.prompt_tokens)]
        prompt = tuple(chance.randrange(FIRST_TOKEN_ID, vocab_size) for _ in range(size))
        found.append(Job(model, prompt, length))
    return [found[stream :: scenario.streams] for stream in range(scenario.streams)]


def _outlasting(scenario: Scenario, new_tokens: int) -> int:
    """A decode request goes on for ``new_tokens`` after the last of all prompts has been read."""
    if scenario.kind == "prefill":
        return 1
    if scenario.kind == "mixed":
        return new_tokens
    return new_tokens + math.ceil(scenario.streams * max(scenario.prompt_tokens) / STEP_TOKENS)


def picked(names: Sequence[str], scenario: Scenario, chance: random.Random, round_: int) -> list[str]:
    """Whom each request asks. Uniform: as many different ones as there can be, each about as often, another
    part of the pool in each round. Zipf: the k-th of the pool with a chance of 1 / k."""
    pool, count = list(names[: max(1, scenario.adapters)]), scenario.requests
    if scenario.popularity == "zipf":
        return chance.choices(pool, zipf_weights(len(pool)), k=count)
    first = round_ * count
    models = [pool[(first + i) % len(pool)] for i in range(count)]
    chance.shuffle(models)
    return models


def zipf_weights(count: int) -> list[float]:
    return [1 / (k + 1) for k in range(count)]
