"""Poly and MHR, as PEFT saves them: skills that are LoRAs, mixed by a weight for each task.

    w = σ(Z_t) / Σ_s σ(Z_t,s),  A = Σ_s w_s A_s,  B = Σ_s w_s B_s,  y = W x + b + B A x / r

With n_splits > 1 (MHR) the in features and the out features are cut into pieces, and each piece of A and of B
has weights of its own. Requests have no task: the config's ``task_id`` says which one the adapter is for, and
the mix is folded into one LoRA. Where there is one task alone it may be left out. The same file with another
``task_id`` is another adapter.

Legend: T tokens, I in features, O out features, R rank, N splits, S skills, P pieces of one split.

Papers: arXiv 2202.13914 section 2; MHR arXiv 2211.03831.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from timbre_methods.config import Count, Index, PeftConfig, Rank, chosen_task, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import InvalidTensors
from timbre_methods.examples import chosen_sites, coin, peft_file, random_tensor, whole_number
from timbre_methods.program import AdapterProgram, LowRank
from timbre_methods.routed.low_rank_experts import plain_output
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_by_site, tensors_of_site

A, B, LOGITS = "poly_lora_A", "poly_lora_B", "poly_router.module_logits"
KEYS = frozenset({A, B, LOGITS})
EPSILON = 1e-12


class PolyConfig(PeftConfig):
    """``task_id`` is not PEFT's. The defaults are."""

    inert = frozenset({"init_weights"})

    r: Rank = 8
    poly_type: Literal["poly"] = "poly"
    n_tasks: Count = 1
    n_skills: Count = 4
    n_splits: Count = 1
    task_id: Index | None = None


class Poly(Method[PolyConfig]):
    name = "poly"
    paper = "arXiv 2202.13914"
    stored = "A [n, skills, in / n, r], B [n, skills, r, out / n], logits [tasks, n skills]"
    checked_against = "PEFT"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "POLY"

    def parse(self, raw_config: Mapping[str, Any]) -> PolyConfig:
        config = read_config(PolyConfig, raw_config)
        _task(config)
        return config

    def compile(self, config: PolyConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        found = tensors_by_site(tensors, sites, KEYS)
        return AdapterProgram({each.site.path: (_mixed(config, each),) for each in found})

    def reference(self, config: PolyConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        y_TO = plain_output(site, x_TI)
        own = {key: t.to(x_TI.dtype) for key, t in tensors_of_site(tensors, site, KEYS).items()}
        if not own:
            return y_TO
        a_parts, b_parts = [], []
        sigmoids_NS = torch.sigmoid(own[LOGITS][config.task_id or 0].view(config.n_splits, config.n_skills))
        for n, sigmoids_S in enumerate(sigmoids_NS):
            weights_S = sigmoids_S / sigmoids_S.sum()
            a_parts.append(sum(w * a_PR for w, a_PR in zip(weights_S, own[A][n], strict=True)))
            b_parts.append(sum(w * b_RP for w, b_RP in zip(weights_S, own[B][n], strict=True)))
        return y_TO + x_TI @ torch.cat(a_parts, 0) @ torch.cat(b_parts, 1) / config.r

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen, tensors = chosen_sites(sites, generator), {}
        skills, tasks, r = (whole_number(low, 4, generator) for low in (2, 1, 1))
        even = [site for site in chosen if site.in_features % 2 == site.out_features % 2 == 0]
        splits = 2 if even and coin(generator) else 1
        chosen = even if splits == 2 else chosen
        for site in chosen:
            stem = f"{PREFIX}{site.path}."
            of_a, of_b = site.in_features // splits, site.out_features // splits
            tensors[stem + A] = random_tensor((splits, skills, of_a, r), generator)
            tensors[stem + B] = random_tensor((splits, skills, r, of_b), generator)
            tensors[stem + LOGITS] = 4 * random_tensor((tasks, splits * skills), generator)
        options = {
            "r": r,
            "poly_type": "poly",
            "n_tasks": tasks,
            "n_skills": skills,
            "n_splits": splits,
            "task_id": tasks - 1,
            "init_weights": True,
            "modules_to_save": None,
        }
        return peft_file("POLY", chosen, options), tensors


def _task(config: PolyConfig) -> int:
    """Raises `InvalidConfig`."""
    return chosen_task("POLY", config.task_id, "n_tasks", config.n_tasks)


def _mixed(config: PolyConfig, found: SiteTensors) -> LowRank:
    site, splits, skills = found.site, config.n_splits, config.n_skills
    if site.in_features % splits or site.out_features % splits:
        raise InvalidTensors(
            f"{found.name_of(A)}: found in and out features {site.in_features} and {site.out_features}, "
            f"expected multiples of n_splits, {splits}"
        )
    a_NSPR = found.need(A, (splits, skills, site.in_features // splits, config.r)).to(torch.float32)
    b_NSRP = found.need(B, (splits, skills, config.r, site.out_features // splits)).to(torch.float32)
    logits = found.need(LOGITS, (config.n_tasks, splits * skills)).to(torch.float32)
    weights_NS = torch.sigmoid(logits[_task(config)]).view(splits, skills)
    weights_NS = weights_NS / (weights_NS.sum(1, keepdim=True) + EPSILON)
    a_IR = torch.einsum("ns,nspr->npr", weights_NS, a_NSPR).flatten(0, 1)
    b_RO = torch.einsum("ns,nsrp->rnp", weights_NS, b_NSRP).flatten(1) / config.r
    return LowRank(a_IR.T, b_RO.T)
