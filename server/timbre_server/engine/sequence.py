"""A request inside the engine, and the plain data that scheduler and runner exchange. No torch."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from timbre_server.engine.messages import MAX_ROUTED_TOKENS, Routing, Submit, TokenLogprobs

AdapterSlots = tuple[tuple[int, float], ...]
"""The resolved mix of a running request: (adapter slot, weight) pairs; empty for the base."""

VIRTUAL_TOKEN_ID = 0
"""Any id that is in every vocabulary: its embedding is replaced."""


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """One request's tokens and its place in the KV cache. Only the scheduler changes it."""

    request: Submit
    token_ids: list[int]
    """A placeholder for each virtual token of its adapter, prompt, then output."""
    arrival: int
    """Order of submission; ties are impossible."""
    status: Status = Status.WAITING
    num_computed_tokens: int = 0
    """Leading tokens whose KV entries are in the cache."""
    num_cached_tokens: int = 0
    """Of the prompt, taken from the prefix cache at the (last) admission."""
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    """One for each full block of token_ids so far."""
    scout_table: list[int] = field(default_factory=list)
    """Where it scouts: the blocks of the pass of the base alone, as many as in ``block_table``."""
    scout_hashes: list[bytes] = field(default_factory=list)
    """Those that a request for the base would have."""
    adapter_slots: AdapterSlots = ()
    mix: tuple[tuple[str, float], ...] = ()
    """The request's adapters by digest, each once, by `kv_blocks.resolved_mix`."""
    num_skips: int = 0
    """Later requests admitted while this one waited for an adapter."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """For the request's prompt tokens 1, 2, ... as far as they are computed; only where asked."""
    _seen: set[int] = field(default_factory=set)
    _seen_ids: array[int] = field(default_factory=lambda: array("q"))
    _num_seen: int = 0

    num_virtual_tokens: int = field(init=False)
    """Leading positions that the request's adapter fills, and no answer shows."""
    scouts: bool = field(init=False)
    """Whether each token runs through the base alone first, for an adapter that reads what it makes of it."""
    row_copies: int = field(init=False)
    """Rows that each of its tokens is at most, where routers choose for a block or it scouts."""
    turns: tuple[int, ...] = field(init=False)
    """Positions, beside the first, from which on other adapters act than before; increasing."""

    def __post_init__(self) -> None:
        self.num_virtual_tokens = num_virtual_tokens(self.request)
        self.scouts = scouts(self.request)
        self.row_copies = math.prod(use.row_copies for use in self.request.adapters) + self.scouts
        self.turns = tuple(sorted({use.from_position for use in self.request.adapters} - {0}))

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def tables(self) -> tuple[list[int], ...]:
        """Its block tables, one for each pass of a token; equally long."""
        return (self.block_table, self.scout_table) if self.scouts else (self.block_table,)

    @property
    def num_prompt_tokens(self) -> int:
        """Virtual ones included."""
        return self.num_virtual_tokens + len(self.request.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    def seen_ids(self) -> array[int]:
        """The distinct tokens of prompt and output, without virtual ones, in order of first appearance. Each
        token is looked at once, however often this is called; the array grows with the sequence."""
        for token_id in self.token_ids[max(self._num_seen, self.num_virtual_tokens) :]:
            if token_id not in self._seen:
                self._seen.add(token_id)
                self._seen_ids.append(token_id)
        self._num_seen = len(self.token_ids)
        return self._seen_ids

    def acting(self, position: int) -> tuple[bool, ...]:
        """Which adapters of ``mix`` act on a position."""
        if not self.turns:
            return (True,) * len(self.mix)
        starts = {use.digest: use.from_position for use in self.request.adapters}
        return tuple(starts[digest] <= position for digest, _ in self.mix)


def num_virtual_tokens(request: Submit) -> int:
    return sum(use.virtual_tokens for use in request.adapters)


def scouts(request: Submit) -> bool:
    return any(use.scouts for use in request.adapters)


def first_tokens(request: Submit) -> list[int]:
    """What a new sequence holds. Placeholders need no identity: every block's hash has the adapter's."""
    return [VIRTUAL_TOKEN_ID] * num_virtual_tokens(request) + list(request.prompt_token_ids)


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """Run ``num_tokens`` of a sequence, from ``sequence.num_computed_tokens`` on.

    A token is drawn if and only if the chunk reaches the sequence's last token. Chunked prefill, a
    prefix hit, recomputation and decode are all this same case.
    """

    sequence: Sequence
    num_tokens: int

    @property
    def start(self) -> int:
        return self.sequence.num_computed_tokens

    @property
    def end(self) -> int:
        return self.sequence.num_computed_tokens + self.num_tokens

    @property
    def decodes(self) -> bool:
        """Whether it is one row past the prompt. All others are rows of a chunk, even one that is left of
        several: how a prompt is cut must not show."""
        return self.num_tokens == 1 and self.start >= self.sequence.num_prompt_tokens

    @property
    def draws_token(self) -> bool:
        return self.end == len(self.sequence.token_ids)

    @property
    def tells_routing(self) -> bool:
        sequence = self.sequence
        asked = sequence.request.return_routing and self.draws_token
        return asked and sequence.num_output_tokens < MAX_ROUTED_TOKENS

    @property
    def num_virtual(self) -> int:
        """How many of its tokens, the first, are virtual ones."""
        return max(0, min(self.end, self.sequence.num_virtual_tokens) - self.start)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What runs in one step. Decodes come first, each sequence at most once."""

    chunks: tuple[ScheduledChunk, ...]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)


@dataclass(slots=True)
class ChunkResult:
    """What one chunk gave, in the plan's order."""

    token_id: int | None = None
    """The drawn token, where the chunk draws one."""
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    """Where asked: for each prompt token that follows one of the chunk's, both the request's own."""
    routing: tuple[Routing, ...] | None = None
    """Where asked: which experts acted on the row that the token was drawn from."""
    error_message: str | None = None
    """This row failed (NaN logits): its request ends with an error, the others go on."""


@dataclass(frozen=True, slots=True)
class StepResult:
    results: tuple[ChunkResult, ...]
    expert_tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """By digest: how often each expert of a mixture acted."""
