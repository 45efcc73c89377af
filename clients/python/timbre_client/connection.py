"""What both clients set up alike, and how a failing connection becomes an error of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import httpx2

from timbre_client.calls import cut_off
from timbre_client.errors import BrokenAnswer, ConnectionFailed

DEFAULT_URL = "http://127.0.0.1:8000"
CONNECT_TIMEOUT_S = 5.0


def headers_with(api_key: str | None) -> dict[str, str]:
    return {} if api_key is None else {"authorization": f"Bearer {api_key}"}


def timeouts_of(timeout_s: float) -> httpx2.Timeout:
    """`timeout_s` bounds the wait for each piece of an answer; a server that is there connects at once."""
    return httpx2.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S))


@contextmanager
def connecting(base_url: httpx2.URL) -> Iterator[None]:
    """Until an answer has begun. Raises: ConnectionFailed."""
    try:
        yield
    except httpx2.TransportError as error:
        raise ConnectionFailed(f"no answer from {base_url}: {str(error) or type(error).__name__}") from error


@contextmanager
def streaming() -> Iterator[None]:
    """While a stream is read. Raises: StreamFailed if it is cut off; BrokenAnswer if it is no stream."""
    try:
        yield
    except httpx2.SSEError as error:
        raise BrokenAnswer(str(error)) from error
    except httpx2.TransportError as error:
        raise cut_off() from error
