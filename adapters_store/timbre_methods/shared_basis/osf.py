"""OSF, as PEFT saves it: ``y = W x + b + (U S V − U_0 S_0 V_0) x``.

``U_0 S_0 V_0`` are the last k singular triplets of W, rounded to the base's dtype as PEFT keeps them;
training moves them and leaves the first ones as they are. The file holds U, S and V only, so the first
state is derived from W. Only its product matters: the signs of singular vectors do not.

k is read from the tensors and must be one that the config names. By default it is half of the smaller side,
where the change is as large as the layer; from there on it is kept as one matrix.

Legend: T tokens, I in features, O out features, K trained triplets.

Paper: arXiv 2504.07097.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from timbre_methods.config import Count, PeftConfig, read_config, shown
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.decompositions import thin_svd
from timbre_methods.errors import InvalidTensors
from timbre_methods.examples import chosen_sites, coin, peft_file, random_tensor
from timbre_methods.program import AdapterProgram, Dense, LowRank
from timbre_methods.site_tensors import PREFIX, SiteTensors, derived_name, tensors_by_site, tensors_of_site

U, S, V = "osf_svd_params.U_low", "osf_svd_params.S_low", "osf_svd_params.V_low"
KEYS = frozenset({U, S, V})
FIRST_U, FIRST_S, FIRST_V = "first_U_low", "first_S_low", "first_V_low"

Kept = Count | Annotated[float, Field(gt=0, le=2**31 - 1, allow_inf_nan=False)] | None
"""How many triplets stay frozen, or which share of them; a layer may have more than any rank is."""


class OsfConfig(PeftConfig):
    """The fields that matter at inference. The defaults are PEFT's."""

    inert = frozenset({"init_weights", "target_svd_config"})

    effective_rank: Kept = None
    rank_pattern: Annotated[dict[str, Kept], Field(max_length=4096)] | None = None


class Osf(Method[OsfConfig]):
    name = "osf"
    paper = "arXiv 2504.07097"
    stored = "U [out, k], S [k], V [k, in]"
    regenerated = "the base's last k singular triplets, from the base"
    checked_against = "PEFT"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "OSF"

    def parse(self, raw_config: Mapping[str, Any]) -> OsfConfig:
        return read_config(OsfConfig, raw_config)

    def derive(self, config: OsfConfig, tensors: Tensors, sites: Sites) -> dict[str, Tensor]:
        derived = {}
        for found in tensors_by_site(tensors, sites, KEYS):
            site = found.site
            first = thin_svd(site.weight_OI).last(_num_trained(config, found))
            for key, tensor in zip((FIRST_U, FIRST_S, FIRST_V), first, strict=True):
                rounded = tensor.to(site.weight_OI.dtype).to(torch.float32)
                derived[derived_name(site.path, key)] = rounded.contiguous()
        return derived

    def compile(self, config: OsfConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        return AdapterProgram(
            {
                found.site.path: (part,)
                for found in tensors_by_site(tensors, sites, KEYS)
                if (part := _part(found, _num_trained(config, found))) is not None
            }
        )

    def reference(self, config: OsfConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        weight_OI = site.weight_OI.to(x_TI.dtype)
        own = {key: t.to(x_TI.dtype) for key, t in tensors_of_site(tensors, site, KEYS).items()}
        if own:
            first = [tensors[derived_name(site.path, key)] for key in (FIRST_U, FIRST_S, FIRST_V)]
            u_OK, s_K, v_KI = (tensor.to(x_TI.dtype) for tensor in first)
            weight_OI = weight_OI - torch.einsum("ok,k,ki->oi", u_OK, s_K, v_KI)
            weight_OI = weight_OI + torch.einsum("ok,k,ki->oi", own[U], own[S], own[V])
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        return torch.nn.functional.linear(x_TI, weight_OI, bias_O)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen = chosen_sites(sites, generator)
        effective_rank, pattern = (None if coin(generator) else 0.7), {chosen[-1].path: 4}
        tensors = {}
        for site in chosen:
            smaller = min(site.out_features, site.in_features)
            kept = _num_kept(pattern.get(site.path, effective_rank), smaller)
            svd = thin_svd(site.weight_OI).last(smaller - kept)
            for key, tensor in zip((U, S, V), svd, strict=True):
                moved = tensor + 0.3 * random_tensor(tuple(tensor.shape), generator)
                tensors[f"{PREFIX}{site.path}.{key}"] = moved
        options = {
            "effective_rank": effective_rank,
            "rank_pattern": pattern,
            "init_weights": True,
            "modules_to_save": None,
            "target_svd_config": None,
        }
        return peft_file("OSF", chosen, options), tensors


def _num_kept(value: int | float | None, smaller: int) -> int:
    """How many of the first triplets stay as they are, of all ``smaller``; a float up to 1 is a share."""
    if value is None:
        return smaller // 2
    return min(smaller, int(smaller * value if isinstance(value, float) and value <= 1 else value))


def _num_trained(config: OsfConfig, found: SiteTensors) -> int:
    """k of one site, from its tensors. Raises where the config does not name it."""
    smaller = min(found.site.out_features, found.site.in_features)
    values = [config.effective_rank, *(config.rank_pattern or {}).values()]
    allowed = {smaller - _num_kept(value, smaller) for value in values}
    stored = found.tensors.get(S)
    num_trained = len(stored) if stored is not None and stored.ndim == 1 else min(allowed)
    if num_trained not in allowed:
        raise InvalidTensors(
            f"{found.name_of(S)}: found {num_trained} triplets, the config says {shown(sorted(allowed))}"
        )
    found.need(S, (num_trained,))
    return num_trained


def _part(found: SiteTensors, num_trained: int) -> LowRank | Dense | None:
    site = found.site
    u_OK = found.need(U, (site.out_features, num_trained)).to(torch.float32)
    v_KI = found.need(V, (num_trained, site.in_features)).to(torch.float32)
    if num_trained == 0:
        return None
    first_u_OK = found.derived[FIRST_U] * found.derived[FIRST_S]
    b_OR = torch.cat([u_OK * found.tensors[S].to(torch.float32), -first_u_OK], dim=1)
    a_RI = torch.cat([v_KI, found.derived[FIRST_V]])
    if b_OR.numel() + a_RI.numel() < site.out_features * site.in_features:
        return LowRank(a_RI=a_RI, b_OR=b_OR)
    return Dense(delta_OI=b_OR @ a_RI)
