"""A merged adapter as PEFT saves a plain LoRA, with scale 1: alpha is the rank everywhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from timbre_methods.contract import Sites
from timbre_methods.low_rank.lora import factor_keys
from timbre_methods.site_tensors import PREFIX


@dataclass(frozen=True, slots=True, eq=False)
class AdapterFile:
    """An ``adapter_config.json`` and its tensors by name, float32, each in memory of its own."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]


def lora_file(factors: Mapping[str, tuple[Tensor, Tensor]], sites: Sites) -> AdapterFile:
    """From ``A`` [R, I] and ``B`` [O, R] of each site by its path."""
    ranks = {path: a_RI.shape[0] for path, (a_RI, _) in factors.items()}
    most_common = Counter(ranks.values()).most_common(1)[0][0]
    others = {path: rank for path, rank in ranks.items() if rank != most_common}
    tensors = {}
    for path, pair in factors.items():
        for key, tensor in zip(factor_keys(sites[path]), pair, strict=True):
            tensors[f"{PREFIX}{path}.{key}"] = tensor.float().contiguous().clone()
    options = {
        "r": most_common,
        "lora_alpha": most_common,
        "rank_pattern": others,
        "alpha_pattern": others,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
    }
    return AdapterFile(peft_config("LORA", factors, options), tensors)


def peft_config(peft_type: str, paths: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that PEFT always writes, and a method's own, in order of keys."""
    common = {
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
        "peft_type": peft_type,
        "target_modules": list(paths),
        "task_type": "CAUSAL_LM",
    }
    return dict(sorted({**common, **options}.items()))
