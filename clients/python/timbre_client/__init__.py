"""A thin typed client of a Timbre server. Knows the HTTP API: nothing of the server's code, no torch."""

from __future__ import annotations

from timbre_client.answers import (
    AdapterStamp,
    ChatAnswer,
    ChatChoice,
    ChatDelta,
    Completion,
    TextChoice,
    TextDelta,
    Usage,
)
from timbre_client.api import ChatMessage, Options
from timbre_client.async_client import AsyncTimbre
from timbre_client.client import Timbre
from timbre_client.errors import (
    AdapterRefused,
    BrokenAnswer,
    Conflict,
    ConnectionFailed,
    ContextLengthExceeded,
    InvalidRequest,
    NotAllowed,
    NotFound,
    Overloaded,
    RateLimited,
    ServerFault,
    StorageFull,
    StreamFailed,
    TimbreError,
    TooLarge,
    UnexpectedStatus,
)
from timbre_client.records import Adapter, AdapterPage, Alias, Model, ModelPage, Version
from timbre_client.upload import Progress

__all__ = [
    "Adapter",
    "AdapterPage",
    "AdapterRefused",
    "AdapterStamp",
    "Alias",
    "AsyncTimbre",
    "BrokenAnswer",
    "ChatAnswer",
    "ChatChoice",
    "ChatDelta",
    "ChatMessage",
    "Completion",
    "Conflict",
    "ConnectionFailed",
    "ContextLengthExceeded",
    "InvalidRequest",
    "Model",
    "ModelPage",
    "NotAllowed",
    "NotFound",
    "Options",
    "Overloaded",
    "Progress",
    "RateLimited",
    "ServerFault",
    "StorageFull",
    "StreamFailed",
    "TextChoice",
    "TextDelta",
    "Timbre",
    "TimbreError",
    "TooLarge",
    "UnexpectedStatus",
    "Usage",
    "Version",
]
