"""Multitask prompt tuning, as PEFT saves it: one prompt for all tasks, times a low-rank factor of each.

    p = P ∘ (C_t R_t)      P [v, D], C_t [v, r] and R_t [r, D] of task t

A request cannot say which task it is of, so the adapter does: ``task_id`` in its config, which PEFT neither
writes nor reads, names t where the file holds several tasks. Each of them is an adapter of its own.

Legend: V virtual tokens, D hidden size, R rank.

Paper: arXiv 2303.02861.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from timbre_methods.config import Count, Index, Rank, chosen_task, read_config
from timbre_methods.contract import Sites, Tensors
from timbre_methods.examples import random_tensor, whole_number
from timbre_methods.program import AdapterProgram
from timbre_methods.prompt.prompt_tuning import PromptTuningConfig, embeddings_example
from timbre_methods.prompt.virtual_tokens import EMBEDDINGS, take_all
from timbre_methods.prompt_contract import Frame, PromptMethod
from timbre_methods.prompt_parts import PromptEmbeddings

COLUMNS, ROWS = "prefix_task_cols", "prefix_task_rows"


class MultitaskConfig(PromptTuningConfig):
    inert = PromptTuningConfig.inert | {"prompt_tuning_init_state_dict_path", "prompt_tuning_init_task"}

    num_ranks: Rank = 1
    num_tasks: Count = 1
    task_id: Index | None = None
    """Which task is served; None where there is one alone."""


class MultitaskPromptTuning(PromptMethod[MultitaskConfig]):
    name = "multitask_prompt_tuning"
    paper = "arXiv 2303.02861"
    stored = "embeddings [v, hidden], factors [tasks, v, r] and [tasks, r, hidden], once a model"
    checked_against = "PEFT"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "MULTITASK_PROMPT_TUNING"

    def parse(self, raw_config: Mapping[str, Any]) -> MultitaskConfig:
        config = read_config(MultitaskConfig, raw_config)
        chosen_task("MULTITASK_PROMPT_TUNING", config.task_id, "num_tasks", config.num_tasks)
        return config

    def compile(
        self, config: MultitaskConfig, tensors: Tensors, sites: Sites, frame: Frame
    ) -> AdapterProgram:
        count, rank, width = config.num_virtual_tokens, config.num_ranks, frame.hidden_size
        tasks, task = config.num_tasks, config.task_id or 0
        found = take_all(
            tensors, {EMBEDDINGS: (count, width), COLUMNS: (tasks, count, rank), ROWS: (tasks, rank, width)}
        )
        factor_VD = found[COLUMNS][task].to(torch.float32) @ found[ROWS][task].to(torch.float32)
        return AdapterProgram({}, prompt=PromptEmbeddings(found[EMBEDDINGS].to(torch.float32) * factor_VD))

    def example(
        self, sites: Sites, frame: Frame, generator: torch.Generator
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        rank, tasks = whole_number(1, 3, generator), whole_number(1, 3, generator)
        options = {"num_ranks": rank, "num_tasks": tasks, "prompt_tuning_init_task": 0}
        if tasks > 1:
            options["task_id"] = whole_number(0, tasks - 1, generator)
        config, tensors = embeddings_example("MULTITASK_PROMPT_TUNING", options, frame, generator)
        tensors[COLUMNS] = random_tensor((tasks, config["num_virtual_tokens"], rank), generator)
        tensors[ROWS] = random_tensor((tasks, rank, frame.hidden_size), generator)
        return config, tensors
