"""What the OpenAI routes are given: everything that they touch, and nothing that builds it.

`build.py` fills one `ServingContext` at start; it is frozen, so a route cannot hide state in it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from timbre_server.engine.client import Engine
from timbre_server.http.text import TextCodec
from timbre_server.request_record import RequestRecord
from timbre_store.records import AdapterRecord, Named, Page


class Admission(Protocol):
    """The gate in front of the engine."""

    def hold(self, num_requests: int, num_tokens: int) -> AbstractContextManager[None]:
        """Room for some sequences and their prompt and expected output tokens, while the block runs.

        Raises: QueueFull.
        """


@dataclass(frozen=True, slots=True)
class ServingLimits:
    max_logprobs: int = 20
    """-1: the whole vocabulary may be asked for."""
    max_prompts: int = 1024
    """Prompts in one completion request, and choices (prompts times n) as well."""
    max_prompt_chars: int = 8 << 20
    """Of all prompts of one request that are text, if there are several."""
    template_timeout_s: float = 10.0
    keep_alive_s: float = 15.0
    """Silence in a stream after which a comment is sent, so that no proxy cuts it."""


@dataclass(frozen=True, slots=True)
class ServingContext:
    engine: Engine
    text: TextCodec | None
    """None: the model has no tokenizer, and serves prompts of token ids only."""
    resolve: Callable[[str], AdapterRecord]
    """name, name@version, name@sha256:… or alias. Blocking; called in a thread. Raises: NotFound."""
    list_names: Callable[[int, str | None], Page[Named]]
    """(limit, after) -> adapters by name and alias, in order of both. Blocking; called in a thread."""
    base_names: tuple[str, ...]
    """Names of the base model; the first is the one that is shown."""
    admission: Admission
    started_s: int
    """Unix time: the base model's ``created``."""
    on_submitted: Callable[[str], None]
    """Called with the id of each sequence that the engine is asked for."""
    on_finished: Callable[[RequestRecord], None]
    """Called once for each sequence that the engine was asked for, however it ended."""
    limits: ServingLimits = field(default_factory=ServingLimits)
