"""LoRA-XS: ``y = W x + b + s B R A x`` with a small trained R [r, r] between frozen A and B.

s is ``alpha / r``, or ``alpha / sqrt(r)`` with rsLoRA. A and B are the first singular directions of W, by a
randomised solver whose signs nobody can draw again. The authors' files hold them beside R, so the basis is
the file's, and adapters with equal A and B share it.

R stands under either of two names: the trainer's own ``<module path>.default_lora_latent_mapping.weight``,
and what is left when PEFT has cut the adapter's name out: ``<module path>_lora_latent_mapping.weight``, with
no dot after the path.

Legend: T tokens, I in features, O out features, R rank.

Paper: arXiv 2405.17604.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from timbre_methods.bases import shared_basis
from timbre_methods.config import Finite, PeftConfig, Rank, read_config
from timbre_methods.contract import DERIVED, Method, Site, Sites, Tensors
from timbre_methods.errors import InvalidTensors
from timbre_methods.examples import chosen_sites, coin, peft_file, random_tensor, whole_number
from timbre_methods.program import AdapterProgram, Projected
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_by_site, tensors_of_site

A, B, CORE = "lora_A.weight", "lora_B.weight", "default_lora_latent_mapping.weight"
KEYS = frozenset({A, B, CORE})
AS_TRAINED, AS_SAVED = f".{CORE}", "_lora_latent_mapping.weight"
"""What comes after the module path."""


class LatentConfig(PeftConfig):
    """The fields that matter at inference. The authors' configs are LoRA's, and so are the defaults."""

    inert = frozenset(
        {"loftq_config", "lora_dropout", "megatron_core", "qalora_group_size", "runtime_config"}
    )

    r: Rank = 8
    lora_alpha: Finite = 8.0
    use_rslora: bool = False
    init_lora_weights: bool | None = True

    @property
    def scale(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class LoraXs(Method[LatentConfig]):
    name = "lora_xs"
    paper = "arXiv 2405.17604"
    stored = "A [r, in], B [out, r], R [r, r]"
    checked_against = "the paper's formula"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "LORA_XS"

    def parse(self, raw_config: Mapping[str, Any]) -> LatentConfig:
        return read_config(LatentConfig, raw_config)

    def compile(self, config: LatentConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        return AdapterProgram(
            {
                found.site.path: (_part(config, found),)
                for found in tensors_by_site(with_core_names(tensors), sites, KEYS)
            }
        )

    def reference(self, config: LatentConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        return latent_reference(config, tensors, site, x_TI)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return latent_example("LORA_XS", sites, generator)


def with_core_names(tensors: Tensors) -> dict[str, Tensor]:
    """The tensors with R of each layer under the trainer's own name. Raises for a layer that has both."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        is_saved = name.endswith(AS_SAVED) and not name.endswith(AS_TRAINED) and not name.startswith(DERIVED)
        found = name.removesuffix(AS_SAVED) + AS_TRAINED if is_saved else name
        if found in renamed:
            raise InvalidTensors(f"{name[:200]!r} is surplus: the file holds R of this layer under two names")
        renamed[found] = tensor
    return renamed


def read_latent(config: LatentConfig, found: SiteTensors) -> tuple[Tensor, Tensor, Tensor]:
    """A [r, I], B [O, r] and ``s R`` [r, r] in float32."""
    site, rank = found.site, config.r
    a_RI = found.need(A, (rank, site.in_features)).to(torch.float32)
    b_OR = found.need(B, (site.out_features, rank)).to(torch.float32)
    return a_RI, b_OR, found.need(CORE, (rank, rank)).to(torch.float32) * config.scale


def _part(config: LatentConfig, found: SiteTensors) -> Projected:
    a_RI, b_OR, core_RR = read_latent(config, found)
    return Projected(form="dense", core=core_RR, basis=shared_basis(a_RI.unsqueeze(0), b_OR.unsqueeze(0)))


def latent_reference(config: LatentConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
    """The formula of LoRA-XS and LoRA-SB: one linear map after the other."""
    bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
    y_TO = torch.nn.functional.linear(x_TI, site.weight_OI.to(x_TI.dtype), bias_O)
    own = tensors_of_site(with_core_names(tensors), site, KEYS)
    if own:
        s = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
        z_TR = torch.einsum("ri,ti->tr", own[A].to(x_TI.dtype), x_TI)
        z_TR = torch.einsum("qr,tr->tq", own[CORE].to(x_TI.dtype), z_TR)
        y_TO = y_TO + s * torch.einsum("or,tr->to", own[B].to(x_TI.dtype), z_TR)
    return y_TO


def latent_example(
    peft_type: str, sites: Sites, generator: torch.Generator
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A small adapter as the authors' trainers save it."""
    chosen = chosen_sites(sites, generator)
    ending = AS_SAVED if coin(generator) else AS_TRAINED
    rank = whole_number(1, 5, generator)
    options = {
        "r": rank,
        "lora_alpha": whole_number(1, 16, generator),
        "use_rslora": coin(generator),
        "init_lora_weights": True,
        "lora_dropout": 0.1,
        "megatron_core": "megatron.core",
        "bias": "none",
        "modules_to_save": None,
    }
    tensors = {}
    for site in chosen:
        stem = PREFIX + site.path
        tensors[f"{stem}.{A}"] = random_tensor((rank, site.in_features), generator)
        tensors[f"{stem}.{B}"] = random_tensor((site.out_features, rank), generator)
        tensors[stem + ending] = random_tensor((rank, rank), generator)
    return peft_file(peft_type, chosen, options), tensors
