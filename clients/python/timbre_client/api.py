"""The API's calls, each made from what a caller says. Knows paths and fields, and no connection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict
from urllib.parse import quote

from timbre_client.answers import ChatAnswer, Completion
from timbre_client.calls import Call
from timbre_client.records import Adapter, AdapterPage, Collection, MadeAdapter, ModelPage

Prompt = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]


RecipeKind = Literal[
    "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune", "svd", "lego", "lorahub", "arrow",
    "routed",
]  # fmt: skip
CollectionKind = Literal["joint_full", "joint_diagonal", "reversible"]


class RecipeNumbers(TypedDict, total=False):
    """What a kind reads beside its parents; the server refuses what it does not."""

    rank: int
    density: float
    """The fraction of values that the kind keeps, above 0 and at most 1."""
    seed: int
    top_k: int
    """How many experts of ``arrow`` or ``routed`` act on a token."""
    temperature: float
    general: Sequence[str]
    """Adapters whose mean is taken from the parents (GenKnowSub)."""
    router: str
    """Digest of a router's file, as ``upload_file`` returns it."""
    renormalised: bool
    """Whether the shares of those that act are divided by their sum."""


class ChatMessage(TypedDict):
    role: str
    content: str


class Options(TypedDict, total=False):
    """What goes beside model and prompt. The server's defaults hold for what is left out."""

    mix: Mapping[str, float]
    """Adapters by name, each with its weight, for this request; the model is then the base's name or None."""
    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[str, float]
    seed: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    n: int
    logprobs: int | bool
    top_logprobs: int
    echo: bool
    user: str


def complete(model: str | None, prompt: Prompt, options: Options) -> Call[Completion]:
    body = {**_fields(options), "model": model, "prompt": prompt}
    return Call("POST", "/v1/completions", Completion.of, json=body)


def chat(model: str | None, messages: Sequence[ChatMessage], options: Options) -> Call[ChatAnswer]:
    body = {**_fields(options), "model": model, "messages": messages}
    return Call("POST", "/v1/chat/completions", ChatAnswer.of, json=body)


def streamed(call: Call[Any]) -> Call[None]:
    """The same request, answered in pieces, with the usage in the last."""
    body = {**(call.json or {}), "stream": True, "stream_options": {"include_usage": True}}
    return Call(call.method, call.path, _nothing, json=body)


def list_models(limit: int | None, after: str | None) -> Call[ModelPage]:
    return Call("GET", "/v1/models", ModelPage.of, query={"limit": limit, "after": after})


def list_adapters(limit: int | None, after: str | None) -> Call[AdapterPage]:
    return Call("GET", "/v1/adapters", AdapterPage.of, query={"limit": limit, "after": after})


def get_adapter(reference: str) -> Call[Adapter]:
    return Call("GET", adapter_path(reference), Adapter.of)


def delete_adapter(reference: str, wait: bool) -> Call[None]:
    query = {"wait": "true"} if wait else {}
    return Call("DELETE", adapter_path(reference), _nothing, query=query)


def set_alias(alias: str, target: str) -> Call[Adapter]:
    return Call("PUT", f"{adapter_path(target)}/alias", Adapter.of, json={"alias": alias})


def pin_adapter(reference: str) -> Call[Adapter]:
    return Call("POST", f"{adapter_path(reference)}/pin", Adapter.of, json={"mode": "merged"})


def unpin_adapter(reference: str) -> Call[Adapter]:
    return Call("DELETE", f"{adapter_path(reference)}/pin", Adapter.of)


def create_recipe(
    name: str, kind: RecipeKind, parents: Mapping[str, float], numbers: RecipeNumbers
) -> Call[MadeAdapter]:
    named = [{"name": parent, "weight": weight} for parent, weight in parents.items()]
    body = {"name": name, "kind": kind, "parents": named, **numbers}
    return Call("POST", "/v1/recipes", MadeAdapter.of, json=body)


def compress(members: Mapping[str, str], rank: int, kind: CollectionKind) -> Call[Collection]:
    named = [{"parent": parent, "name": name} for parent, name in members.items()]
    return Call(
        "POST", "/v1/recipes/compress", Collection.of, json={"kind": kind, "rank": rank, "members": named}
    )


def is_ready() -> Call[bool]:
    return Call("GET", "/readyz", lambda body: True, expected={200: True, 503: False})


def adapter_path(reference: str) -> str:
    return f"/v1/adapters/{quote(reference, safe='@:')}"


def _fields(options: Options) -> dict[str, Any]:
    fields: dict[str, Any] = {**options}
    if "mix" in options:
        mix = fields.pop("mix")
        fields["adapters"] = [{"name": name, "weight": weight} for name, weight in mix.items()]
    return fields


def _nothing(body: Any) -> None:
    return None
