"""One adapter of every kind that PEFT writes, by name: its config, and how far to move it from its start.

Sizes fit the tiny model of these tests: widths 48, 24 and 70, so blocks of two.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from peft.tuners.lora.config import BdLoraConfig, KasaConfig
from torch import Tensor

PROMPT_IDS = [7, 80, 3, 200, 41, 41, 9, 120, 66, 5, 17, 230]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EVERY = {"target_modules": TARGETS}
FEEDFORWARD = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}

BLOCKS = BdLoraConfig(["o_proj", "down_proj"], ["q_proj", "k_proj", "v_proj"], nblocks=2, match_strict=False)

Make = Callable[[], peft.PeftConfig]

ADAPTERS: dict[str, tuple[Make, float]] = {
    "lora": (lambda: peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, **EVERY), 0.2),
    "dora": (lambda: peft.LoraConfig(r=3, use_dora=True, **EVERY), 0.2),
    "lora-embeddings": (lambda: peft.LoraConfig(r=3, target_modules=["embed_tokens", "lm_head"]), 0.2),
    "lora-whole-layers": (
        lambda: peft.LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=["norm"]),
        0.1,
    ),
    "pissa": (lambda: peft.LoraConfig(r=3, init_lora_weights="pissa", **EVERY), 0.05),
    "olora": (lambda: peft.LoraConfig(r=3, init_lora_weights="olora", **EVERY), 0.05),
    "kasa": (lambda: peft.LoraConfig(r=3, kasa_config=KasaConfig(), **EVERY), 0.2),
    "qalora": (lambda: peft.LoraConfig(r=4, use_qalora=True, qalora_group_size=2, **EVERY), 0.2),
    "bdlora": (lambda: peft.LoraConfig(r=4, use_bdlora=BLOCKS, **EVERY), 0.2),
    "ln_tuning": (lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]), 0.2),
    "trainable_tokens": (lambda: peft.TrainableTokensConfig(token_indices=[7, 41, 200]), 0.3),
    "adalora": (lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, **EVERY), 0.2),
    "adamss": (lambda: peft.AdamssConfig(r=12, num_subspaces=3, subspace_rank=2, **EVERY), 0.1),
    "beft": (lambda: peft.BeftConfig(**EVERY), 0.2),
    "boft": (lambda: peft.BOFTConfig(boft_block_size=2, **EVERY), 0.2),
    "c3a": (lambda: peft.C3AConfig(block_size=2, **EVERY), 1.0),
    "deft": (lambda: peft.DeftConfig(r=3, **EVERY), 0.1),
    "delora": (lambda: peft.DeloraConfig(r=3, **EVERY), 0.2),
    "fourierft": (lambda: peft.FourierFTConfig(n_frequency=200, scaling=40.0, **EVERY), 0.2),
    "frod": (lambda: peft.FrodConfig(sparse_rate=0.05, progressbar=False, **EVERY), 0.1),
    "glora": (lambda: peft.GloraConfig(r=3, **EVERY), 0.05),
    "gralora": (lambda: peft.GraloraConfig(r=4, hybrid_r=2, alpha=6, **EVERY), 0.2),
    "hira": (lambda: peft.HiraConfig(r=3, **EVERY), 0.3),
    "hira-embeddings": (lambda: peft.HiraConfig(r=3, target_modules=["embed_tokens", "v_proj"]), 0.4),
    "hra": (lambda: peft.HRAConfig(r=4, **EVERY), 0.05),
    "ia3": (lambda: peft.IA3Config(**FEEDFORWARD), 0.2),
    "loha": (lambda: peft.LoHaConfig(r=2, **EVERY), 0.2),
    "lokr": (lambda: peft.LoKrConfig(r=2, **EVERY), 0.2),
    "miss": (lambda: peft.MissConfig(r=4, **EVERY), 0.05),
    "oft": (lambda: peft.OFTConfig(oft_block_size=2, **EVERY), 0.2),
    "oft-embeddings": (lambda: peft.OFTConfig(oft_block_size=4, target_modules=["embed_tokens"]), 0.2),
    "osf": (lambda: peft.OSFConfig(effective_rank=16, **EVERY), 0.05),
    "peanut": (lambda: peft.PeanutConfig(r=3, depth=2, **EVERY), 0.2),
    "psoft": (lambda: peft.PsoftConfig(r=6, psoft_alpha=6, **EVERY), 0.2),
    "pvera": (lambda: peft.PveraConfig(r=8, **EVERY), 0.3),
    "randlora": (lambda: peft.RandLoraConfig(r=8, randlora_alpha=16, **EVERY), 0.02),
    "road": (lambda: peft.RoadConfig(group_size=2, **EVERY), 0.2),
    "shira": (lambda: peft.ShiraConfig(r=2, **EVERY), 0.2),
    "supertuning": (lambda: peft.SupertuningConfig(sparsity=0.9, **EVERY), 0.2),
    "tinylora": (lambda: peft.TinyLoraConfig(r=2, u=6, **EVERY), 0.5),
    "unilora": (lambda: peft.UniLoraConfig(r=3, theta_d_length=64, **EVERY), 0.5),
    "vblora": (lambda: peft.VBLoRAConfig(r=2, num_vectors=16, vector_length=2, **EVERY), 0.3),
    "vera": (lambda: peft.VeraConfig(r=8, **EVERY), 0.3),
    "waveft": (lambda: peft.WaveFTConfig(n_frequency=200, scaling=10.0, **EVERY), 0.2),
}
"""By the name of the method, or that and what is special."""

MIXED: dict[str, tuple[Make, float]] = {
    "mix-lora": (lambda: peft.LoraConfig(r=4, lora_alpha=6, **EVERY), 0.2),
    "mix-narrow": (lambda: peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"]), 0.2),
    "mix-fourierft": (lambda: peft.FourierFTConfig(n_frequency=200, scaling=40.0, **EVERY), 0.2),
    "mix-shira": (lambda: peft.ShiraConfig(r=2, **EVERY), 0.2),
    "mix-ia3": (lambda: peft.IA3Config(**FEEDFORWARD), 0.2),
}
"""Those that are mixed with one another."""


def save_adapter(model: torch.nn.Module, make: Make, folder: Path, std: float, seed: int = 1) -> Path:
    """What PEFT saves for this config, with noise on every trainable value."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(copy.deepcopy(model), make())
        for parameter in wrapped.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.data += std * torch.randn(parameter.shape).to(parameter.dtype)
        wrapped.save_pretrained(str(folder))
    return folder


def logprobs_of(model: torch.nn.Module, ids: list[int] = PROMPT_IDS) -> Tensor:
    """Log-probabilities of each next token of a prompt, in float64."""
    with torch.inference_mode():
        rows = torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1].double(), -1)
    return rows.gather(1, torch.tensor(ids)[1:, None])[:, 0]
