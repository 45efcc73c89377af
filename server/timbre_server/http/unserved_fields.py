"""Fields of the API that are not served here: refused where they would change the answer, else named.

A server that took ``guided_json`` or ``tools`` and left them out would give a wrong answer with status 200.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from timbre_server.errors import UnsupportedParameter
from timbre_server.http.openai_schema import ChatRequest, GenerationRequest

HEADER = "x-ignored-fields"
MAX_NAMED_FIELDS = 32
_SAFE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")

HARMLESS_VALUES: Mapping[str, tuple[object, ...]] = {
    "adapter_scale": (1,),
    "adapter_source": ("registry",),
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "chat_template": (),
    "documents": ([],),
    "function_call": ("none",),
    "functions": ([],),
    "input_audio": (),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "lora_request": (),
    "lora_scale": (1,),
    "loras": ([],),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"], []),
    "prediction": (),
    "prompt_embeds": (),
    "structured_outputs": (),
    "suffix": ("",),
    "thinking_token_budget": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "use_beam_search": (False,),
    "web_search_options": (),
}
"""Each would change the answer, except with these values. ``null`` is harmless for all."""

REFUSED_PREFIXES = ("guided_",)
MESSAGE_FIELDS = ("tool_calls", "function_call", "audio")


def ignored_fields(request: GenerationRequest) -> tuple[str, ...]:
    """Names of the fields that have no effect.

    Raises: UnsupportedParameter for a field that must not be left out.
    """
    extra = request.model_extra or {}
    harmless = {**HARMLESS_VALUES, "best_of": (1, request.n)}  # Of n, the best n are all of them.
    for name, value in extra.items():
        _refuse_if_it_matters(name, value, harmless)
    if request.response_format is not None and request.response_format.type != "text":
        raise UnsupportedParameter(
            f"response_format {request.response_format.type!r} is not served here; expected 'text'",
            param="response_format",
        )
    named = [name for name in extra if name not in harmless]
    if isinstance(request, ChatRequest):
        named += _ignored_in_messages(request)
    return tuple(dict.fromkeys(named))


def ignored_header(names: Iterable[str]) -> dict[str, str]:
    """The header that names them. A name that could not stand in a header is shown as ``?``."""
    shown = [name if _SAFE_NAME.fullmatch(name) else "?" for name in names]
    return {HEADER: ", ".join(shown[:MAX_NAMED_FIELDS])} if shown else {}


def _refuse_if_it_matters(name: str, value: Any, harmless: Mapping[str, tuple[object, ...]]) -> None:
    refused = name.startswith(REFUSED_PREFIXES)
    if name in harmless:
        refused = value not in harmless[name]
    if refused:
        raise UnsupportedParameter(
            f"{name[:64]} is not served here, and leaving it out would change the answer; send the request "
            "without it",
            param=name[:64],
        )


def _ignored_in_messages(request: ChatRequest) -> Iterator[str]:
    for index, message in enumerate(request.messages):
        for name, value in (message.model_extra or {}).items():
            if name in MESSAGE_FIELDS and value:
                raise UnsupportedParameter(
                    f"messages.{index}.{name} is not served here", param=f"messages.{index}.{name}"
                )
            yield f"messages.{name}"
