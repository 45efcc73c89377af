"""Pieces of which methods make their small random adapters for the conformance suite.

Everything is drawn from the caller's generator, so an example can be made again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from timbre_methods.contract import Site, Sites


def whole_number(low: int, high: int, generator: torch.Generator) -> int:
    """A number from low to high, both included."""
    return int(torch.randint(low, high + 1, (1,), generator=generator))


def coin(generator: torch.Generator) -> bool:
    """True half of the time."""
    return whole_number(0, 1, generator) == 1


def random_tensor(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Normal float32 values, large enough that every one of them shows in the output."""
    return torch.randn(shape, generator=generator) * 0.5


def chosen_sites(sites: Sites, generator: torch.Generator) -> list[Site]:
    """A random, non-empty choice of the sites in their order; about two of three."""
    draws = torch.rand(len(sites), generator=generator).tolist()
    chosen = [site for site, draw in zip(sites.values(), draws, strict=True) if draw < 0.67]
    return chosen or [next(iter(sites.values()))]


def peft_file(peft_type: str, sites: Sequence[Site], options: Mapping[str, Any]) -> dict[str, Any]:
    """An ``adapter_config.json`` with the keys that PEFT always writes, in its order."""
    common = {
        "auto_mapping": None,
        "base_model_name_or_path": "tiny",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "peft_type": peft_type,
        "peft_version": "0.21.2",
        "revision": None,
        "target_modules": [site.path for site in sites],
        "task_type": "CAUSAL_LM",
    }
    return dict(sorted({**common, **options}.items()))
