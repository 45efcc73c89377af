"""What clients may send to the OpenAI routes: OpenAI's fields with its bounds, and vLLM's further ones.

Only shapes and bounds; what needs the model (vocabulary, context length) is checked where the request is
planned. ``null`` means the same as leaving a field out. A field that would change the answer and is not
served is refused by name; one that nobody here knows is let through and named in ``x-ignored-fields``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)

from timbre_server.http.bounds import FewFields, fields, items

MAX_BIASES = 1024
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_IDS = 128
MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_TEMPLATE_VARIABLES = 32
MAX_NAME_CHARS = 256
MAX_TOKEN_ID = 2**31 - 1
MAX_MIX = 8
MAX_WEIGHT = 100.0
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1

Prompt = str | list[str] | list[int] | list[list[int]]


class Body(FewFields):
    """A JSON object in which ``null`` is as good as nothing."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: object) -> object:
        if isinstance(value, dict):
            return {name: field for name, field in value.items() if field is not None}
        return value


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _is_ids(value: object) -> bool:
    if not isinstance(value, list) or set(map(type, value)) - {int}:
        return False
    return not value or (min(value) >= 0 and max(value) <= MAX_TOKEN_ID)


def _check_prompt(value: Any) -> Prompt:
    """By hand: a union of lists would report each wrong element once for each member."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value) or _is_ids(value):
            return value
        if all(_is_ids(item) and item for item in value):
            return value
    raise ValueError("expected a string, a list of strings, a list of token ids, or a list of such lists")


CheckedPrompt = Annotated[
    Prompt,
    PlainValidator(_check_prompt),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}, "minItems": 1},
                {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
                {"type": "array", "items": {"type": "array", "items": {"type": "integer", "minimum": 0}}},
            ]
        }
    ),
]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]
TokenCount = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
NumLogprobs = Annotated[int, Field(ge=-1, le=MAX_TOKEN_ID)]


class StreamOptions(Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False
    """Taken and not acted on."""


class ResponseFormat(Body):
    type: Annotated[str, Field(max_length=64)]


def _no_index(value: object) -> object:
    if isinstance(value, int):
        raise ValueError(
            "an index into a list of adapters means nothing here, where they come and go; name one"
        )
    return value


Weight = Annotated[float, Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT)]
OfMix = items(MAX_MIX, least=1)


class Exact(Body):
    """An object in which a field that nobody knows is an error: it could be a weight by another name."""

    model_config = ConfigDict(extra="forbid")


class MixedAdapter(Exact):
    name: Name
    weight: Weight = 1.0


class MergedAdapters(Exact):
    """LoRAX's spelling of a mix."""

    ids: Annotated[list[Name], OfMix]
    weights: Annotated[list[Weight], items(MAX_MIX)] = Field(default_factory=list)
    """Empty: 1 each."""
    merge_strategy: Annotated[str, Field(max_length=64)] = "linear"
    density: float = Field(0.0, ge=0, le=1)
    majority_sign_method: Annotated[str, Field(max_length=64)] = "total"
    """It and ``density`` say nothing of a linear merge."""

    @model_validator(mode="after")
    def _a_weight_each(self) -> MergedAdapters:
        if self.weights and len(self.weights) != len(self.ids):
            raise ValueError(f"{len(self.ids)} ids have {len(self.weights)} weights; expected one each")
        return self


class ScaledLora(Exact):
    """llama.cpp's spelling of one adapter of a mix."""

    id: Annotated[Name, BeforeValidator(_no_index)]
    scale: Weight


class GenerationRequest(Body):
    """What both routes share."""

    model: Name | None = None
    adapter_id: Name | None = None
    """An adapter by itself, whatever ``model`` says of the base."""
    adapters: Annotated[list[MixedAdapter], OfMix] | None = None
    """Several together, or one with a weight: W + Σ weight · (W_adapter − W)."""
    merged_adapters: MergedAdapters | None = None
    lora: Annotated[list[ScaledLora], items(MAX_MIX)] = Field(default_factory=list)

    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    top_k: int = Field(0, ge=-1, le=MAX_TOKEN_ID)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: Annotated[
        dict[str, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(fields(MAX_BIASES))
    ] = Field(default_factory=dict)
    seed: int | None = Field(None, ge=INT64_MIN, le=INT64_MAX)

    stop: Annotated[list[StopString], items(MAX_STOPS), BeforeValidator(_as_list)] = Field(
        default_factory=list
    )
    stop_token_ids: Annotated[list[TokenId], items(MAX_STOP_IDS)] = Field(default_factory=list)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: TokenCount = 0

    n: int = Field(1, ge=1, le=128)
    prompt_logprobs: NumLogprobs | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    skip_special_tokens: bool = True
    return_token_ids: bool = False
    return_routing: bool = False
    """For each generated token, the experts that acted on the row it was drawn from."""
    return_tokens_as_token_ids: bool = False
    truncate_prompt_tokens: int | None = Field(None, ge=1, le=MAX_TOKEN_ID)
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    response_format: ResponseFormat | None = None
    user: Annotated[str, Field(max_length=1024)] | None = None
    safety_identifier: Annotated[str, Field(max_length=1024)] | None = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream: true only")
        return self


class CompletionRequest(GenerationRequest):
    """``POST /v1/completions``"""

    prompt: CheckedPrompt
    max_tokens: TokenCount | None = None
    logprobs: NumLogprobs | None = None
    echo: bool = False
    add_special_tokens: bool = True


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], items(MAX_PARTS)] = ""
    name: Annotated[str, Field(max_length=256)] | None = None

    def text(self) -> str:
        """The content as one string, parts on lines of their own."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content)


Scalar = str | bool | int | float


class ChatRequest(GenerationRequest):
    """``POST /v1/chat/completions``"""

    messages: Annotated[list[Message], items(MAX_MESSAGES, least=1)]
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKEN_ID)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKEN_ID)] | None = None
    logprobs: bool = False
    top_logprobs: NumLogprobs | None = None
    add_special_tokens: bool = False
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: Annotated[dict[str, Scalar], BeforeValidator(fields(MAX_TEMPLATE_VARIABLES))] = (
        Field(default_factory=dict)
    )

    @model_validator(mode="after")
    def _check_together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs: true only")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message needs add_generation_prompt: false")
        return self
