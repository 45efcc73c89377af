"""Multitask prompt tuning, as PEFT saves it: one prompt for all tasks, times a low-rank factor of each.

    p = P ∘ (C_t R_t)      P [v, D], C_t [v, r] and R_t [r, D] of task t

A request cannot say which task it is of, so only files of one task are served, where there is no choice.

Legend: V virtual tokens, D hidden size, R rank, S tasks.

Paper: arXiv 2303.02861.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from timbre_methods.config import Count, Rank, read_config
from timbre_methods.contract import Sites, Tensors
from timbre_methods.errors import UnsupportedMethod
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


class MultitaskPromptTuning(PromptMethod[MultitaskConfig]):
    name = "multitask_prompt_tuning"
    paper = "arXiv 2303.02861"
    stored = "embeddings [v, hidden], factors [1, v, r] and [1, r, hidden], once a model"
    checked_against = "PEFT"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "MULTITASK_PROMPT_TUNING"

    def parse(self, raw_config: Mapping[str, Any]) -> MultitaskConfig:
        config = read_config(MultitaskConfig, raw_config)
        if config.num_tasks != 1:
            raise UnsupportedMethod(
                f"MULTITASK_PROMPT_TUNING: num_tasks={config.num_tasks} is not served: a request cannot say "
                "which task it is of; save each task's rows and columns as an adapter of num_tasks=1"
            )
        return config

    def compile(
        self, config: MultitaskConfig, tensors: Tensors, sites: Sites, frame: Frame
    ) -> AdapterProgram:
        count, rank, width = config.num_virtual_tokens, config.num_ranks, frame.hidden_size
        found = take_all(
            tensors, {EMBEDDINGS: (count, width), COLUMNS: (1, count, rank), ROWS: (1, rank, width)}
        )
        factor_VD = found[COLUMNS][0].to(torch.float32) @ found[ROWS][0].to(torch.float32)
        return AdapterProgram({}, prompt=PromptEmbeddings(found[EMBEDDINGS].to(torch.float32) * factor_VD))

    def example(
        self, sites: Sites, frame: Frame, generator: torch.Generator
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        rank = whole_number(1, 3, generator)
        options = {"num_ranks": rank, "num_tasks": 1, "prompt_tuning_init_task": 0}
        config, tensors = embeddings_example("MULTITASK_PROMPT_TUNING", options, frame, generator)
        tensors[COLUMNS] = random_tensor((1, config["num_virtual_tokens"], rank), generator)
        tensors[ROWS] = random_tensor((1, rank, frame.hidden_size), generator)
        return config, tensors
