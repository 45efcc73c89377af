"""VeRA, as PEFT saves it: ``y = W x + b + λ_b ∘ B[:O] (λ_d ∘ (A[:, :I] x))``.

A [R, largest in] and B [largest out, R] are random, frozen, and the same for all layers; where the file
leaves them out they are drawn from ``projection_prng_key``.

Legend: T tokens, I in features, O out features, R rank.

Paper: arXiv 2310.11454 equation 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from timbre_methods.bases import interned_basis
from timbre_methods.config import PeftConfig, Rank, Seed, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.examples import chosen_sites, coin, peft_file, random_tensor, whole_number
from timbre_methods.program import AdapterProgram, Projected
from timbre_methods.shared_basis.whole_model import (
    LARGEST,
    Whole,
    drawn,
    largest_for_reference,
    largest_layer,
    saved,
)
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_by_site, tensors_of_site


class ProjectionConfig(PeftConfig):
    """The fields of VeRA and its relatives that matter at inference. The defaults are PEFT's."""

    r: Rank = 256
    projection_prng_key: Seed = 0
    save_projection: bool = True


class VeraConfig(ProjectionConfig):
    inert = frozenset({"d_initial", "init_weights", "vera_dropout"})


class VectorsBetweenMatrices(Method[ProjectionConfig]):
    """What VeRA and PVeRA have in common: all but their names and the height of A."""

    halves = 1
    """A and λ_d are this many times as high as B is wide; the first of them is used."""

    @property
    def matrices(self) -> tuple[str, str]:
        return f"base_model.{self.name}_A", f"base_model.{self.name}_B"

    @property
    def keys(self) -> tuple[str, str]:
        return f"{self.name}_lambda_b", f"{self.name}_lambda_d"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == self.name.upper()

    def compile(self, config: ProjectionConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        adapted = self._by_site(tensors, sites)
        max_out, max_in = largest_layer([found.site for found in adapted])
        shapes = [(self.halves * config.r, max_in), (max_out, config.r)]
        if self._is_saved(config, tensors):
            a, b = saved(tensors, self.matrices, shapes)
        else:
            device = next(iter(adapted[0].tensors.values())).device
            key = (self.name, config.projection_prng_key, *shapes)
            a, b = drawn(key, shapes, lambda: _draw(config.projection_prng_key, shapes, device))
        return AdapterProgram({found.site.path: (self._part(config, found, a, b),) for found in adapted})

    def _is_saved(self, config: ProjectionConfig, tensors: Tensors) -> bool:
        return config.save_projection or any(name in tensors for name in self.matrices)

    def _by_site(self, tensors: Tensors, sites: Sites) -> list[SiteTensors]:
        return list(tensors_by_site(tensors, sites, frozenset(self.keys), beside=self.matrices))

    def _part(self, config: ProjectionConfig, found: SiteTensors, a: Whole, b: Whole) -> Projected:
        site, rank = found.site, config.r
        lambda_b_O = found.need(self.keys[0], (site.out_features,))
        lambda_d_R = found.need(self.keys[1], (self.halves * rank,))
        basis = interned_basis(
            a.part((rank, site.in_features), site, lambda a_RI: a_RI[None, :rank, : site.in_features]),
            b.part((site.out_features, rank), site, lambda b_OR: b_OR[None, : site.out_features]),
            lambda_b_O.device,
        )
        return Projected(
            "diagonal",
            lambda_d_R[None, :rank].to(torch.float32, copy=True),
            basis,
            outer_NO=lambda_b_O[None].to(torch.float32, copy=True),
        )

    def reference(self, config: ProjectionConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        weight_OI = site.weight_OI.to(x_TI.dtype)
        own = tensors_of_site(tensors, site, frozenset(self.keys))
        if own:
            a_RI, b_OR = self._reference_matrices(config, tensors, site)
            lambda_b_O, lambda_d_R = (own[key].to(x_TI.dtype) for key in self.keys)
            a_RI = a_RI[: config.r, : site.in_features].to(x_TI.dtype)
            b_OR = b_OR[: site.out_features].to(x_TI.dtype)
            right_RI = torch.diag(lambda_d_R[: config.r]) @ a_RI
            weight_OI = weight_OI + torch.diag(lambda_b_O) @ b_OR @ right_RI
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        return torch.nn.functional.linear(x_TI, weight_OI, bias_O)

    def _reference_matrices(
        self, config: ProjectionConfig, tensors: Tensors, site: Site
    ) -> tuple[Tensor, Tensor]:
        if LARGEST not in tensors:
            return tensors[self.matrices[0]], tensors[self.matrices[1]]
        max_out, max_in = tensors[LARGEST].tolist()
        generator = torch.Generator().manual_seed(config.projection_prng_key)
        a_RI = torch.nn.init.kaiming_uniform_(
            torch.empty(self.halves * config.r, max_in), generator=generator
        )
        b_OR = torch.nn.init.kaiming_uniform_(torch.empty(max_out, config.r), generator=generator)
        return a_RI.to(site.weight_OI.dtype), b_OR.to(site.weight_OI.dtype)

    def for_reference(self, config: ProjectionConfig, tensors: Tensors, sites: Sites) -> dict[str, Tensor]:
        if self._is_saved(config, tensors):
            return {}
        return largest_for_reference([found.site for found in self._by_site(tensors, sites)])

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen = chosen_sites(sites, generator)
        rank, is_saved = whole_number(1, 6, generator), coin(generator)
        tensors = {}
        for site in chosen:
            stem = PREFIX + site.path
            tensors[f"{stem}.{self.keys[0]}"] = random_tensor((site.out_features,), generator)
            tensors[f"{stem}.{self.keys[1]}"] = random_tensor((self.halves * rank,), generator)
        if is_saved:
            max_out, max_in = largest_layer(chosen)
            tensors[self.matrices[0]] = random_tensor((self.halves * rank, max_in), generator)
            tensors[self.matrices[1]] = random_tensor((max_out, rank), generator)
        options = {
            "r": rank,
            "projection_prng_key": whole_number(0, 1000, generator),
            "save_projection": is_saved,
            f"{self.name}_dropout": 0.0,
            "d_initial": 0.1,
            "init_weights": True,
            "bias": "none",
            "modules_to_save": None,
            "layers_to_transform": None,
            "layers_pattern": None,
        }
        return peft_file(self.name.upper(), chosen, options), tensors


class Vera(VectorsBetweenMatrices):
    name = "vera"
    paper = "arXiv 2310.11454"
    stored = "λ_b [out], λ_d [r]; A [r, max in], B [max out, r] once, or not"
    regenerated = "A and B, from the seed, with save_projection=false"
    checked_against = "PEFT"

    def parse(self, raw_config: Mapping[str, Any]) -> VeraConfig:
        return read_config(VeraConfig, raw_config)


def _draw(seed: int, shapes: list[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Kaiming's uniform distribution, A first, from one CPU generator; on meta nothing is drawn."""
    if device.type == "meta":
        return torch.empty(shapes[0], device=device), torch.empty(shapes[1], device=device)
    generator = torch.Generator().manual_seed(seed)

    def uniform(shape: tuple[int, int]) -> Tensor:
        bound = math.sqrt(3) * (math.sqrt(2) / math.sqrt(shape[1]))
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)

    return uniform(shapes[0]), uniform(shapes[1])
