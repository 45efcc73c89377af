"""What can go wrong, as the server names it.

TimbreError
  ConnectionFailed          no answer came: refused, cut off, timed out
  BrokenAnswer              an answer came that is not what the API describes
  StreamFailed              the server ended a stream with an error, or the connection went before its end
  UnexpectedStatus          an HTTP error; the ones below say which
    InvalidRequest          400, 415, 422
      ContextLengthExceeded
      AdapterRefused        the server read an uploaded adapter and will not serve it
    NotAllowed              401, 403
    NotFound                404
    Conflict                409
    TooLarge                413
    RateLimited             429
    Overloaded              503: full, draining or loading; another replica may do
    StorageFull             507
    ServerFault             any other 5xx
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class TimbreError(Exception):
    """Anything that this package raises for what happened outside the caller's own code."""


class ConnectionFailed(TimbreError):
    """No answer came."""


class BrokenAnswer(TimbreError):
    """An answer came that the API does not describe; is this a Timbre server of this version?"""


class StreamFailed(TimbreError):
    """A stream ended without its end mark. `code` is the server's, None where the connection broke."""

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


class UnexpectedStatus(TimbreError):
    """The server answered with an error. Its own words are the message."""

    def __init__(self, status: int, error: Mapping[str, Any], headers: Mapping[str, str]) -> None:
        self.status = status
        self.message = str(error.get("message") or f"HTTP {status}")
        self.code: str | None = error.get("code")
        self.type: str | None = error.get("type")
        self.param: str | None = error.get("param")
        self.request_id: str | None = headers.get("x-request-id")
        self.retry_after_s = _seconds(headers)
        self.retryable = _retryable(status, headers)
        super().__init__(f"{self.message} (HTTP {status}, {self.code})")


class InvalidRequest(UnexpectedStatus):
    """A field is missing, unknown or out of bounds; `param` names it."""


class ContextLengthExceeded(InvalidRequest):
    """Prompt and output together are longer than the model can read."""


class AdapterRefused(InvalidRequest):
    """The adapter was read, and is not one that the server can serve exactly."""


class NotAllowed(UnexpectedStatus):
    """No key, or a wrong one."""


class NotFound(UnexpectedStatus):
    """No such adapter, model or path."""


class Conflict(UnexpectedStatus):
    """The name is taken, in use, or belongs to another base model."""


class TooLarge(UnexpectedStatus):
    """More bytes than the server takes."""


class RateLimited(UnexpectedStatus):
    """The caller's own limit."""


class Overloaded(UnexpectedStatus):
    """The server is full, draining or loading."""


class StorageFull(UnexpectedStatus):
    """No room left for the upload."""


class ServerFault(UnexpectedStatus):
    """The server failed at a request that it should have served."""


BY_CODE: Mapping[str, type[UnexpectedStatus]] = {
    "context_length_exceeded": ContextLengthExceeded,
    "adapter_invalid": AdapterRefused,
}
BY_STATUS: Mapping[int, type[UnexpectedStatus]] = {
    400: InvalidRequest,
    401: NotAllowed,
    403: NotAllowed,
    404: NotFound,
    409: Conflict,
    413: TooLarge,
    415: InvalidRequest,
    422: InvalidRequest,
    429: RateLimited,
    503: Overloaded,
    507: StorageFull,
}


def error_of(status: int, body: object, headers: Mapping[str, str]) -> UnexpectedStatus:
    """The error of an answer; a body that is not OpenAI's error object leaves the status to speak."""
    found = body.get("error") if isinstance(body, Mapping) else None
    error = found if isinstance(found, Mapping) else {}
    fallback = ServerFault if status >= 500 else UnexpectedStatus
    kind = BY_CODE.get(str(error.get("code"))) or BY_STATUS.get(status, fallback)
    return kind(status, error, headers)


def _seconds(headers: Mapping[str, str]) -> float | None:
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            return float(headers[name]) / unit
        except (KeyError, ValueError):
            continue
    return None


def _retryable(status: int, headers: Mapping[str, str]) -> bool:
    """The server's word where it gave one."""
    word = headers.get("x-should-retry")
    return word == "true" if word in {"true", "false"} else status in {408, 429} or status >= 500
