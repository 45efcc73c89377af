"""What is known of one sequence when it ends; made by HTTP, read by metrics and logs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One sequence: a request of two prompts and n=3 makes six. Times are `time.monotonic` seconds."""

    request_id: str
    adapters: tuple[str, ...]
    """Names without versions, each once: one, several of a mix, or none for the base model."""
    arrived_s: float
    first_token_s: float | None
    finished_s: float
    prompt_tokens: int
    cached_tokens: int
    generation_tokens: int
    max_tokens: int
    n: int
    finish_reason: str
    """``stop``, ``length``, ``abort`` (the client left) or ``error``."""
