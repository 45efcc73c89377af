"""A context's embeddings and their learned move, which the file holds as one sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft import CPTConfig
from torch import nn


def test_greedy_text_is_peft_s(llama: nn.Module, write_with_peft: Callable[..., Any], as_peft: Any) -> None:
    config = CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=[5, 9, 1, 30],
        cpt_tokens_type_mask=[1, 2, 3, 4],
        opt_projection_epsilon=9.0,
        opt_projection_format_epsilon=9.0,
    )
    written = write_with_peft(llama, config)
    moves = written.tensors["prompt_embeddings"] - llama.get_input_embeddings().weight[[5, 9, 1, 30]]
    assert moves[:3].norm(dim=1).min() > 0.1, "the move must show"
    as_peft.serves(llama, written, budget=3)
