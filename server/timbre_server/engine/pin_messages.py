"""What crosses the waist about the one adapter, or mix, whose weights are merged; see `messages`."""

from __future__ import annotations

from typing import Literal

import msgspec


class PinAdapter(msgspec.Struct, frozen=True, tag=True):
    """Merge a mix into weights of its own, for steps of its rows alone. Answered by `PinAnswer`."""

    digest: str
    """Of the adapter or the named mix: it names the pin."""
    mix: tuple[tuple[str, float], ...]
    """The adapters' digests with their weights."""


class UnpinAdapter(msgspec.Struct, frozen=True, tag=True):
    """Drop the merged weights. Answered by `PinAnswer`."""

    digest: str


class PinnedAdapter(msgspec.Struct, frozen=True):
    """What is merged now."""

    digest: str
    num_sites: int
    merged_bytes: int
    """Beside those of the adapters themselves."""


class PinAnswer(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of one `PinAdapter` or `UnpinAdapter`."""

    asked: Literal["pin", "unpin"]
    digest: str
    pinned: PinnedAdapter | None = None
    error_code: (
        Literal["pin_not_served", "pin_conflict", "adapter_load_failed", "adapter_too_large"] | None
    ) = None
    error_message: str = ""
