"""Everything that the server can refuse or fail with.

ServerError
├── RequestError               the caller can mend it
│   ├── InvalidRequest
│   │   └── UnsupportedParameter   a field of the API that is not served here
│   ├── ContextLengthExceeded
│   ├── AdapterNotFound
│   ├── AdapterMismatch
│   ├── AdapterTooLarge        for the memory that the server has for adapters
│   ├── MixNotServed           adapters that cannot be weighted and summed here
│   ├── PinNotServed           adapters that have no merged weights, or too large ones
│   └── PinConflict            another adapter is pinned, or this one is not
├── CapacityError              later, or elsewhere
│   ├── QueueFull
│   └── NotReady
│       └── Draining
├── RequestAborted             the caller left, or the server drained
└── EngineError                ours
    ├── AdapterLoadFailed      fails the adapter's own requests, not the batch
    ├── EngineDied
    ├── KernelsUnavailable     at start: those that were asked for cannot run here
    └── UnsupportedModel       at start: the model's name and the reason

Which HTTP status and code each one means stands in one table, `http/errors.py`; a test maps every leaf. The
engine, in a process of its own, names them by the codes of `ERRORS_BY_CODE`.
"""

from __future__ import annotations

from collections.abc import Mapping


class ServerError(Exception):
    """The message says what was found, what was expected and what to do; it is safe to show to a client."""


class RequestError(ServerError):
    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidRequest(RequestError):
    pass


class UnsupportedParameter(InvalidRequest):
    pass


class ContextLengthExceeded(RequestError):
    pass


class AdapterNotFound(RequestError):
    pass


class AdapterMismatch(RequestError):
    pass


class AdapterTooLarge(RequestError):
    pass


class MixNotServed(RequestError):
    pass


class PinNotServed(RequestError):
    pass


class PinConflict(RequestError):
    pass


class CapacityError(ServerError):
    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(CapacityError):
    pass


class NotReady(CapacityError):
    pass


class Draining(NotReady):
    pass


class RequestAborted(ServerError):
    pass


class EngineError(ServerError):
    pass


class AdapterLoadFailed(EngineError):
    pass


class EngineDied(EngineError):
    pass


class KernelsUnavailable(EngineError):
    pass


class UnsupportedModel(EngineError):
    pass


ERRORS_BY_CODE: Mapping[str, type[ServerError]] = {
    "adapter_load_failed": AdapterLoadFailed,
    "adapter_too_large": AdapterTooLarge,
    "context_length_exceeded": ContextLengthExceeded,
    "engine_died": EngineDied,
    "invalid_request": InvalidRequest,
    "mix_not_served": MixNotServed,
    "pin_conflict": PinConflict,
    "pin_not_served": PinNotServed,
}
"""An `EngineError` where a code is not here."""
