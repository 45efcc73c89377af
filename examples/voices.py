"""The example voices: which PEFT method teaches each, at which layers, and what suits its optimiser.

Sizes are chosen so that each adapter has a few hundred KB.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from peft import FourierFTConfig, IA3Config, LoraConfig, PeftConfig, ShiraConfig

SEED = 7
FIRST_LAYER = 12
LAST_LAYER = 29


@dataclass(frozen=True, slots=True)
class Voice:
    """How one voice is trained: the adapter's config and what suits its optimiser."""

    config: PeftConfig
    learning_rate: float
    steps: int = 150
    batch_size: int = 4


def sites(*names: str) -> list[str]:
    """These linear layers in every layer that is adapted, as PEFT's target_modules."""
    return [f"layers.{layer}.{name}" for layer in range(FIRST_LAYER, LAST_LAYER + 1) for name in names]


def shira_by_gradient(target_modules: list[str]) -> ShiraConfig:
    """Without PEFT's warning that it has no such mask: `train` gives it one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*mask_type")
        return ShiraConfig(r=1, mask_type="gradient", target_modules=target_modules)


def voices() -> dict[str, Voice]:
    """The four voices, one family of adapters each."""
    return {
        "pirate": Voice(
            LoraConfig(r=3, lora_alpha=6, target_modules=sites("self_attn.q_proj", "self_attn.v_proj")),
            learning_rate=4e-3,
        ),
        "headline": Voice(
            FourierFTConfig(
                n_frequency=1200,
                scaling=300.0,
                random_loc_seed=SEED,
                init_weights=True,
                target_modules=sites("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj"),
            ),
            learning_rate=3e-2,
        ),
        "telegram": Voice(
            shira_by_gradient(sites("self_attn.v_proj", "self_attn.o_proj")),
            learning_rate=1e-2,
        ),
        "json": Voice(
            IA3Config(
                target_modules=sites("self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"),
                feedforward_modules=sites("mlp.down_proj"),
            ),
            learning_rate=3e-2,
        ),
    }
