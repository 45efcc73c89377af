"""Which experts acted on each token, as an answer tells it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from timbre_server.engine.messages import Routing


def routing_body(
    routing: Sequence[Sequence[Routing]], labels: Mapping[str, str]
) -> list[dict[str, dict[str, Any]]]:
    """For each token: adapter's label -> path of the router's layer or block -> experts and gates, largest
    gate first. ``labels`` by digest."""
    return [_of_token(token, labels) for token in routing]


def _of_token(choices: Sequence[Routing], labels: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    told: dict[str, dict[str, Any]] = {}
    for choice in choices:
        own = told.setdefault(labels[choice.digest], {})
        own[choice.place] = {"experts": list(choice.experts), "gates": list(choice.gates)}
    return told
