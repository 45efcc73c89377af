"""Files of adapters by their digest: ask whether one is here, and send it if not.

For large files: a client that was cut off asks again, and nothing is sent twice. `POST /v1/adapters` then
makes an adapter of two of them. A blob that no adapter takes is removed after a day.
"""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from timbre_server.errors import InvalidRequest
from timbre_server.http.upload import PIECE_BYTES
from timbre_store.digests import is_digest
from timbre_store.store import Store


def blob_router(store: Store, *, max_upload_bytes: int) -> APIRouter:
    """All routes under ``/v1/blobs``."""
    router = APIRouter(prefix="/v1/blobs", tags=["adapters"])

    @router.head("/{digest}")
    async def has_blob(digest: str) -> Response:
        """200 if the file is here, else 404."""
        found = await run_in_threadpool(store.has_blob, _checked(digest))
        return Response(status_code=200 if found else 404)

    @router.put("/{digest}", status_code=201)
    async def put_blob(digest: str, request: Request) -> Response:
        """Stores the body under its digest: 201, or 200 if it was here before."""
        _checked(digest)
        was_here = await run_in_threadpool(store.has_blob, digest)
        with store.begin_blob(max_upload_bytes) as writer:
            piece = bytearray()
            async for chunk in request.stream():
                piece += chunk
                if len(piece) >= PIECE_BYTES:
                    await run_in_threadpool(writer.write, bytes(piece))
                    piece.clear()
            await run_in_threadpool(writer.write, bytes(piece))
            await run_in_threadpool(writer.commit, digest)
            size = writer.size_bytes
        return JSONResponse({"digest": digest, "size_bytes": size}, status_code=200 if was_here else 201)

    return router


def _checked(digest: str) -> str:
    if not is_digest(digest):
        raise InvalidRequest(
            f"{digest[:100]!r} is not a digest; expected sha256:<64 hex digits>", param="digest"
        )
    return digest
