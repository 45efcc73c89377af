"""LoRA whose initialiser moved the base's weight in training, over the base as it is.

PiSSA, OLoRA and KaSA take a part M of rank r out of W before training, and PEFT takes it out of the loaded
base again. Here the base belongs to everyone, so M is a second low-rank term:
``y = W x + b + s B D A x − M x``, D a diagonal of ones, or KaSA's. M is a product of factors of W, so signs
and rotations that a LAPACK may choose otherwise cancel in it. What PEFT refuses together is refused here, and
so is a head that is tied to its embedding: PEFT takes M out of the table of both.

Legend: T tokens, I in features, O out features, R rank.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from timbre_methods.config import is_on
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import InvalidTensors
from timbre_methods.examples import coin
from timbre_methods.low_rank.lora import (
    LINEAR_KEYS,
    VARIANTS,
    LoraConfig,
    bias_parts,
    initialiser,
    lora_example,
    read_factors,
    read_lora_config,
    reference_scale,
    scale,
)
from timbre_methods.patterns import PathPatterns
from timbre_methods.program import AdapterProgram, LowRank
from timbre_methods.site_tensors import (
    SiteTensors,
    derived_name,
    derived_of_site,
    tensors_by_site,
    tensors_of_site,
)

DIAGONAL = "lora_diag"
MOVED_A, MOVED_B = "moved_A", "moved_B"


class MovedWeightConfig(LoraConfig):
    """LoRA's fields."""

    reasons: ClassVar[Mapping[str, str]] = {
        "layer_replication": "copies of a layer share one weight, and PEFT took a part out of it for each of "
        "them; train a plain LoRA",
    }


class MovedWeight(Method[LoraConfig]):
    """What the three have in common. A subclass says which configs are its own and what M is."""

    keys: ClassVar[frozenset[str]] = LINEAR_KEYS
    config: ClassVar[type[LoraConfig]] = MovedWeightConfig
    switches: ClassVar[frozenset[str]] = frozenset()
    """The switches of PEFT's LORA that are on in a config of this method."""
    initialisers: ClassVar[frozenset[str]]
    """The names in ``init_lora_weights`` that are this method's; empty: none."""
    checked_against = "PEFT"

    @abstractmethod
    def moved(self, site: Site, weight_OI: Tensor, rank: int, s: float) -> tuple[Tensor, Tensor]:
        """M as factors [R, I] and [O, R], from the site's weight in float32, in which PEFT computes it."""

    def check_site(self, site: Site) -> None:
        """Raises `InvalidTensors` for a layer of which no M can be taken."""
        return None

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        switches = {switch for switch in VARIANTS if is_on(raw_config.get(switch))}
        if raw_config.get("peft_type") != "LORA" or switches != self.switches:
            return False
        return initialiser(raw_config) in self.initialisers

    def parse(self, raw_config: Mapping[str, Any]) -> LoraConfig:
        return read_lora_config(self.config, raw_config, self.initialisers)

    def derive(self, config: LoraConfig, tensors: Tensors, sites: Sites) -> dict[str, Tensor]:
        derived = {}
        for found, _, b_OR, s in self._adapted(config, tensors, sites):
            a, b = self.moved(
                found.site, found.site.weight_OI.to(b_OR.device, torch.float32), b_OR.shape[1], s
            )
            derived[derived_name(found.site.path, MOVED_A)] = a
            derived[derived_name(found.site.path, MOVED_B)] = b
        return derived

    def weight_in_training(self, site: Site, derived: Tensors) -> Tensor:
        moved = derived_of_site(derived, site.path)
        if not moved:
            return site.weight_OI
        weight_OI = site.weight_OI.to(moved[MOVED_B].device, torch.float32)
        return torch.addmm(weight_OI, moved[MOVED_B], moved[MOVED_A], alpha=-1)

    def compile(self, config: LoraConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        parts = {}
        for found, a_RI, b_OR, s in self._adapted(config, tensors, sites):
            scaled_OR = b_OR.to(torch.float32) * s
            if DIAGONAL in self.keys:
                scaled_OR = scaled_OR * found.need(DIAGONAL, (b_OR.shape[1],)).to(torch.float32)
            joined = LowRank(
                torch.cat([a_RI.to(torch.float32), found.derived[MOVED_A]]),
                torch.cat([scaled_OR, -found.derived[MOVED_B]], dim=1),
            )
            parts[found.site.path] = (joined, *bias_parts(config, found, s))
        return AdapterProgram(parts)

    def _adapted(
        self, config: LoraConfig, tensors: Tensors, sites: Sites
    ) -> list[tuple[SiteTensors, Tensor, Tensor, float]]:
        """Of each adapted site its tensors, A, B and s."""
        alphas = PathPatterns("alpha_pattern", config.alpha_pattern or {})
        rows = []
        for found in tensors_by_site(tensors, sites, self.keys):
            _refuse_tied(found.site)
            self.check_site(found.site)
            a_RI, b_OR = read_factors(config, found)
            rows.append((found, a_RI, b_OR, scale(config, alphas, found.site.path, a_RI.shape[0])))
        return rows

    def reference(self, config: LoraConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        weight_OI = site.weight_OI.to(x_TI.dtype)
        own = {key: t.to(x_TI.dtype) for key, t in tensors_of_site(tensors, site, self.keys).items()}
        if own:
            rank = own["lora_A.weight"].shape[0]
            s = reference_scale(config, site, rank)
            ones_R = torch.ones(rank, dtype=x_TI.dtype)
            diagonal_RR = torch.diag(own.get(DIAGONAL, ones_R))
            moved = {key: t.to(x_TI.dtype) for key, t in derived_of_site(tensors, site.path).items()}
            weight_OI = weight_OI - torch.einsum("or,ri->oi", moved[MOVED_B], moved[MOVED_A])
            weight_OI = weight_OI + s * own["lora_B.weight"] @ diagonal_RR @ own["lora_A.weight"]
        y_TO = x_TI @ weight_OI.T
        if "lora_B.bias" in own:
            y_TO = y_TO + s * own["lora_B.bias"]
        return y_TO if site.bias_O is None else y_TO + site.bias_O.to(x_TI.dtype)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        untied = {path: site for path, site in sites.items() if site.tied_to is None}
        return lora_example(untied, generator, with_bias=coin(generator))


def _refuse_tied(site: Site) -> None:
    if site.tied_to is not None:
        raise InvalidTensors(
            f"{site.path}: this layer multiplies by the table of {site.tied_to!r}, and PEFT took a part of "
            "it out for both, so that the adapter was trained with another embedding; leave the layer out "
            "of target_modules, or train a plain LoRA"
        )
