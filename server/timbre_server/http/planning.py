"""From a parsed request to what the engine is asked: prompts as token ids, sampling, one `Submit` a choice.

Checks what needs the model: vocabulary, context length, log-probability limit. Draws the seeds. Knows no
transport and no answer formats.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import msgspec

from timbre_server.engine.messages import AdapterUse, Ready, SamplingParams, Submit
from timbre_server.errors import ContextLengthExceeded, InvalidRequest
from timbre_server.http.context import ServingContext, ServingLimits
from timbre_server.http.openai_schema import ChatRequest, GenerationRequest, Prompt
from timbre_server.http.text import TextCodec

SEED_RANGE = 2**63
LEAST_TOP_P = 1e-9
"""``top_p`` 0 keeps one token, as a very small one does."""


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    token_ids: list[int]
    text: str | None
    """As the client wrote it; None where it came as token ids, or was cut."""


@dataclass(frozen=True, slots=True)
class LogprobWishes:
    """How many alternatives are wanted. None: no log-probabilities; -1: the whole vocabulary."""

    output: int | None
    prompt: int | None


@dataclass(frozen=True, slots=True)
class Choice:
    """One sequence of an answer."""

    index: int
    prompt_index: int
    submit: Submit


async def encode_prompts(
    context: ServingContext, prompt: Prompt, *, add_special_tokens: bool, keep_last: int | None
) -> list[EncodedPrompt]:
    """Each prompt's token ids, of which only the last ``keep_last`` count where that is given.

    Raises: InvalidRequest for text without a tokenizer, ids out of the vocabulary, too much text, or nothing
    at all; ContextLengthExceeded for a text that cannot fit, without a look at those behind it.
    """
    items = _items(prompt)
    codec = context.text
    if len(items) > context.limits.max_prompts:
        raise InvalidRequest(
            f"{len(items)} prompts were sent; at most {context.limits.max_prompts} go in one request",
            param="prompt",
        )
    if codec is not None:
        items = [_bounded(item, codec, context.engine.info, cut=keep_last is not None) for item in items]
    _check_chars(items, context.limits)
    prompts = [await _encoded(context, item, add_special_tokens, keep_last) for item in items]
    _check_ids(prompts, context.engine.info)
    return prompts


def _items(prompt: Prompt) -> list[str | list[int]]:
    """The prompts one by one."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [prompt]
    return [*prompt]


async def _encoded(
    context: ServingContext, item: str | list[int], add_special_tokens: bool, keep_last: int | None
) -> EncodedPrompt:
    """A job of its own for each text, so that those of other requests have their turn between them."""
    codec, most = context.text, context.engine.info.max_model_len
    if isinstance(item, list):
        return _prompt(item, None, keep_last)
    if codec is None:
        raise InvalidRequest(
            "this model has no tokenizer; send the prompt as a list of token ids", param="prompt"
        )
    ids = await codec.in_thread(partial(codec.encode, item, add_special_tokens=add_special_tokens))
    prompt = _prompt(ids, item, keep_last)
    if len(prompt.token_ids) > most:
        raise ContextLengthExceeded(
            f"this model's maximum context length is {most} tokens, but the prompt has "
            f"{len(prompt.token_ids)} tokens; shorten it",
            param="prompt",
        )
    return prompt


def _prompt(ids: list[int], text: str | None, keep_last: int | None) -> EncodedPrompt:
    if keep_last is None or len(ids) <= keep_last:
        return EncodedPrompt(ids, text)
    return EncodedPrompt(ids[-keep_last:], None)


def _bounded(item: str | list[int], codec: TextCodec, info: Ready, *, cut: bool) -> str | list[int]:
    """A text that is not longer than the longest that fits; what is longer takes long to divide."""
    most = info.max_model_len * codec.max_chars_per_token
    if isinstance(item, list) or len(item) <= most:
        return item
    if cut:
        return item[-most:]
    raise ContextLengthExceeded(
        f"the prompt has {len(item)} characters; this model's maximum context length is "
        f"{info.max_model_len} tokens",
        param="prompt",
    )


def _check_chars(items: Sequence[str | list[int]], limits: ServingLimits) -> None:
    """Of several: one alone is as long as the context lets it be."""
    num_chars = sum(len(item) for item in items if isinstance(item, str))
    if len(items) > 1 and num_chars > limits.max_prompt_chars:
        raise InvalidRequest(
            f"the prompts have {num_chars} characters together; at most {limits.max_prompt_chars} are read "
            "in one request",
            param="prompt",
        )


def _check_ids(prompts: Sequence[EncodedPrompt], info: Ready) -> None:
    for index, prompt in enumerate(prompts):
        if not prompt.token_ids:
            raise InvalidRequest(f"prompt {index} has no tokens; expected at least one", param="prompt")
        if max(prompt.token_ids) >= info.vocab_size:
            raise InvalidRequest(
                f"prompt {index} holds token id {max(prompt.token_ids)}; this model's ids go from 0 to "
                f"{info.vocab_size - 1}",
                param="prompt",
            )


def check_logprobs(wanted: int | None, limits: ServingLimits, param: str) -> None:
    """Raises: InvalidRequest for more alternatives than the server gives."""
    most = limits.max_logprobs
    if wanted is None or most == -1 or 0 <= wanted <= most:
        return
    raise InvalidRequest(
        f"{param} is {wanted}; this server gives at most {most}"
        + (" (the whole vocabulary would need its setting max_logprobs = -1)" if wanted == -1 else ""),
        param=param,
    )


def room_for_output(
    info: Ready, prompts: Sequence[EncodedPrompt], virtual_tokens: int, wanted: int | None, default: int
) -> int:
    """How many tokens each choice may have: what the request says, else the default or the room that is left.

    Raises: ContextLengthExceeded where prompt and wanted output together do not fit.
    """
    longest = max(len(prompt.token_ids) for prompt in prompts)
    room = info.max_model_len - virtual_tokens - longest
    if room < (1 if wanted is None else wanted):
        asked = f" and {wanted} tokens of output were asked for" if wanted is not None else ""
        taken = f", the adapter takes {virtual_tokens} of them" if virtual_tokens else ""
        raise ContextLengthExceeded(
            f"this model's maximum context length is {info.max_model_len} tokens{taken}, but the prompt has "
            f"{longest} tokens{asked}; shorten the prompt or the output",
            param="prompt",
        )
    return min(default, room) if wanted is None else wanted


def sampling_params(
    request: GenerationRequest, info: Ready, *, max_tokens: int, logprobs: LogprobWishes
) -> SamplingParams:
    """The engine's parameters, with seed 0. Raises: InvalidRequest."""
    if request.min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens is {request.min_tokens}, more than the {max_tokens} tokens of output",
            param="min_tokens",
        )
    end_token_ids = () if request.ignore_eos else info.eos_token_ids
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=request.min_tokens,
        temperature=request.temperature,
        top_p=max(request.top_p, LEAST_TOP_P),
        top_k=max(request.top_k, 0),
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        logit_bias=_logit_bias(request, info),
        stop_token_ids=tuple(dict.fromkeys((*request.stop_token_ids, *end_token_ids))),
        logprobs=logprobs.output,
        prompt_logprobs=logprobs.prompt,
    )


def _logit_bias(request: GenerationRequest, info: Ready) -> dict[int, float]:
    bias: dict[int, float] = {}
    for key, value in request.logit_bias.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) < info.vocab_size):
            raise InvalidRequest(
                f"logit_bias names the token {key[:40]!r}; expected an id from 0 to {info.vocab_size - 1}",
                param="logit_bias",
            )
        bias[int(key)] = value
    return bias


def plan_choices(
    request: GenerationRequest,
    prompts: Sequence[EncodedPrompt],
    sampling: SamplingParams,
    *,
    request_id: str,
    uses: Callable[[list[int]], tuple[AdapterUse, ...]],
    max_choices: int,
) -> list[Choice]:
    """``n`` sequences for each prompt, in order. With a seed the i-th of each has seed + i.

    ``uses`` gives the adapters of a prompt.

    Raises: InvalidRequest for too many, and as ``uses``.
    """
    if len(prompts) * request.n > max_choices:
        raise InvalidRequest(
            f"{len(prompts)} prompts with n = {request.n} make {len(prompts) * request.n} choices; at most "
            f"{max_choices} go in one request",
            param="n",
        )
    choices = []
    for prompt_index, prompt in enumerate(prompts):
        adapters = uses(prompt.token_ids)
        for copy in range(request.n):
            index = prompt_index * request.n + copy
            seed = secrets.randbelow(SEED_RANGE) if request.seed is None else request.seed + copy
            submit = Submit(
                request_id=f"{request_id}-{index}",
                prompt_token_ids=prompt.token_ids,
                sampling=msgspec.structs.replace(sampling, seed=seed % SEED_RANGE),
                adapters=adapters,
                return_routing=request.return_routing,
                cache_salt=request.cache_salt or "",
            )
            choices.append(Choice(index, prompt_index, submit))
    return choices


async def render_prompt(context: ServingContext, request: ChatRequest) -> str:
    """The conversation as the model's template writes it. Raises: InvalidRequest."""
    codec = context.text
    if codec is None:
        raise InvalidRequest(
            "this model has no tokenizer, so it cannot chat; send token ids to /v1/completions"
        )
    messages = [_template_message(message.role, message.text(), message.name) for message in request.messages]

    def render() -> str:
        return codec.render_chat(
            messages,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            variables=request.chat_template_kwargs,
        )

    try:
        return await codec.in_thread(render, context.limits.template_timeout_s)
    except TimeoutError as error:
        raise InvalidRequest(
            f"the chat template did not end within {context.limits.template_timeout_s:g} s", param="messages"
        ) from error


def _template_message(role: str, content: str, name: str | None) -> dict[str, str]:
    """``developer`` is OpenAI's newer word for ``system``; templates know the older one."""
    message = {"role": "system" if role == "developer" else role, "content": content}
    return message | ({"name": name} if name is not None else {})
