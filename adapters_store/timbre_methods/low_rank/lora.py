"""LoRA, as PEFT saves it: ``y = W x + b + s (B A x + c)``.

``s`` is ``alpha / r``, or ``alpha / sqrt(r)`` (rsLoRA). The rank is read from the tensors and must be one
that the config names. ``alpha_pattern`` gives some layers their own alpha; ``c`` is there with
``lora_bias``. Initialisers that move the base's own weights make a file that means nothing on the original
base, so they are refused with what to do about it.

Legend: T tokens, I in features, O out features, R rank.

Papers: arXiv 2106.09685 equation 3; rsLoRA arXiv 2312.03732.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from timbre_methods.config import Finite, PeftConfig, Rank, RankPattern, is_on, read_config, shown
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import InvalidTensors, UnsupportedMethod
from timbre_methods.examples import chosen_sites, coin, peft_file, random_tensor, whole_number
from timbre_methods.low_rank.ranks import check_rank
from timbre_methods.patterns import PathPatterns
from timbre_methods.program import AdapterProgram, Diagonal, LowRank, Part
from timbre_methods.site_tensors import PREFIX, SiteTensors, article, tensors_by_site, tensors_of_site

FACTORS = ("lora_A.weight", "lora_B.weight")
EMBEDDING_FACTORS = ("lora_embedding_A", "lora_embedding_B")
LINEAR_KEYS = frozenset({*FACTORS, "lora_B.bias"})
"""Of methods that adapt no embeddings."""
KEYS = LINEAR_KEYS | {*EMBEDDING_FACTORS}

VARIANTS = frozenset(
    {
        "alora_invocation_tokens",
        "arrow_config",
        "kasa_config",
        "target_parameters",
        "use_bdlora",
        "use_dora",
        "use_qalora",
    }
)
"""Switches of PEFT's LORA that make another method of it."""

MOVING_INITIALISERS = frozenset({"pissa", "olora"})
"""Those of ``init_lora_weights`` that make another method of it: what they moved can be computed again."""

TRAINING_TENSORS: Mapping[str, str] = {
    "velora_config": ".lora_velora_embed",
    "monteclora_config": ".lora_monteclora_sampler.",
}
"""Variants that are plain LoRA at inference, and what marks the names of tensors that only training read."""

_CONVERT = (
    "save it again with PEFT's path_initial_model_for_weight_conversion, which turns it into a plain LoRA"
)
_MOVES_THE_BASE = f"what it moved in the base is made good for plain LoRA alone; {_CONVERT}"
_REFUSED_INITIALISERS: Mapping[str, str] = {
    "pissa": _MOVES_THE_BASE,
    "pissa_niter": f"its offset comes from an unseeded random SVD and cannot be computed again; {_CONVERT}",
    "olora": _MOVES_THE_BASE,
    "corda": f"its offset depends on training data that is not in the file; {_CONVERT}",
    "lora_ga": f"its offset depends on training gradients that are not in the file; {_CONVERT}",
    "loftq": "it was trained on a quantised base, which this is not; train on this base",
}
PLAIN_INITIALISERS = frozenset({"", "gaussian", "orthogonal", "eva", "mica"})


class LoraConfig(PeftConfig):
    """The fields that matter at inference. The defaults are PEFT's."""

    inert = frozenset(
        {
            "corda_config",
            "eva_config",
            "loftq_config",
            "lora_dropout",
            "lora_ga_config",
            "megatron_core",
            "qalora_group_size",
            "runtime_config",
        }
    )

    r: Rank = 8
    lora_alpha: Finite = 8.0
    use_rslora: bool = False
    lora_bias: bool = False
    rank_pattern: RankPattern | None = None
    alpha_pattern: dict[str, Finite] | None = None
    monteclora_config: dict[str, Any] | None = None
    velora_config: dict[str, Any] | None = None
    init_lora_weights: bool | Annotated[str, Field(max_length=64)] | None = True


C = TypeVar("C", bound=LoraConfig)


def read_lora_config(
    model: type[C], raw_config: Mapping[str, Any], initialisers: frozenset[str] = PLAIN_INITIALISERS
) -> C:
    """The config of LoRA or of a method built on it, which serves these initialisers.

    Raises as `Method.parse` does.
    """
    config = read_config(model, raw_config)
    name = initialiser(raw_config)
    if name not in initialisers:
        family = "pissa_niter" if name.startswith("pissa_niter") else name
        reason = _REFUSED_INITIALISERS.get(family, "no such initialiser is known here")
        raise UnsupportedMethod(
            f"LORA: init_lora_weights={shown(raw_config['init_lora_weights'])} is not served: {reason}"
        )
    PathPatterns("alpha_pattern", config.alpha_pattern or {})
    return config


def initialiser(raw_config: Mapping[str, Any]) -> str:
    """The name in ``init_lora_weights`` in lower case; empty where it is none."""
    value = raw_config.get("init_lora_weights")
    return value.lower() if isinstance(value, str) else ""


def factor_keys(site: Site) -> tuple[str, str]:
    """The keys of A and B: on an embedding, whose in features are tokens, they have names of their own."""
    return EMBEDDING_FACTORS if site.kind == "embedding" else FACTORS


def read_factors(config: LoraConfig, found: SiteTensors) -> tuple[Tensor, Tensor]:
    """``A`` [R, I] and ``B`` [O, R] of one site, checked against each other, the site and the config."""
    site = found.site
    key_a, key_b = factor_keys(site)
    stray = next(
        (key for key in (*FACTORS, *EMBEDDING_FACTORS) if key in found.tensors and key not in (key_a, key_b)),
        None,
    )
    if stray is not None:
        raise InvalidTensors(f"{found.name_of(stray)} is surplus: {article(site)} has {key_a} and {key_b}")
    a_RI = found.need(key_a, ("r", site.in_features))
    rank = a_RI.shape[0]
    b_OR = found.need(key_b, (site.out_features, rank))
    check_rank(found, key_a, rank, config.r, config.rank_pattern)
    return a_RI, b_OR


def bias_parts(config: LoraConfig, found: SiteTensors, s: float) -> tuple[Part, ...]:
    """The shift ``s c`` of ``lora_bias``."""
    key = "lora_B.bias"
    if config.lora_bias:
        c_O = found.need(key, (found.site.out_features,)).to(torch.float32)
        return (Diagonal(side="output", gain=torch.ones_like(c_O), shift=c_O * s),)
    if key in found.tensors:
        raise InvalidTensors(f"{found.name_of(key)} is surplus: the config says lora_bias=false")
    return ()


def scale(config: LoraConfig, alphas: PathPatterns, path: str, rank: int) -> float:
    """``s`` of one site."""
    alpha = alphas.first(path)
    if alpha is None:
        alpha = config.lora_alpha
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


class Lora(Method[LoraConfig]):
    name = "lora"
    paper = "arXiv 2106.09685"
    stored = "A [r, in], B [out, r]; c [out] with lora_bias"
    checked_against = "PEFT"
    may_be_stacked = True
    kinds = frozenset({"linear", "embedding"})

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        if raw_config.get("peft_type") != "LORA" or initialiser(raw_config) in MOVING_INITIALISERS:
            return False
        return not any(is_on(raw_config.get(switch)) for switch in VARIANTS)

    def parse(self, raw_config: Mapping[str, Any]) -> LoraConfig:
        return read_lora_config(LoraConfig, raw_config)

    def compile(self, config: LoraConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        alphas = PathPatterns("alpha_pattern", config.alpha_pattern or {})
        return AdapterProgram(
            {
                found.site.path: self._parts(config, alphas, found)
                for found in tensors_by_site(_read_at_inference(config, tensors), sites, KEYS)
            }
        )

    def _parts(self, config: LoraConfig, alphas: PathPatterns, found: SiteTensors) -> tuple[Part, ...]:
        a_RI, b_OR = read_factors(config, found)
        s = scale(config, alphas, found.site.path, a_RI.shape[0])
        factors = LowRank(a_RI=a_RI.to(torch.float32, copy=True), b_OR=b_OR.to(torch.float32) * s)
        return (factors, *bias_parts(config, found, s))

    def reference(self, config: LoraConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        adapted_OI, shift_O = site.weight_OI.to(x_TI.dtype), torch.zeros(site.out_features, dtype=x_TI.dtype)
        own = {key: t.to(x_TI.dtype) for key, t in tensors_of_site(tensors, site, KEYS).items()}
        if own:
            a_RI, b_OR = (own[key] for key in factor_keys(site))
            s = reference_scale(config, site, a_RI.shape[0])
            delta_OI = torch.einsum("or,ri->oi", b_OR, a_RI)
            adapted_OI = adapted_OI + s * delta_OI
            shift_O = shift_O + s * own.get("lora_B.bias", shift_O)
        if site.bias_O is not None:
            shift_O = shift_O + site.bias_O.to(x_TI.dtype)
        return torch.einsum("oi,ti->to", adapted_OI, x_TI) + shift_O

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return lora_example(sites, generator, with_bias=coin(generator))


def scales_of(raw_config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """``s`` of each layer by its rank there, of a config that plain LoRA claims."""
    config = read_lora_config(LoraConfig, raw_config)
    alphas = PathPatterns("alpha_pattern", config.alpha_pattern or {})
    return {path: scale(config, alphas, path, rank) for path, rank in ranks.items()}


def _read_at_inference(config: LoraConfig, tensors: Tensors) -> Tensors:
    """Without the tensors that a variant's training left in the file."""
    left = tuple(mark for option, mark in TRAINING_TENSORS.items() if getattr(config, option))
    if not left:
        return tensors
    return {name: tensor for name, tensor in tensors.items() if not any(mark in name for mark in left)}


def reference_scale(config: LoraConfig, site: Site, rank: int) -> float:
    """The scale as PEFT computes it. For references only: nowhere else does `re` see a key from a file."""
    alphas = config.alpha_pattern or {}
    key = next((key for key in alphas if re.match(rf"(.*\.)?({key})$", site.path)), None)
    alpha = config.lora_alpha if key is None else alphas[key]
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def lora_example(
    sites: Sites, generator: torch.Generator, with_bias: bool
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A valid adapter of LoRA's format with several ranks and alphas."""
    chosen = chosen_sites(sites, generator)
    r, other_r = whole_number(1, 4, generator), whole_number(5, 6, generator)
    tensors, ranks = {}, {}
    for number, site in enumerate(chosen):
        rank = other_r if number % 3 == 1 else r
        if rank != r:
            ranks[site.path] = rank
        stem = PREFIX + site.path
        key_a, key_b = factor_keys(site)
        tensors[f"{stem}.{key_a}"] = random_tensor((rank, site.in_features), generator)
        tensors[f"{stem}.{key_b}"] = random_tensor((site.out_features, rank), generator)
        if with_bias:
            tensors[f"{stem}.lora_B.bias"] = random_tensor((site.out_features,), generator)
    options = {
        "r": r,
        "lora_alpha": whole_number(1, 32, generator),
        "use_rslora": coin(generator),
        "lora_bias": with_bias,
        "rank_pattern": ranks,
        "alpha_pattern": {chosen[0].path: 3, chosen[-1].path.split(".")[-1]: 2.5},
        "init_lora_weights": True,
        "lora_dropout": 0.1,
        "use_dora": False,
        "bias": "none",
        "modules_to_save": None,
        "layer_replication": None,
        "loftq_config": {},
    }
    return peft_file("LORA", chosen, options), tensors
