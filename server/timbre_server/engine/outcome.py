"""How a request ends and what is said about it: pure functions from a sequence to its events.

Error codes on events: ``invalid_request``, ``context_length_exceeded``, ``adapter_load_failed``,
``adapter_too_large``, ``mix_not_served`` (its adapters can never be in memory together), ``invalid_logits``
(the row held NaN or no finite logit) and ``engine_error`` (the step failed).
"""

from __future__ import annotations

from timbre_server.engine.messages import FinishReason, Submit, TokenEvent, TokenLogprobs
from timbre_server.engine.sequence import ChunkResult, Sequence, num_virtual_tokens, scouts


def refusal(request: Submit, max_len: int, vocab_size: int | None) -> TokenEvent | None:
    """The final event of a request that can never run, None for all others."""
    prompt, answer = request.prompt_token_ids, request.sampling.max_tokens
    num_virtual = num_virtual_tokens(request)
    if not prompt:
        return _refused(request, "invalid_request", "the prompt has no tokens; expected at least one")
    if num_virtual and (len(request.adapters) > 1 or request.adapters[0].weight != 1):
        culprit = next(use.digest for use in request.adapters if use.virtual_tokens)
        text = f"adapter {culprit} must be a request's only one, of weight 1: virtual tokens have no sum"
        return _refused(request, "invalid_request", text)
    if num_virtual + len(prompt) + min(answer, 1) > max_len:
        beside = f" beside {num_virtual} virtual ones of its adapter" if num_virtual else ""
        twice = (
            " (each of them twice, for an adapter that reads a pass of the base)" if scouts(request) else ""
        )
        text = (
            f"the prompt has {len(prompt)} tokens{beside}; the context holds {max_len}{twice}, the answer's "
            "included"
        )
        return _refused(request, "context_length_exceeded", text)
    if vocab_size is not None and not 0 <= min(prompt) <= max(prompt) < vocab_size:
        outside = next(token for token in prompt if not 0 <= token < vocab_size)
        text = f"prompt token {outside} is not in the model's vocabulary of {vocab_size} tokens"
        return _refused(request, "invalid_request", text)
    return None


def _refused(request: Submit, code: str, message: str) -> TokenEvent:
    return TokenEvent(request.request_id, finish_reason="error", error_code=code, error_message=message)


def stop_reason(sequence: Sequence, max_len: int) -> FinishReason | None:
    """Whether the token just appended is a sequence's last, and why."""
    sampling, num_output = sequence.request.sampling, sequence.num_output_tokens
    if sequence.token_ids[-1] in sampling.stop_token_ids and num_output > sampling.min_tokens:
        return "stop"
    if num_output >= sampling.max_tokens or len(sequence.token_ids) >= max_len:
        return "length"
    return None


def token_event(
    sequence: Sequence, outcome: ChunkResult, reason: FinishReason | None, *, is_first: bool
) -> TokenEvent:
    """What the token just appended to a sequence is told as."""
    token_id = sequence.token_ids[-1]
    return TokenEvent(
        sequence.request_id,
        token_ids=(token_id,),
        logprobs=() if outcome.logprobs is None else (outcome.logprobs,),
        routing=() if outcome.routing is None else (outcome.routing,),
        prompt_logprobs=_all_prompt_logprobs(sequence) if is_first else (),
        finish_reason=reason,
        stop_token_id=token_id if reason == "stop" else None,
        cached_tokens=_own_cached_tokens(sequence) if is_first else 0,
    )


def final_event(sequence: Sequence, reason: FinishReason, *, code: str = "", message: str = "") -> TokenEvent:
    """The end of a sequence that brings no token."""
    is_whole = reason == "length"
    return TokenEvent(
        sequence.request_id,
        prompt_logprobs=_all_prompt_logprobs(sequence) if is_whole else (),
        finish_reason=reason,
        cached_tokens=_own_cached_tokens(sequence) if is_whole else 0,
        error_code=code or None,
        error_message=message or None,
    )


def _own_cached_tokens(sequence: Sequence) -> int:
    return max(0, sequence.num_cached_tokens - sequence.num_virtual_tokens)


def _all_prompt_logprobs(sequence: Sequence) -> tuple[TokenLogprobs | None, ...]:
    if sequence.request.sampling.prompt_logprobs is None:
        return ()
    return (None, *sequence.prompt_logprobs)
