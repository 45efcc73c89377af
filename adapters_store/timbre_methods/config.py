"""The strict reading of an ``adapter_config.json`` as PEFT writes it.

A method lists what it reads as a `PeftConfig`: typed, bounded fields. Every other key is one of three
kinds. *Inert* keys (dropout, the task, where training found its layers) change nothing at inference and
are not looked at: the tensors' own names say which layers are adapted, so ``target_modules`` is never
evaluated. A key of any other name is an option that the method does not serve: it may be there and off
(null, false, empty, ``"none"``), and it is refused by name when it is on.

This module knows no method, no tensor and no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from timbre_methods.errors import InvalidConfig, UnsupportedMethod

INERT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "peft_type",
        "peft_version",
        "revision",
        "target_modules",
        "task_type",
    }
)
"""Keys of every PEFT config that change nothing at inference, whatever they hold."""

BESIDE = frozenset({"bias", "ensure_weight_tying", "modules_to_save", "trainable_token_indices"})
"""Options of any method that `timbre_methods.beside` reads; tied tensors are in the file under both names."""

REASONS: Mapping[str, str] = {
    "auto_map": "an adapter never brings code",
    "trust_remote_code": "an adapter never brings code",
    "_attn_implementation_internal": "an adapter never chooses the attention code",
    "layer_replication": "on repeated layers only LoRA, DoRA, aLoRA and BD-LoRA are served",
    "target_parameters": "of all methods plain LoRA alone adapts bare parameters; target layers",
}
"""What to add to the refusal of an option that several methods share."""

MAX_CONFIG_KEYS = 512

Finite = Annotated[float, Field(allow_inf_nan=False, ge=-1e9, le=1e9)]
"""A finite scale; whole numbers are welcome too."""
Rank = Annotated[int, Field(ge=1, le=4096)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Index = Annotated[int, Field(ge=0, le=2**31 - 2)]
"""Of one of a `Count`, from 0."""
RankPattern = Annotated[dict[str, Rank], Field(max_length=4096)]
CountPattern = Annotated[dict[str, Count], Field(max_length=4096)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]


class PeftConfig(BaseModel):
    """What one method reads of the config. Subclasses add fields, and may fill ``inert`` and ``reasons``."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")
    inert: ClassVar[frozenset[str]] = frozenset()
    takes_beside: ClassVar[bool] = True
    """Whether whole layers, token rows and biases may stand in the file, too (`BESIDE`)."""
    reasons: ClassVar[Mapping[str, str]] = {}


C = TypeVar("C", bound=PeftConfig)


def is_on(value: object) -> bool:
    """Whether an option's value switches something on."""
    if isinstance(value, str):
        return value.strip().lower() not in ("", "none")
    return bool(value)


def read_config(model: type[C], raw_config: Mapping[str, Any]) -> C:
    """The typed config of a method.

    Raises `UnsupportedMethod` for an option that is on and that the method does not read, and
    `InvalidConfig` for a field of the wrong type or out of its bounds.
    """
    if len(raw_config) > MAX_CONFIG_KEYS:
        raise InvalidConfig(f"the config has {len(raw_config)} keys, expected at most {MAX_CONFIG_KEYS}")
    read = {}
    for key, value in raw_config.items():
        if key in model.model_fields:
            read[key] = value
        elif key not in INERT | model.inert and not (model.takes_beside and key in BESIDE) and is_on(value):
            reason = model.reasons.get(key) or REASONS.get(key) or "switch it off or convert the adapter"
            raise UnsupportedMethod(
                f"{raw_config.get('peft_type')}: the option {shown(key)} is on ({shown(value)}) "
                f"and is not served: {reason}"
            )
    try:
        return model.model_validate(read)
    except ValidationError as error:
        raise InvalidConfig(first_problem(error)) from None


def shown(value: object) -> str:
    """A value from a file as a message may show it: never longer than a line."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def first_problem(error: ValidationError) -> str:
    """What to say of a config that a model does not take: the place, the reason and what was found."""
    problem = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(str(step)[:80] for step in problem["loc"])
    return f"adapter_config.json: {place}: {problem['msg']}, found {shown(problem['input'])}"


def chosen_task(peft_type: str, task_id: int | None, count_key: str, count: int) -> int:
    """The task that an adapter is for: requests name none, so its config does where there are several.

    Raises `InvalidConfig` where it is missing or there is no such task.
    """
    if task_id is None and count > 1:
        raise InvalidConfig(
            f"{peft_type}: task_id is missing, and the file has {count} tasks ({count_key}), requests none; "
            f'write "task_id", 0 to {count - 1}, into adapter_config.json, and upload the adapter once for '
            "each task"
        )
    if (task_id or 0) >= count:
        raise InvalidConfig(
            f"{peft_type}: task_id: found {task_id}, expected 0 to {count - 1} as {count_key} says"
        )
    return task_id or 0
