"""An engine that says what a test tells it to, and the byte-level tokenizer that it says it in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from timbre_server.engine.messages import (
    AdapterLoaded,
    Ready,
    Routing,
    StepOutput,
    StepStats,
    Submit,
    TokenEvent,
    TokenLogprobs,
)
from timbre_server.http.text import TextCodec

MAX_MODEL_LEN = 512
EOS = "<|im_end|>"
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("ð", "Ł"), ("ĺ", "Ģ"), ("Ã", "©"), ("Ġ", "ð"), ("o", "Ã")]
"""Some of them end inside a character: tokens must not be taken for text."""

Reply = Callable[[Submit], Sequence[int]]


def byte_level_tokenizer() -> Tokenizer:
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in MERGES]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken(EOS, special=True)])
    return tokenizer


class ScriptedEngine:
    """Says what ``reply`` says, in events of the sizes of ``event_sizes``, then the end token."""

    def __init__(self, codec: TextCodec, model_name: str, model_digest: str) -> None:
        eos = codec.encode(EOS, add_special_tokens=False)[0]
        self.info = Ready(
            model_name=model_name, model_digest=model_digest, model_type="llama", dtype="float32",
            device="cpu", vocab_size=eos + 1, max_model_len=MAX_MODEL_LEN, eos_token_ids=(eos,), sites=(),
            block_size=16, num_kv_blocks=10, kv_cache_bytes=1, model_bytes=1, adapter_budget_bytes=1,
        )  # fmt: skip
        self.latest = StepStats()
        self.alive = True
        self.eos = eos
        self.codec = codec
        self.text = "hello wörld 😀!"
        self.reply: Reply = lambda _: codec.encode(self.text, add_special_tokens=False)
        self.event_sizes: Sequence[int] = (1,)
        self.gate: asyncio.Event | None = None
        """Waited for before each event after the first."""
        self.failure: TokenEvent | None = None
        """Takes the place of the last event."""
        self.routing: tuple[Routing, ...] = ()
        """Of every token, where it is asked for."""
        self.submitted: list[Submit] = []
        self.aborted: list[str] = []

    def seconds_since_last_step(self) -> float:
        return 0.0

    async def submit(self, request: Submit) -> AsyncGenerator[TokenEvent, None]:
        self.submitted.append(request)
        ended = False
        try:
            for number, event in enumerate(self._events(request)):
                await asyncio.sleep(0)
                if number and self.gate is not None:
                    await self.gate.wait()
                ended = event.finish_reason is not None
                yield event
        finally:
            if not ended:
                self.aborted.append(request.request_id)

    def _events(self, request: Submit) -> Iterator[TokenEvent]:
        sampling = request.sampling
        tokens = [*self.reply(request), self.eos][: sampling.max_tokens]
        ends = [index for index, token in enumerate(tokens) if token in sampling.stop_token_ids]
        if ends:
            tokens = tokens[: ends[0] + 1]
        reason = "stop" if ends else "length"
        first, start = True, 0
        sizes = list(self.event_sizes)
        while start < len(tokens) or first:
            size = sizes[0] if len(sizes) == 1 else sizes.pop(0)
            taken = tuple(tokens[start : start + size])
            start += max(size, 0)
            last = start >= len(tokens)
            if last and self.failure is not None:
                yield TokenEvent(
                    request.request_id,
                    finish_reason=self.failure.finish_reason,
                    error_code=self.failure.error_code,
                    error_message=self.failure.error_message,
                )
                return
            yield TokenEvent(
                request.request_id,
                token_ids=taken,
                logprobs=tuple(self._logprobs(t, sampling.logprobs) for t in taken)
                if sampling.logprobs is not None
                else (),
                routing=tuple(self.routing for _ in taken) if request.return_routing else (),
                prompt_logprobs=self._prompt_logprobs(request) if first else (),
                finish_reason=reason if last else None,  # type: ignore[arg-type]
                stop_token_id=taken[-1] if last and ends else None,
                cached_tokens=3 if first else 0,
            )
            first = False

    def _prompt_logprobs(self, request: Submit) -> tuple[TokenLogprobs | None, ...]:
        wanted = request.sampling.prompt_logprobs
        if wanted is None:
            return ()
        return (None, *(self._logprobs(token, wanted) for token in request.prompt_token_ids[1:]))

    def _logprobs(self, token: int, wanted: int) -> TokenLogprobs:
        count = self.info.vocab_size if wanted == -1 else wanted
        ranked = [token, *(other for other in range(self.info.vocab_size) if other != token)][:count]
        return TokenLogprobs(token, -0.5, 1, tuple((t, -0.5 - rank) for rank, t in enumerate(ranked)))

    async def load_adapter(self, digest: str) -> AdapterLoaded:
        return AdapterLoaded(digest)

    async def unload_adapter(self, digest: str) -> None:
        return None

    def on_output(self, callback: Callable[[StepOutput], None]) -> None:
        return None

    async def close(self) -> None:
        self.alive = False
