"""Futures by key: who waits for what the engine will say of a digest or a path."""

from __future__ import annotations

import asyncio
from typing import Generic, TypeVar

from timbre_server.errors import ServerError

Answer = TypeVar("Answer")


class Waiting(Generic[Answer]):
    """All methods belong to one event loop."""

    def __init__(self) -> None:
        self._futures: dict[str, list[asyncio.Future[Answer]]] = {}

    def on(self, key: str) -> asyncio.Future[Answer]:
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._futures.setdefault(key, []).append(future)
        return future

    def settle(self, key: str, answer: Answer | ServerError) -> None:
        for future in self._futures.pop(key, ()):
            if future.done():
                continue
            if isinstance(answer, ServerError):
                future.set_exception(answer)
            else:
                future.set_result(answer)

    def settle_all(self, error: ServerError) -> None:
        for key in tuple(self._futures):
            self.settle(key, error)
