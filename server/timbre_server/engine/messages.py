"""What crosses the waist between HTTP and the engine: token ids and numbers, never text, never tensors.

All are frozen msgspec structs, tagged by their type's name, so that one MessagePack decoder reads each
direction (`ToEngine`, `FromEngine`). Neither this module nor `pin_messages` imports torch or any other room.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from timbre_server.engine.pin_messages import PinAdapter, PinAnswer, PinnedAdapter, UnpinAdapter

FinishReason = Literal["stop", "length", "abort", "error"]


class Message(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Base of everything on the wire."""


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How one request's tokens are drawn. Bounds are checked at the HTTP edge; the engine trusts them.

    Order of application to the fp32 logits of a row: logit_bias, repetition / presence / frequency
    penalties, min_tokens (end tokens masked), then greedy if ``temperature == 0``; else temperature,
    top_k, top_p, min_p, one uniform from (seed, number of output tokens so far).
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: no limit."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Over prompt and output, as CTRL and transformers define it."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    """Presence and frequency look at the output only, as OpenAI and vLLM define them."""
    logit_bias: dict[int, float] = {}
    seed: int = 0
    """Always set: the HTTP edge draws one where the client gives none."""
    stop_token_ids: tuple[int, ...] = ()
    """The client's and the model's end-of-sequence ids (the latter left out under ``ignore_eos``)."""
    logprobs: int | None = None
    """None: none. n: the chosen token's and the n most likely. -1: the whole vocabulary. Raw, before
    bias, penalties and temperature."""
    prompt_logprobs: int | None = None
    """The same for each prompt token (the first has none). Such a request does not read the prefix cache."""


class AdapterUse(msgspec.Struct, frozen=True):
    """One adapter of a request's mix: effective weight is W + Σ weight · (W_adapter − W)."""

    digest: str
    weight: float = 1.0
    virtual_tokens: int = 0
    """As its manifest says: so many positions come before the prompt's. Such an adapter must be alone."""
    from_position: int = 0
    """It acts on this position and all that follow; one place for each digest."""
    row_copies: int = 1
    """As its manifest says: so many times each token runs through a block of the base."""
    scouts: bool = False
    """As its manifest says: each token first runs through the base alone, which gives its experts' gates."""


MAX_ROUTED_TOKENS = 128
"""Of one answer, whose routing is told."""


class Submit(Message, frozen=True):
    """Start a request. ``request_id`` is unique; exactly one final `TokenEvent` will answer it."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    adapters: tuple[AdapterUse, ...] = ()
    cache_salt: str = ""
    """Requests of different salts never share KV blocks. Set by the server (tenant), may add the client's."""
    return_routing: bool = False
    """Say which experts acted on the rows that the first `MAX_ROUTED_TOKENS` tokens are drawn from."""


class Abort(Message, frozen=True):
    """Stop a request; its slot and blocks are free before the next step. Unknown ids are ignored."""

    request_id: str


class LoadAdapter(Message, frozen=True):
    """Make an adapter resident ahead of its first request. Answered by `AdapterLoaded`."""

    digest: str


class UnloadAdapter(Message, frozen=True):
    """Drop an adapter from memory once no request uses it. Answered by `AdapterUnloaded`."""

    digest: str


class DeriveTensors(Message, frozen=True):
    """Write what an adapter's file leaves out and the base's weights give. Answered by `TensorsDerived`."""

    config: bytes
    """The adapter's config, JSON."""
    tensors_path: str
    derived_path: str
    """A safetensors file that is not there yet; it names the answer."""


class Shutdown(Message, frozen=True):
    """Leave the loop at once; requests still there are aborted."""


Command = Submit | Abort | LoadAdapter | UnloadAdapter | DeriveTensors | PinAdapter | UnpinAdapter
ToEngine = Command | Shutdown


class SiteShape(msgspec.Struct, frozen=True):
    """One layer or block of the base, as adapters see it (`timbre_methods.contract.Site`)."""

    path: str
    out_features: int
    in_features: int
    has_bias: bool
    kind: Literal["linear", "embedding", "norm", "block", "parameter"] = "linear"
    is_transposed: bool = False
    """Whether the base stores the weight [in, out]."""
    tied_to: str | None = None
    """The embedding whose very table this head multiplies by."""
    slices: int = 1
    """Of a parameter, whose ``out_features`` are the rows of all its slices."""
    scale: float = 1.0
    """By what an embedding multiplies what it looks up."""


class AttentionShape(msgspec.Struct, frozen=True):
    """One attention layer of the base, as prompts see it."""

    path: str
    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    shares_with: int | None = None
    """The earlier layer whose keys and values this one attends to, where it has none of its own."""


class Ready(Message, frozen=True):
    """The model is loaded, probed and checked. The first message of an engine that started well."""

    model_name: str
    model_digest: str
    """SHA-256 over the base's config, weights' names and shapes, and stack: adapters are bound to it."""
    model_type: str
    dtype: str
    device: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    sites: tuple[SiteShape, ...]
    block_size: int
    num_kv_blocks: int
    kv_cache_bytes: int
    model_bytes: int
    adapter_budget_bytes: int
    hidden_size: int = 0
    attention: tuple[AttentionShape, ...] = ()
    """In layer order."""
    stack: tuple[int, ...] = ()
    """The checkpoint's layer at each place, where not each stands once and in order."""
    kernels: str = "torch"
    """What runs the adapters' arithmetic."""


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Natural logarithms of probabilities at one position."""

    token_id: int
    logprob: float
    rank: int
    """1 is the most likely token."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely tokens, best first; ties in token order."""


class Routing(msgspec.Struct, frozen=True, array_like=True):
    """The experts of one adapter that acted at one place, largest gate first."""

    digest: str
    place: str
    """The path of the layer or block whose router chose."""
    experts: tuple[int, ...]
    gates: tuple[float, ...]


class TokenEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one step gave one request. A request has any number of these and exactly one with a
    ``finish_reason``, its last."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    """As many as token_ids where asked, else empty."""
    routing: tuple[tuple[Routing, ...], ...] = ()
    """As many as token_ids where asked, else empty."""
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    """Whole, on the first event that carries a token (or the final one when max_tokens is 0)."""
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    """The end token that finished it; it is the last of token_ids."""
    cached_tokens: int = 0
    """Prompt tokens taken from the prefix cache; on the first event that carries a token."""
    error_code: str | None = None
    error_message: str | None = None


class AdapterLoaded(msgspec.Struct, frozen=True, omit_defaults=True):
    """An adapter became resident, or failed to."""

    digest: str
    method: str = ""
    prepared_bytes: int = 0
    seconds_by_phase: dict[str, float] = {}
    """``verify`` (read and hash), ``compile``, ``place``."""
    error_code: str | None = None
    error_message: str | None = None


class AdapterUnloaded(msgspec.Struct, frozen=True):
    digest: str
    reason: Literal["evicted", "unloaded", "absent"]  # The last: asked for, and was not in memory.


class TensorsDerived(msgspec.Struct, frozen=True, omit_defaults=True):
    """The file is there, or an error says why not."""

    derived_path: str
    error_code: Literal["invalid_adapter", "disk_full", "busy", "failed"] | None = None
    error_message: str = ""


class StepStats(msgspec.Struct, frozen=True, omit_defaults=True):
    """Gauges after a step, and what was counted in it. Sent after every step, and when idle state changes."""

    timestamp: float = 0.0
    step_seconds: float = 0.0
    """0 when nothing ran."""
    num_running: int = 0
    num_waiting: int = 0
    num_waiting_for_adapter: int = 0
    num_kv_blocks_used: int = 0
    """Blocks that a running request holds; cached but unused blocks count as free."""
    batch_tokens: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    distinct_adapters: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    num_resident_adapters: int = 0
    resident_adapters: tuple[str, ...] = ()
    """Digests in memory, most recently used last; of many the last alone."""
    waiting_adapters: tuple[str, ...] = ()
    resident_adapter_bytes: int = 0
    pinned: PinnedAdapter | None = None
    expert_tokens: dict[str, tuple[int, ...]] = {}
    """By digest: how often each expert of a mixture acted on a token, over all places where it routes."""


class StepOutput(Message, frozen=True, omit_defaults=True):
    """Everything that the engine says after one turn of its loop, in one message."""

    stats: StepStats
    events: tuple[TokenEvent, ...] = ()
    loaded: tuple[AdapterLoaded, ...] = ()
    unloaded: tuple[AdapterUnloaded, ...] = ()
    derived: tuple[TensorsDerived, ...] = ()
    started: tuple[str, ...] = ()
    """Requests whose first tokens ran in this step; again for one that was preempted before any output."""
    pins: tuple[PinAnswer, ...] = ()


class Progress(Message, frozen=True):
    """What the engine is doing while it starts, for the console."""

    text: str


class Failed(Message, frozen=True):
    """The engine could not start or died; the last message it sends."""

    code: str
    text: str


FromEngine = Ready | StepOutput | Progress | Failed
