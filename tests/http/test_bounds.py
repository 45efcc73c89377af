"""However many elements of a body are wrong, few are looked at: each would be an error of its own."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, ValidationError

from timbre_server.http.adapters import AliasBody, RegisterBody
from timbre_server.http.compression import CompressBody
from timbre_server.http.openai_schema import ChatRequest, CompletionRequest, MergedAdapters
from timbre_server.http.pins import PinBody
from timbre_server.http.recipe_schema import RecipeBody
from timbre_server.http.vllm_compat import LoadBody, UnloadBody

BODIES = (
    AliasBody, ChatRequest, CompletionRequest, CompressBody, LoadBody, PinBody, RecipeBody, RegisterBody,
    UnloadBody,
)  # fmt: skip
MANY = 2000
WRONG = [[1.5] * MANY, [{"type": "image_url"}] * MANY, {str(index): [] for index in range(MANY)}]
MOST_ERRORS = 16
"""Those of the fields that are required, and a few for each type that a value may have."""


def number_of_errors(body: type[BaseModel], value: object) -> int:
    try:
        body.model_validate(value)
    except ValidationError as error:
        return error.error_count()
    return 0


@pytest.mark.parametrize("wrong", WRONG, ids=["numbers", "parts", "fields"])
@pytest.mark.parametrize("body", BODIES)
def test_many_wrong_values_in_any_field_make_few_errors(body: type[BaseModel], wrong: object) -> None:
    counts = {name: number_of_errors(body, {name: wrong}) for name in body.model_fields}
    assert {name: count for name, count in counts.items() if count > MOST_ERRORS} == {}


@pytest.mark.parametrize("body", BODIES)
def test_many_unknown_fields_make_few_errors(body: type[BaseModel]) -> None:
    assert number_of_errors(body, {f"k{index}": index for index in range(MANY)}) <= MOST_ERRORS


@pytest.mark.parametrize("content", WRONG, ids=["numbers", "parts", "fields"])
def test_many_wrong_parts_of_a_message_make_few_errors(content: object) -> None:
    message = {"role": "user", "content": content}
    assert number_of_errors(ChatRequest, {"messages": [message] * 9}) <= MOST_ERRORS


@pytest.mark.parametrize("field", MergedAdapters.model_fields)
@pytest.mark.parametrize("wrong", WRONG, ids=["numbers", "parts", "fields"])
def test_many_wrong_values_of_a_mix_make_few_errors(field: str, wrong: object) -> None:
    body = {"prompt": "x", "merged_adapters": {"ids": ["a"], field: wrong}}
    assert number_of_errors(CompletionRequest, body) <= MOST_ERRORS
