"""Bodies that are JSON must say so.

A page in a browser can send a form or plain text to any server without asking it first, but not JSON; so a
body of another type is refused with a sentence that says what to add.
"""

from __future__ import annotations

from fastapi import Depends, Request
from starlette.exceptions import HTTPException


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
