"""LoLDU: ``y = W x + b + P L_r diag(f z − f_0 z_0) U_r x`` in the LDU factors of W.

``W = P L D U`` with partial pivoting and a unit diagonal in L and U. The first r columns of P L and rows of U
are frozen; the vector z and the scale f are trained. Training starts from z_0 and ``f_0 = alpha / r``, whose
part is taken off the base, so that what is added is the difference. z_0 is the first r of D, unless the file
says otherwise: the authors' initialisations ``uniform``, ``normal`` and ``constant`` take their own start off
the base, because there z and the D that is used share their memory.

Legend: T tokens, I in features, O out features, K min(O, I), R trained values.

Paper: arXiv 2410.13618.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from timbre_methods.bases import shared_basis
from timbre_methods.config import Finite, PeftConfig, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.decompositions import ldu
from timbre_methods.errors import InvalidTensors
from timbre_methods.examples import chosen_sites, coin, peft_file, random_tensor, whole_number
from timbre_methods.program import AdapterProgram, Projected
from timbre_methods.site_tensors import PREFIX, SiteTensors, derived_name, tensors_by_site, tensors_of_site

VALUES, SCALE, START = "vector_z", "scaling_factor", "vector_z_start"
KEYS = frozenset({VALUES, SCALE, START})
LEFT, PIVOTS, RIGHT = "left", "pivots", "right"

STARTS_ELSEWHERE = frozenset({"uniform", "normal", "constant"})


class LolduConfig(PeftConfig):
    """The fields that matter at inference. ``lora_alpha`` has the default of the authors' code."""

    lora_alpha: Finite = 8.0
    init_method: Literal["lu", "uniform", "s_uniform", "normal", "s_normal", "constant", "ones", "zeros"] = (
        "lu"
    )


class Loldu(Method[LolduConfig]):
    name = "loldu"
    paper = "arXiv 2410.13618"
    stored = "z [r], f [1]; the start of z [r] where it is not D"
    regenerated = "P L_r, D_r and U_r of the LDU factors, from the base"
    checked_against = "the paper's formula"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "LOLDU"

    def parse(self, raw_config: Mapping[str, Any]) -> LolduConfig:
        return read_config(LolduConfig, raw_config)

    def derive(self, config: LolduConfig, tensors: Tensors, sites: Sites) -> dict[str, Tensor]:
        derived = {}
        for found in tensors_by_site(tensors, sites, KEYS):
            path, rank = found.site.path, len(_values(found))
            left_OK, pivots_K, right_KI = ldu(found.site.weight_OI)
            if not right_KI.is_meta and not bool(right_KI[:rank].isfinite().all()):
                raise InvalidTensors(f"{path}: this layer of the base has no LDU factors of rank {rank}")
            derived[derived_name(path, LEFT)] = left_OK[:, :rank].contiguous()
            derived[derived_name(path, PIVOTS)] = pivots_K[:rank].clone()
            derived[derived_name(path, RIGHT)] = right_KI[:rank].contiguous()
        return derived

    def compile(self, config: LolduConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        return AdapterProgram(
            {found.site.path: (_part(config, found),) for found in tensors_by_site(tensors, sites, KEYS)}
        )

    def reference(self, config: LolduConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        weight_OI = site.weight_OI.to(x_TI.dtype)
        own = {key: t.to(x_TI.dtype) for key, t in tensors_of_site(tensors, site, KEYS).items()}
        if own:
            factors = [tensors[derived_name(site.path, key)] for key in (LEFT, PIVOTS, RIGHT)]
            left_OR, pivots_R, right_RI = (tensor.to(x_TI.dtype) for tensor in factors)
            first_scale = config.lora_alpha / len(pivots_R)
            first_RR = torch.diag(own.get(START, pivots_R))
            residual_OI = weight_OI - first_scale * left_OR @ first_RR @ right_RI
            weight_OI = residual_OI + own[SCALE] * left_OR @ torch.diag(own[VALUES]) @ right_RI
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        return torch.nn.functional.linear(x_TI, weight_OI, bias_O)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen = chosen_sites(sites, generator)
        init_method = "normal" if coin(generator) else "lu"
        tensors = {}
        for site in chosen:
            stem, rank = PREFIX + site.path, whole_number(1, 5, generator)
            tensors[f"{stem}.{VALUES}"] = random_tensor((rank,), generator)
            tensors[f"{stem}.{SCALE}"] = 1 + random_tensor((1,), generator).abs()
            if init_method == "normal":
                tensors[f"{stem}.{START}"] = random_tensor((rank,), generator)
        options = {"lora_alpha": whole_number(1, 9, generator), "init_method": init_method}
        return peft_file("LOLDU", chosen, options), tensors


def _values(found: SiteTensors) -> Tensor:
    values_R = found.need(VALUES, ("r",))
    most = min(found.site.out_features, found.site.in_features)
    if len(values_R) > most:
        raise InvalidTensors(
            f"{found.name_of(VALUES)}: found {len(values_R)} values, expected at most {most}"
        )
    return values_R


def _part(config: LolduConfig, found: SiteTensors) -> Projected:
    values_R = _values(found).to(torch.float32)
    first_scale = config.lora_alpha / len(values_R)
    start_R = found.get(START, (len(values_R),))
    if start_R is None and config.init_method in STARTS_ELSEWHERE:
        raise InvalidTensors(
            f"{found.name_of(START)} is missing: with init_method={config.init_method!r} the trainer's "
            "own first z was taken off the base; save it too"
        )
    start_R = found.derived[PIVOTS] if start_R is None else start_R.to(torch.float32)
    scaled_R = values_R * found.need(SCALE, (1,)).to(torch.float32)
    return Projected(
        form="diagonal",
        core=(scaled_R - first_scale * start_R).unsqueeze(0),
        basis=shared_basis(found.derived[RIGHT].unsqueeze(0), found.derived[LEFT].unsqueeze(0)),
    )
