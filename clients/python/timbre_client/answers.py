"""What completions and chat answer, whole or in pieces. Fields that a newer server adds are left out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class AdapterStamp:
    """Which adapter spoke."""

    name: str
    version: int
    digest: str
    weight: float = 1.0

    @staticmethod
    def of(body: Mapping[str, Any]) -> AdapterStamp | None:
        """None: the base model spoke, or a mix without a name of its own."""
        stamp = body.get("adapter")
        return None if stamp is None or "name" not in stamp else _stamp(stamp)

    @staticmethod
    def mix_of(body: Mapping[str, Any]) -> tuple[AdapterStamp, ...]:
        """The adapters of a mix; empty where none was asked for."""
        return tuple(map(_stamp, (body.get("adapter") or {}).get("mix", ())))


def _stamp(stamp: Mapping[str, Any]) -> AdapterStamp:
    return AdapterStamp(stamp["name"], stamp["version"], stamp["digest"], stamp.get("weight", 1.0))


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int
    """Prompt tokens that came from the prefix cache."""

    @staticmethod
    def of(body: Mapping[str, Any]) -> Usage | None:
        usage = body.get("usage")
        if usage is None:
            return None
        details = usage.get("prompt_tokens_details") or {}
        return Usage(
            usage["prompt_tokens"],
            usage["completion_tokens"],
            usage["total_tokens"],
            details.get("cached_tokens") or 0,
        )


@dataclass(frozen=True, slots=True)
class TextChoice:
    index: int
    text: str
    finish_reason: str | None
    logprobs: Mapping[str, Any] | None
    """As OpenAI's completions have it: tokens, token_logprobs, top_logprobs, text_offset."""


@dataclass(frozen=True, slots=True)
class Completion:
    id: str
    model: str
    choices: tuple[TextChoice, ...]
    usage: Usage | None
    adapter: AdapterStamp | None
    mix: tuple[AdapterStamp, ...] = ()
    """The adapters that spoke together, with their weights; ``adapter`` is the mix's own, if it is stored."""

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text

    @staticmethod
    def of(body: Mapping[str, Any]) -> Completion:
        choices = tuple(
            TextChoice(item["index"], item["text"], item.get("finish_reason"), item.get("logprobs"))
            for item in body["choices"]
        )
        return Completion(
            body["id"],
            body["model"],
            choices,
            Usage.of(body),
            AdapterStamp.of(body),
            AdapterStamp.mix_of(body),
        )


@dataclass(frozen=True, slots=True)
class ChatChoice:
    index: int
    content: str
    finish_reason: str | None
    logprobs: Mapping[str, Any] | None
    """As OpenAI's chat has it: content, a list of tokens."""


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    id: str
    model: str
    choices: tuple[ChatChoice, ...]
    usage: Usage | None
    adapter: AdapterStamp | None
    mix: tuple[AdapterStamp, ...] = ()
    """The adapters that spoke together, with their weights; ``adapter`` is the mix's own, if it is stored."""

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].content

    @staticmethod
    def of(body: Mapping[str, Any]) -> ChatAnswer:
        choices = tuple(
            ChatChoice(
                item["index"],
                item["message"]["content"] or "",
                item.get("finish_reason"),
                item.get("logprobs"),
            )
            for item in body["choices"]
        )
        return ChatAnswer(
            body["id"],
            body["model"],
            choices,
            Usage.of(body),
            AdapterStamp.of(body),
            AdapterStamp.mix_of(body),
        )


@dataclass(frozen=True, slots=True)
class TextDelta:
    """A piece of one choice. A stream's first event names the adapter, its last has the usage and no text."""

    index: int
    text: str
    finish_reason: str | None
    usage: Usage | None
    adapter: AdapterStamp | None
    mix: tuple[AdapterStamp, ...] = ()
    """The adapters that spoke together, with their weights; ``adapter`` is the mix's own, if it is stored."""

    @staticmethod
    def of(body: Mapping[str, Any]) -> tuple[TextDelta, ...]:
        usage, adapter, mix = Usage.of(body), AdapterStamp.of(body), AdapterStamp.mix_of(body)
        if not body["choices"]:
            return (TextDelta(0, "", None, usage, adapter, mix),)
        return tuple(
            TextDelta(item["index"], item["text"], item.get("finish_reason"), usage, adapter, mix)
            for item in body["choices"]
        )


@dataclass(frozen=True, slots=True)
class ChatDelta:
    """A piece of one choice. A stream's first event names the adapter, its last has the usage and no text."""

    index: int
    content: str
    finish_reason: str | None
    usage: Usage | None
    adapter: AdapterStamp | None
    mix: tuple[AdapterStamp, ...] = ()
    """The adapters that spoke together, with their weights; ``adapter`` is the mix's own, if it is stored."""

    @staticmethod
    def of(body: Mapping[str, Any]) -> tuple[ChatDelta, ...]:
        usage, adapter, mix = Usage.of(body), AdapterStamp.of(body), AdapterStamp.mix_of(body)
        if not body["choices"]:
            return (ChatDelta(0, "", None, usage, adapter, mix),)
        return tuple(
            ChatDelta(
                item["index"],
                item["delta"].get("content") or "",
                item.get("finish_reason"),
                usage,
                adapter,
                mix,
            )
            for item in body["choices"]
        )
