"""Adapters of each family with random values, shaped for one base: as fast or slow as trained ones."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

Tensors = dict[str, Tensor]
Shapes = dict[str, tuple[int, int]]
"""(out, in) of linear layers, by path."""
Make = Callable[[Shapes], tuple[dict[str, Any], Tensors]]
"""An adapter for layers: its config and tensors, drawn from torch's generator on torch's device."""
FEEDFORWARD = ("down_proj",)


def linear_shapes(model_folder: Path) -> Shapes:
    """(out, in) of every linear layer of the model but its head, by path; no weight is read."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_folder))
    head = model.get_output_embeddings()
    return {
        path: (layer.out_features, layer.in_features)
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer is not head
    }


def lora(shapes: Shapes, rank: int = 8) -> tuple[dict[str, Any], Tensors]:
    """On every linear layer, as PEFT and so every other server reads it."""
    tensors = {}
    for path, (out_features, in_features) in shapes.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = 0.02 * torch.randn(rank, in_features)
        tensors[f"base_model.model.{path}.lora_B.weight"] = 0.02 * torch.randn(out_features, rank)
    targets = sorted({path.rpartition(".")[2] for path in shapes})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": targets,
    }, tensors


def fourierft(shapes: Shapes) -> tuple[dict[str, Any], Tensors]:
    """n = 1000 on every linear layer, at the default seed."""
    tensors = {f"base_model.model.{path}.fourierft_spectrum": torch.randn(1000) for path in shapes}
    return {"peft_type": "FOURIERFT", "n_frequency": 1000, "scaling": 1.0, "random_loc_seed": 777}, tensors


def shira(shapes: Shapes) -> tuple[dict[str, Any], Tensors]:
    """1 % of the entries of every linear layer."""
    tensors = {}
    for path, (out_features, in_features) in shapes.items():
        size = out_features * in_features
        flat = torch.randperm(size)[: size // 100].sort().values
        places = torch.stack([flat // in_features, flat % in_features]).int()
        tensors[f"base_model.model.{path}.shira_weight"] = 0.02 * torch.randn(len(flat))
        tensors[f"base_model.model.{path}.shira_indices"] = places
    return {"peft_type": "SHIRA", "r": 8, "mask_type": "random"}, tensors


def ia3(shapes: Shapes) -> tuple[dict[str, Any], Tensors]:
    """k, v and down projections, as PEFT's default for Llama."""
    tensors = {}
    for path, (out_features, in_features) in shapes.items():
        if path.endswith(FEEDFORWARD):
            tensors[f"base_model.model.{path}.ia3_l"] = 1 + 0.05 * torch.randn(1, in_features)
        elif path.endswith(("k_proj", "v_proj")):
            tensors[f"base_model.model.{path}.ia3_l"] = 1 + 0.05 * torch.randn(out_features, 1)
    return {"peft_type": "IA3", "feedforward_modules": list(FEEDFORWARD)}, tensors


def vera(shapes: Shapes) -> tuple[dict[str, Any], Tensors]:
    """r = 256, PEFT's default, on every linear layer; the shared matrices come from the seed."""
    tensors = {}
    for path, (out_features, _) in shapes.items():
        tensors[f"base_model.model.{path}.vera_lambda_b"] = 0.02 * torch.randn(out_features)
        tensors[f"base_model.model.{path}.vera_lambda_d"] = 0.1 * torch.randn(256)
    return {"peft_type": "VERA", "r": 256, "save_projection": False}, tensors


def oft(shapes: Shapes) -> tuple[dict[str, Any], Tensors]:
    """Blocks of 32, PEFT's default, on every linear layer."""
    tensors = {
        f"base_model.model.{path}.oft_R.weight": 0.02 * torch.randn(in_features // 32, 32 * 31 // 2)
        for path, (_, in_features) in shapes.items()
    }
    return {"peft_type": "OFT", "oft_block_size": 32, "peft_version": "0.21.2"}, tensors


def c3a(shapes: Shapes) -> tuple[dict[str, Any], Tensors]:
    """On every linear layer, with the largest blocks that fit there, of 256 (PEFT's default) at most."""
    tensors, sizes = {}, {}
    for path, (out_features, in_features) in shapes.items():
        both = math.gcd(out_features, in_features)
        b = sizes[path] = max(size for size in range(1, 257) if both % size == 0)
        tensors[f"base_model.model.{path}.c3a_kernel"] = torch.randn(out_features // b, in_features // b, b)
    return {"peft_type": "C3A", "block_size": 256, "block_size_pattern": sizes}, tensors


def lokr(shapes: Shapes) -> tuple[dict[str, Any], Tensors]:
    """Rank 8 in the larger of the two matrices, split as PEFT does by default, on every linear layer."""
    tensors = {}
    for path, shape in shapes.items():
        (rows, more_rows), (columns, more_columns) = (_most_even(size) for size in shape)
        stem = f"base_model.model.{path}.lokr"
        tensors[f"{stem}_w1"] = 0.2 * torch.randn(rows, columns)
        tensors[f"{stem}_w2_a"] = 0.02 * torch.randn(more_rows, 8)
        tensors[f"{stem}_w2_b"] = 0.2 * torch.randn(8, more_columns)
    return {"peft_type": "LOKR", "r": 8, "alpha": 8}, tensors


def _most_even(size: int) -> tuple[int, int]:
    """Two factors of a size, the smaller one first."""
    small = max(number for number in range(1, math.isqrt(size) + 1) if size % number == 0)
    return small, size // small


def mola(shapes: Shapes) -> tuple[dict[str, Any], Tensors]:
    """A router and the top 2 of 4 LoRAs of rank 8 on every linear layer."""
    tensors = {}
    for path, (out_features, in_features) in shapes.items():
        stem = f"mola.{path[path.index('layers.') :]}"
        tensors[f"{stem}.moe_gate.weight"] = 0.02 * torch.randn(4, in_features)
        for expert in range(4):
            lora_a, lora_b = torch.randn(8, in_features), torch.randn(out_features, 8)
            tensors[f"{stem}.experts.{expert}.lora_A.weight"] = 0.02 * lora_a
            tensors[f"{stem}.experts.{expert}.lora_B.weight"] = 0.02 * lora_b
    size = {"r": 8, "lora_alpha": 8, "num_experts": 4, "top_k": 2}
    return {"peft_type": "MOLA", "routing_strategy": "mola", **size}, tensors


FAMILIES: dict[str, Make] = {
    "lora": lora,
    "fourierft": fourierft,
    "shira": shira,
    "ia3": ia3,
    "vera": vera,
    "oft": oft,
    "c3a": c3a,
    "lokr": lokr,
    "mola": mola,
}


def write_adapters(
    model_folder: Path, folder: Path, families: Iterable[str], count: int
) -> dict[str, list[str]]:
    """``count`` adapters of each family below ``folder``, as PEFT lays them out. Names by family."""
    shapes = linear_shapes(model_folder)
    names: dict[str, list[str]] = {}
    for family in families:
        for number in range(count):
            torch.manual_seed(number)
            config, tensors = FAMILIES[family](shapes)
            name = f"{family}-{number}"
            target = folder / name
            target.mkdir(parents=True)
            (target / "adapter_config.json").write_text(json.dumps(config))
            save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
            names.setdefault(family, []).append(name)
    return names
