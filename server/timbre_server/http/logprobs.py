"""Log-probabilities in the three forms that clients know: completions, chat, and vLLM's prompt lists.

A token that is not text by itself, because it holds part of a character, is shown as ``bytes:\\xf0\\x9f``; in
the chat form its bytes stand beside it in any case.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from timbre_server.engine.messages import TokenLogprobs
from timbre_server.http.text import TextCodec

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON has no word for."""


class TokenLabels:
    """What a token is called. Without a tokenizer, or on request, by its id: ``token_id:42``."""

    def __init__(self, codec: TextCodec | None, *, as_ids: bool) -> None:
        self._codec = codec
        self._as_ids = as_ids or codec is None

    def bytes(self, token_id: int) -> bytes:
        return self._codec.token_bytes(token_id) if self._codec is not None else b""

    def label(self, token_id: int) -> str:
        if self._as_ids:
            return f"token_id:{token_id}"
        raw = self.bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class TextOffsets:
    """Where each token begins in the text, in characters; inside a character, where that begins.

    A special token of the ``echoed`` prompt takes room where the client wrote it, and none where the
    tokenizer added it.
    """

    def __init__(self, codec: TextCodec | None, *, skip_special_tokens: bool, echoed: str) -> None:
        self._codec = codec
        self._skip_special_tokens = skip_special_tokens
        self._echoed = echoed
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._chars = 0

    def next(self, token_id: int) -> int:
        """The offset of this token; the tokens must come in order."""
        offset = self._chars
        codec = self._codec
        if codec is not None and self._is_shown(codec, token_id):
            self._chars += len(self._decoder.decode(codec.token_bytes(token_id)))
        return offset

    def _is_shown(self, codec: TextCodec, token_id: int) -> bool:
        if not codec.is_special(token_id):
            return True
        if self._chars < len(self._echoed):
            return self._echoed.startswith(codec.token_bytes(token_id).decode(), self._chars)
        return not self._skip_special_tokens


def completion_logprobs(
    positions: Iterable[tuple[int, TokenLogprobs | None]], labels: TokenLabels, offsets: TextOffsets
) -> dict[str, list[Any]]:
    """OpenAI's completions form, of (token id, its log-probabilities or None for the first of a prompt)."""
    form: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token_id, logprobs in positions:
        form["tokens"].append(labels.label(token_id))
        form["text_offset"].append(offsets.next(token_id))
        form["token_logprobs"].append(None if logprobs is None else _finite(logprobs.logprob))
        form["top_logprobs"].append(None if logprobs is None else _top_by_label(logprobs, labels))
    return form


def _top_by_label(logprobs: TokenLogprobs, labels: TokenLabels) -> dict[str, float]:
    """The most likely tokens, best first, and the token itself."""
    top: dict[str, float] = {}
    for token_id, logprob in (*logprobs.top, (logprobs.token_id, logprobs.logprob)):
        top.setdefault(labels.label(token_id), _finite(logprob))
    return top


def chat_logprobs(logprobs: Sequence[TokenLogprobs], labels: TokenLabels) -> dict[str, list[Any] | None]:
    """OpenAI's chat form."""
    content = [
        {
            **_chat_token(entry.token_id, entry.logprob, labels),
            "top_logprobs": [_chat_token(token_id, logprob, labels) for token_id, logprob in entry.top],
        }
        for entry in logprobs
    ]
    return {"content": content, "refusal": None}


def _chat_token(token_id: int, logprob: float, labels: TokenLabels) -> dict[str, Any]:
    raw = labels.bytes(token_id)
    return {"token": labels.label(token_id), "logprob": _finite(logprob), "bytes": list(raw)}


def prompt_logprobs_list(
    positions: Sequence[TokenLogprobs | None], labels: TokenLabels
) -> list[dict[str, dict[str, Any]] | None]:
    """vLLM's form: for each prompt token its own entry and the most likely ones', by token id."""
    listed: list[dict[str, dict[str, Any]] | None] = []
    for entry in positions:
        if entry is None:
            listed.append(None)
            continue
        ranked = [(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(entry.top, start=1)]
        by_id = {token_id: (logprob, rank) for token_id, logprob, rank in ranked}
        by_id[entry.token_id] = (entry.logprob, entry.rank)
        listed.append(
            {
                str(token_id): {
                    "logprob": _finite(logprob),
                    "rank": rank,
                    "decoded_token": labels.label(token_id),
                }
                for token_id, (logprob, rank) in by_id.items()
            }
        )
    return listed


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB) if logprob == logprob else LEAST_LOGPROB
