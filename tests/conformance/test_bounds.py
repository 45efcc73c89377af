"""Every number in a config has bounds, and both sides of each bound are tried.

What is tried follows from the fields of the configs, so a field without bounds fails here, too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from inspect import isclass
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import pytest
from pydantic.fields import FieldInfo

from timbre_methods.config import PeftConfig
from timbre_methods.errors import InvalidConfig, MethodError
from timbre_methods.registry import methods, prompt_methods
from timbre_methods.routing import MAX_EXPERTS

EVERYTHING = {**methods(), **prompt_methods()}
Wrap = Callable[[object], object]


@dataclass(frozen=True)
class Number:
    """One kind of number that a field takes, by itself or inside a list or a mapping."""

    kind: type
    metadata: tuple[object, ...]
    wrap: Wrap
    """From a number to a value of the field that holds it."""

    def bound(self, name: str) -> Any:
        """Of ``ge``, ``gt``, ``le`` and ``lt``; None where the field does not say."""
        return next((getattr(each, name) for each in self.metadata if hasattr(each, name)), None)

    @property
    def within(self) -> list[float]:
        """The least and the most that are allowed."""
        low, over, high, under = (self.bound(name) for name in ("ge", "gt", "le", "lt"))
        return [
            low if low is not None else self._next(over, math.inf),
            high if high is not None else self._next(under, -math.inf),
        ]

    @property
    def beyond(self) -> list[float]:
        """What is too little and too much, by as little as can be."""
        least, most = self.within
        return [self._next(least, -math.inf), self._next(most, math.inf)]

    def _next(self, value: float, towards: float) -> float:
        if self.kind is int:
            return int(value) + (1 if towards > 0 else -1)
        return math.nextafter(value, towards)


def numbers_of(annotation: Any, metadata: tuple[object, ...], wrap: Wrap) -> Iterator[Number]:
    """The numbers in a field's type, however deep."""
    arguments = get_args(annotation)
    if annotation in (int, float):
        yield Number(annotation, metadata, wrap)
    elif get_origin(annotation) is Annotated:
        inner, *more = arguments
        yield from numbers_of(inner, tuple(constraints(more)), wrap)
    elif get_origin(annotation) in (Union, UnionType):
        for each in arguments:
            yield from numbers_of(each, metadata, wrap)
    elif get_origin(annotation) is list:
        yield from numbers_of(arguments[0], (), lambda value: wrap([value]))
    elif get_origin(annotation) is dict:
        yield from numbers_of(arguments[1], (), lambda value: wrap({"q_proj": value}))
    elif isclass(annotation) and issubclass(annotation, PeftConfig):
        for key, field in annotation.model_fields.items():
            yield from numbers_of(field.annotation, tuple(field.metadata), within_a_config(wrap, key))


def within_a_config(wrap: Wrap, key: str) -> Wrap:
    return lambda value: wrap({key: value})


def constraints(metadata: list[object]) -> Iterator[object]:
    for each in metadata:
        yield from each.metadata if isinstance(each, FieldInfo) else [each]


def fields() -> list[tuple[str, str]]:
    """Method and key of every field that takes a number."""
    return [
        (name, key)
        for name, method in EVERYTHING.items()
        for key, field in get_type_hints(method.parse)["return"].model_fields.items()
        if any(numbers_of(field.annotation, tuple(field.metadata), lambda value: value))
    ]


def numbers(name: str, key: str) -> list[Number]:
    model: type[PeftConfig] = get_type_hints(EVERYTHING[name].parse)["return"]
    field = model.model_fields[key]
    return list(numbers_of(field.annotation, tuple(field.metadata), lambda value: value))


MOST = 2**31 - 1
NOT_BESIDE_THE_EXAMPLE: Mapping[tuple[str, str, float], str] = {
    ("boft", "boft_block_size", MOST): "expected one of them to be 0",
    ("boft", "boft_block_num", 0): "expected one of them to be 0",
    ("gralora", "r", 1): "expected a multiple of gralora_k",
    ("gralora", "r", 4096): "expected a multiple of gralora_k",
    ("gralora", "gralora_k", 4096): "expected a multiple of gralora_k",
    ("road", "group_size", 1): "expected an even number",
    ("road", "group_size", MOST): "expected an even number",
    ("vblora", "num_vectors", 1): "topk: found .*expected at most num_vectors, 1",
    ("qalora", "qalora_group_size", 1): "qalora_group_size=1 is not served: .* train a plain LoRA",
}
"""Numbers within their bounds that another option of the example forbids, or that would mean another method,
by method and key, with the reason that the refusal gives."""
BESIDE: Mapping[tuple[str, str], Mapping[str, object]] = {
    ("arrow", "scales"): {"top_k": 1},
    ("arrow", "top_k"): {"scales": [1.0] * MAX_EXPERTS},
    ("lora_mixer", "scales"): {"top_k": 1},
    ("lora_mixer", "top_k"): {"scales": [1.0] * MAX_EXPERTS},
    ("mola", "num_experts"): {"top_k": 1},
    ("mola", "top_k"): {"num_experts": MAX_EXPERTS},
    ("moram", "k"): {"r_sum": MAX_EXPERTS},
    ("moram", "r_sum"): {"k": 1},
    ("multitask_prompt_tuning", "num_tasks"): {"task_id": 0},
    ("multitask_prompt_tuning", "task_id"): {"num_tasks": MOST},
    ("phatgoose", "num_experts"): {"top_k": 1},
    ("phatgoose", "top_k"): {"num_experts": MAX_EXPERTS},
    ("poly", "n_tasks"): {"task_id": 0},
    ("poly", "task_id"): {"n_tasks": MOST},
    ("smora", "r"): {"top_k": 1},
    ("smora", "top_k"): {"r": MAX_EXPERTS},
    ("xlora", "top_k_lora"): {"adapters": {str(e): {"peft_type": "LORA"} for e in range(MAX_EXPERTS)}},
}
"""What a number at its bounds is read beside, where the example's value of another option narrows them."""
MOST_KEYS = 4096
"""Of a pattern. AdaLoRA's rank_pattern holds no number: its keys are names, looked up and never matched."""

each_field = pytest.mark.parametrize(("name", "key"), fields())
ConfigOf = Callable[[str], dict[str, Any]]


@each_field
def test_every_number_has_a_least_and_a_most(name: str, key: str) -> None:
    for number in numbers(name, key):
        bounds = [number.bound(bound) for bound in ("ge", "gt", "le", "lt")]
        assert sum(bound is not None for bound in bounds[:2]) == 1
        assert sum(bound is not None for bound in bounds[2:]) == 1
        assert all(isinstance(bound, (int, float)) and math.isfinite(bound) for bound in number.within)


@each_field
def test_a_number_out_of_its_bounds_is_refused_with_its_key(name: str, key: str, config_of: ConfigOf) -> None:
    method, raw_config = EVERYTHING[name], config_of(name)
    kinds = numbers(name, key)
    wrong = [
        *(value for kind in kinds for value in kind.beyond),
        "8",
        True,
        math.nan,
        math.inf,
        [[]],
        10**400,
    ]
    if all(kind.kind is int for kind in kinds):
        wrong.append(1.5)
    for value in wrong:
        for kind in kinds:
            with pytest.raises(InvalidConfig, match=rf"{re.escape(key)}[.:]"):
                method.parse({**raw_config, key: kind.wrap(value)})


@each_field
def test_a_number_at_its_bounds_is_read(name: str, key: str, config_of: ConfigOf) -> None:
    method, raw_config = EVERYTHING[name], config_of(name)
    for kind in numbers(name, key):
        for value in kind.within:
            changed = {**raw_config, **BESIDE.get((name, key), {}), key: kind.wrap(value)}
            if (name, key, value) in NOT_BESIDE_THE_EXAMPLE:
                with pytest.raises(MethodError, match=NOT_BESIDE_THE_EXAMPLE[name, key, value]):
                    method.parse(changed)
            else:
                found, given = method.parse(changed).model_dump()[key], kind.wrap(value)
                assert (found | given if isinstance(given, dict) else given) == found


def test_no_number_is_overlooked() -> None:
    """By the text of the annotations, which says whatever is in them."""
    texts = {
        (name, key): str(field.annotation)
        for name, method in EVERYTHING.items()
        for key, field in get_type_hints(method.parse)["return"].model_fields.items()
    }
    assert {at for at, text in texts.items() if re.search(r"\b(int|float)\b", text)} <= set(fields())
    assert {(name, key) for name, key, _ in NOT_BESIDE_THE_EXAMPLE} | set(BESIDE) <= set(fields())


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, key in fields() if key.endswith("_pattern")])
def test_a_pattern_of_too_many_keys_is_refused_with_its_key(name: str, key: str, config_of: ConfigOf) -> None:
    least = numbers(name, key)[0].within[0]
    many = {f"layer{number}": least for number in range(MOST_KEYS + 1)}
    with pytest.raises(InvalidConfig, match=key):
        EVERYTHING[name].parse({**config_of(name), key: many})
