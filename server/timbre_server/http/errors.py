"""What each error means in HTTP: one table from exception to status, type and code; OpenAI's error body.

Knows the three error trees and nothing of the routes. A client's SDK reads ``x-should-retry``,
``Retry-After`` and ``retry-after-ms``; the first is ``false`` where the same request would only fail again.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import structlog
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from timbre_methods import errors as methods
from timbre_server import errors as server
from timbre_store import errors as store

MAX_REPORTED_ERRORS = 10
MAX_ECHOED_CHARS = 200
DEFAULT_RETRY_AFTER_S = 1.0

log = structlog.stdlib.get_logger("timbre.http")


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """How one exception class is answered. ``retry`` False: the same request would fail again."""

    status: int
    type: str
    code: str
    retry: bool = True


def _invalid(code: str, status: int = 400) -> ErrorKind:
    return ErrorKind(status, "invalid_request_error", code)


INTERNAL = ErrorKind(500, "server_error", "internal_error")

ERROR_KINDS: Mapping[type[Exception], ErrorKind] = {
    server.InvalidRequest: _invalid("invalid_value"),
    server.UnsupportedParameter: _invalid("unsupported_parameter"),
    server.ContextLengthExceeded: _invalid("context_length_exceeded"),
    server.AdapterNotFound: ErrorKind(404, "not_found_error", "model_not_found"),
    server.AdapterMismatch: ErrorKind(409, "conflict_error", "base_model_mismatch", retry=False),
    server.AdapterTooLarge: _invalid("adapter_too_large", 422),
    server.MixNotServed: _invalid("mix_not_served", 422),
    server.PinNotServed: _invalid("pin_not_served", 422),
    server.PinConflict: ErrorKind(409, "conflict_error", "pin_conflict", retry=False),
    server.QueueFull: ErrorKind(503, "overloaded_error", "queue_full"),
    server.NotReady: ErrorKind(503, "overloaded_error", "loading"),
    server.Draining: ErrorKind(503, "overloaded_error", "draining"),
    server.RequestAborted: ErrorKind(503, "overloaded_error", "aborted"),
    server.AdapterLoadFailed: ErrorKind(500, "server_error", "adapter_load_failed", retry=False),
    server.EngineDied: ErrorKind(503, "server_error", "engine_died"),
    server.KernelsUnavailable: ErrorKind(500, "server_error", "kernels_unavailable", retry=False),
    server.UnsupportedModel: ErrorKind(500, "server_error", "unsupported_model", retry=False),
    server.ServerError: INTERNAL,
    store.InvalidName: _invalid("invalid_value"),
    store.UnsupportedMethod: _invalid("adapter_invalid", 422),
    store.UnexpectedTensor: _invalid("adapter_invalid", 422),
    store.UnsafeFile: _invalid("adapter_invalid", 422),
    store.InvalidAdapter: _invalid("adapter_invalid", 422),
    store.NotFound: ErrorKind(404, "not_found_error", "model_not_found"),
    store.NameConflict: ErrorKind(409, "conflict_error", "adapter_exists", retry=False),
    store.AdapterInUse: ErrorKind(409, "conflict_error", "adapter_in_use", retry=False),
    store.DigestMismatch: _invalid("digest_mismatch"),
    store.BlobTooLarge: _invalid("too_large", 413),
    store.StoreFull: ErrorKind(507, "storage_error", "insufficient_storage", retry=False),
    store.StoreUnavailable: ErrorKind(503, "server_error", "store_unavailable"),
    store.StoreError: INTERNAL,
    methods.UnsupportedMethod: _invalid("adapter_invalid", 422),
    methods.InvalidConfig: _invalid("adapter_invalid", 422),
    methods.AdapterMismatch: _invalid("adapter_invalid", 422),
    methods.InvalidTensors: _invalid("adapter_invalid", 422),
    methods.InvalidRecipe: _invalid("recipe_invalid", 422),
    methods.MethodError: _invalid("adapter_invalid", 422),
}

STATUS_KINDS: Mapping[int, ErrorKind] = {
    400: _invalid("invalid_value"),
    401: ErrorKind(401, "authentication_error", "invalid_api_key"),
    403: ErrorKind(403, "permission_error", "not_allowed"),
    404: ErrorKind(404, "not_found_error", "not_found"),
    405: _invalid("method_not_allowed", 405),
    409: ErrorKind(409, "conflict_error", "conflict", retry=False),
    413: _invalid("too_large", 413),
    415: _invalid("unsupported_media_type", 415),
    422: _invalid("invalid_value", 422),
    429: ErrorKind(429, "rate_limit_error", "rate_limit_exceeded"),
    503: ErrorKind(503, "overloaded_error", "unavailable"),
    507: ErrorKind(507, "storage_error", "insufficient_storage", retry=False),
}
"""For errors that come without a class of ours: the framework's own, such as an unknown path."""


def kind_of(error: Exception) -> ErrorKind:
    """The nearest entry of the table along the class's ancestors; `INTERNAL` where there is none."""
    for ancestor in type(error).__mro__:
        kind = ERROR_KINDS.get(ancestor)
        if kind is not None:
            return kind
    return INTERNAL


def error_body(kind: ErrorKind, message: str, param: str | None = None) -> dict[str, dict[str, str | None]]:
    """OpenAI's error object, all four keys always there."""
    return {"error": {"message": message, "type": kind.type, "param": param, "code": kind.code}}


def body_of(error: Exception) -> dict[str, dict[str, str | None]]:
    """The body for any exception. One that is not of our trees says nothing of its inside."""
    known = isinstance(error, (server.ServerError, store.StoreError, methods.MethodError))
    message = str(error) if known else "The server failed to answer this request; its log says why."
    param = error.param if isinstance(error, server.RequestError) else None
    return error_body(kind_of(error), message, param)


def error_response(
    status: int,
    type: str,
    code: str,
    message: str,
    *,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """An error that no exception stands for, as middleware answers it."""
    kind = ErrorKind(status, type, code, retry=status != 409)
    return _respond(kind, error_body(kind, message, param), headers or {})


def server_error_response(error: Exception) -> Response:
    """The whole answer to an exception of any class."""
    headers: dict[str, str] = {}
    if isinstance(error, server.CapacityError):
        headers = retry_headers(error.retry_after_s)
    return _respond(kind_of(error), body_of(error), headers)


def retry_headers(retry_after_s: float) -> dict[str, str]:
    """Both forms: whole seconds for proxies, milliseconds for OpenAI's SDKs."""
    milliseconds = max(1, math.ceil(retry_after_s * 1000))
    return {"Retry-After": str(math.ceil(milliseconds / 1000)), "retry-after-ms": str(milliseconds)}


def _respond(kind: ErrorKind, body: object, headers: Mapping[str, str]) -> Response:
    merged = dict(headers)
    given = {name.lower() for name in merged}
    if not kind.retry:
        merged["x-should-retry"] = "false"
    if kind.status in (429, 503) and "retry-after" not in given:
        merged |= retry_headers(DEFAULT_RETRY_AFTER_S)
    if kind.status == 401 and "www-authenticate" not in given:
        merged["WWW-Authenticate"] = "Bearer"
    return Response(orjson.dumps(body), kind.status, merged, media_type="application/json")


class ErrorBoundary:
    """Middleware, innermost: an exception that nobody knows ends as a 500 here, and goes no further.

    So the layers around it see an answer like any other. An answer that has begun can only be cut off.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = False

        async def watching_send(message: Message) -> None:
            nonlocal began
            began = began or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watching_send)
        except Exception as error:
            if began:
                raise
            log.exception("request_failed", error=type(error).__name__)
            await server_error_response(error)(scope, receive, send)


def install_error_handlers(
    app: FastAPI, on_store_error: Callable[[str], None] = lambda operation: None
) -> None:
    """Answers every exception that leaves a route in OpenAI's form.

    ``on_store_error`` is told the method and route at which the store failed by itself.
    """

    async def on_store(request: Request, error: Exception) -> Response:
        if kind_of(error).status >= 500:
            on_store_error(f"{request.method} {request.scope['route'].path}")
        return await _on_known(request, error)

    app.add_exception_handler(store.StoreError, on_store)
    for root in (server.ServerError, methods.MethodError):
        app.add_exception_handler(root, _on_known)
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(Exception, _on_unknown)


async def _on_known(request: Request, error: Exception) -> Response:
    if kind_of(error).status == 500:
        log.error("request_failed", path=request.url.path, error=type(error).__name__, message=str(error))
    return server_error_response(error)


async def _on_unknown(request: Request, error: Exception) -> Response:
    """The last resort: starlette raises the error again after this answer, and the server logs it."""
    log.error("request_failed", path=request.url.path, error=type(error).__name__)
    return server_error_response(error)


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code in (204, 304):
        return Response(status_code=error.status_code, headers=error.headers)
    kind = STATUS_KINDS.get(error.status_code)
    if kind is None:
        kind = _invalid("invalid_value", error.status_code) if error.status_code < 500 else INTERNAL
    message = error.detail
    if error.status_code == 404 and message == "Not Found":
        message = f"There is no {request.method} {_echo(request.url.path)} here."
    return _respond(kind, error_body(kind, message), error.headers or {})


async def _on_validation(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return validation_response(error.errors())


def validation_response(errors: Sequence[Any]) -> Response:
    """400 naming at most ten wrong fields, each input cut to 200 characters."""
    lines = [_describe(detail) for detail in errors[:MAX_REPORTED_ERRORS]]
    if len(errors) > MAX_REPORTED_ERRORS:
        lines.append(f"and {len(errors) - MAX_REPORTED_ERRORS} more")
    param = _path(errors[0]) if errors else ""
    kind = STATUS_KINDS[400]
    return _respond(kind, error_body(kind, "; ".join(lines), param or None), {})


def _path(detail: Mapping[str, Any]) -> str:
    """Where the error is, as ``messages.0.role``; FastAPI puts the part of the request first."""
    if detail["type"] == "json_invalid":
        return ""
    parts = [str(part) for part in detail["loc"]]
    if parts and parts[0] in ("body", "query", "path", "header"):
        parts = parts[1:]
    return ".".join(parts)[:MAX_ECHOED_CHARS]


def _describe(detail: Mapping[str, Any]) -> str:
    if detail["type"] == "json_invalid":
        reason = detail.get("ctx", {}).get("error", "it ends too early")
        return f"The body is not valid JSON: {_echo(reason)} at character {detail['loc'][-1]}"
    message = str(detail["msg"]).removeprefix("Value error, ")[: 2 * MAX_ECHOED_CHARS]
    where = _path(detail) or "body"
    if detail["type"] == "missing":
        return f"{where}: this field is required"
    return f"{where}: {message} (found {_echo(detail.get('input'))})"


def _echo(value: object) -> str:
    """A short form of what was sent; never walks a large value."""
    short = reprlib.Repr()
    short.maxlevel, short.maxlist, short.maxdict, short.maxstring = 2, 4, 4, MAX_ECHOED_CHARS
    text = value[:MAX_ECHOED_CHARS] if isinstance(value, str) else short.repr(value)
    return text if len(text) <= MAX_ECHOED_CHARS else text[: MAX_ECHOED_CHARS - 1] + "…"
