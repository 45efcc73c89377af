"""Bodies that are JSON must say so, and be JSON to the letter.

A page in a browser can send a form or plain text to any server without asking it first, but not JSON; so a
body of another type is refused with a sentence that says what to add. The parser is not Python's own, which
takes NaN, and halves of surrogate pairs that nothing can encode again in an answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

import orjson
from fastapi import Depends, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.responses import Response


def require_json(request: Request) -> None:
    """Raises: HTTPException 415."""
    given = request.headers.get("content-type", "")
    media_type = given.partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        found = f"the content type {given[:100]!r}" if given else "no content type"
        raise HTTPException(
            415, f"The request has {found}; send the header 'Content-Type: application/json'."
        )


JSON_ONLY = Depends(require_json)


def parse_json(content: bytes | bytearray) -> Any:
    """Raises: RequestValidationError, as FastAPI does for what is not JSON."""
    try:
        return orjson.loads(content)
    except json.JSONDecodeError as error:
        detail = {"type": "json_invalid", "loc": ("body", error.pos), "ctx": {"error": error.msg}}
        raise RequestValidationError([detail]) from error


class _StrictRequest(Request):
    async def json(self) -> Any:
        return orjson.loads(await self.body())


class JsonRoute(APIRoute):
    """A route whose JSON body is parsed strictly."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return answer
