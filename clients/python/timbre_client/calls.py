"""One HTTP exchange as a value: what to send, and how to read what comes back.

The two clients differ in how they carry a call, and in nothing else. This module knows no connection.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import httpx2

from timbre_client.errors import BrokenAnswer, StreamFailed, error_of

Answer = TypeVar("Answer")
END_MARK = "[DONE]"


class Body(Protocol):
    """Bytes that either client can send, from the start each time it is asked."""

    def __iter__(self) -> Iterator[bytes]: ...
    def __aiter__(self) -> AsyncIterator[bytes]: ...


@dataclass(frozen=True, slots=True)
class Call(Generic[Answer]):
    """``read`` gets the JSON body; ``expected`` maps further statuses to answers without one."""

    method: str
    path: str
    read: Callable[[Any], Answer]
    json: Mapping[str, Any] | None = None
    query: Mapping[str, Any] = field(default_factory=dict)
    body: Body | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    expected: Mapping[int, Answer] = field(default_factory=dict)

    def request(self, client: httpx2.Client | httpx2.AsyncClient) -> httpx2.Request:
        """The request, with the client's address and headers."""
        content: Iterator[bytes] | AsyncIterator[bytes] | None = None
        if self.body is not None:
            content = aiter(self.body) if isinstance(client, httpx2.AsyncClient) else iter(self.body)
        return client.build_request(
            self.method,
            self.path,
            json=self.json,
            params={name: value for name, value in self.query.items() if value is not None},
            content=content,
            headers=self.headers,
        )

    def answer(self, response: httpx2.Response) -> Answer:
        """What a response means. The response must have been read.

        Raises: UnexpectedStatus, as narrow as the server was; BrokenAnswer.
        """
        if response.status_code in self.expected:
            return self.expected[response.status_code]
        if not response.is_success:
            raise error_of(response.status_code, _json_or_none(response.content), response.headers)
        try:
            return self.read(json.loads(response.content))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise BrokenAnswer(
                f"{self.method} {self.path} answered {response.status_code} with "
                f"{response.text[:200]!r}, which this client cannot read"
            ) from error


def pieces(event: httpx2.ServerSentEvent, read: Callable[[Any], tuple[Answer, ...]]) -> tuple[Answer, ...]:
    """What one event of a stream holds.

    Raises: StreamFailed where the event is an error; BrokenAnswer.
    """
    try:
        body = json.loads(event.data)
        if body.get("error"):
            raise StreamFailed(str(body["error"].get("message")), body["error"].get("code"))
        return read(body)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenAnswer(f"the stream holds {event.data[:200]!r}, which this client cannot read") from error


def cut_off() -> StreamFailed:
    """The error of a stream that stopped before its end mark."""
    return StreamFailed("the connection ended before the stream did; the text so far is not whole")


def _json_or_none(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None
