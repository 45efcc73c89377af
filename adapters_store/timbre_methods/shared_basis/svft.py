"""SVFT: ``y = W x + b + sigmoid(g) U M V x``, a sparse M between all singular vectors of W, and one gate g.

Plain SVFT trains the diagonal of M. It does not depend on the signs of the singular vectors, so U and V may
be left out and are derived. All other patterns (banded, random, the k largest) depend on them: their file
brings rows and columns, and the U and V that it was trained with. Equal places add. With a rank below the
full one the authors' layer loses a part of W, with random directions in its place or without: that is another
base and not a change of this one, and is refused.

Legend: T tokens, I in features, O out features, K min(O, I), N stored values.

Paper: arXiv 2405.19597.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from timbre_methods.bases import shared_basis
from timbre_methods.config import PeftConfig, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.decompositions import thin_svd
from timbre_methods.errors import InvalidTensors
from timbre_methods.examples import chosen_sites, coin, peft_file, random_tensor, whole_number
from timbre_methods.program import AdapterProgram, Projected
from timbre_methods.site_tensors import PREFIX, SiteTensors, derived_name, tensors_by_site, tensors_of_site

VALUES, GATE, ROWS, COLUMNS = "svft_layer.s", "svft_layer.gate", "svft_layer.s_row", "svft_layer.s_col"
LEFT, RIGHT = "svft_layer.u", "svft_layer.v"
KEYS = frozenset({VALUES, GATE, ROWS, COLUMNS, LEFT, RIGHT})
DERIVED_LEFT, DERIVED_RIGHT = "left", "right"
INDICES = (torch.int64, torch.int32)

_LOSES = "with a rank below the full one a part of the base is lost, and no adapter can say that"


class SvftConfig(PeftConfig):
    """Nothing of the config matters at inference: the file says where the values are."""

    inert = frozenset({"off_diag", "pattern"})
    reasons: ClassVar[Mapping[str, str]] = {"rank": _LOSES, "fill_orthonormal": _LOSES}


class Svft(Method[SvftConfig]):
    name = "svft"
    paper = "arXiv 2405.19597"
    stored = "n values, a gate; rows and columns [n], U [out, k] and V [k, in] but for the plain pattern"
    regenerated = "U and V of the plain pattern, from the base"
    checked_against = "the paper's formula"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "SVFT"

    def parse(self, raw_config: Mapping[str, Any]) -> SvftConfig:
        return read_config(SvftConfig, raw_config)

    def derive(self, config: SvftConfig, tensors: Tensors, sites: Sites) -> dict[str, Tensor]:
        derived = {}
        for found in tensors_by_site(tensors, sites, KEYS):
            if not {LEFT, RIGHT, ROWS, COLUMNS} & found.tensors.keys():
                u_OK, _, v_KI = thin_svd(found.site.weight_OI)
                derived[derived_name(found.site.path, DERIVED_LEFT)] = u_OK.contiguous()
                derived[derived_name(found.site.path, DERIVED_RIGHT)] = v_KI.contiguous()
        return derived

    def compile(self, config: SvftConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        return AdapterProgram(
            {found.site.path: (_part(found),) for found in tensors_by_site(tensors, sites, KEYS)}
        )

    def check_values(self, config: SvftConfig, tensors: Tensors, sites: Sites) -> None:
        for found in tensors_by_site(tensors, sites, KEYS):
            size = min(found.site.out_features, found.site.in_features)
            for key in (ROWS, COLUMNS):
                places_N = found.tensors.get(key)
                wrong = [] if places_N is None else places_N[(places_N < 0) | (places_N >= size)][:1].tolist()
                if wrong:
                    raise InvalidTensors(f"{found.name_of(key)}: found {wrong[0]}, expected 0 to {size - 1}")

    def reference(self, config: SvftConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        weight_OI = site.weight_OI.to(x_TI.dtype)
        own = tensors_of_site(tensors, site, KEYS)
        if own:
            u_OK = own.get(LEFT, tensors.get(derived_name(site.path, DERIVED_LEFT)))
            v_KI = own.get(RIGHT, tensors.get(derived_name(site.path, DERIVED_RIGHT)))
            assert u_OK is not None
            assert v_KI is not None
            every = torch.arange(len(v_KI))
            rows, columns = own.get(ROWS, every).tolist(), own.get(COLUMNS, every).tolist()
            m_KK = torch.zeros(len(v_KI), len(v_KI), dtype=x_TI.dtype)
            for row, column, value in zip(rows, columns, own[VALUES].to(x_TI.dtype), strict=True):
                m_KK[row, column] += value
            gate = 1 / (1 + torch.exp(-own[GATE].to(x_TI.dtype)))
            weight_OI = weight_OI + u_OK.to(x_TI.dtype) @ (gate * m_KK) @ v_KI.to(x_TI.dtype)
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        return torch.nn.functional.linear(x_TI, weight_OI, bias_O)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen = chosen_sites(sites, generator)
        is_plain, has_basis = coin(generator), coin(generator)
        tensors = {}
        for site in chosen:
            stem, size = PREFIX + site.path, min(site.out_features, site.in_features)
            count = size if is_plain else whole_number(3, 2 * size, generator)
            tensors[f"{stem}.{VALUES}"] = 1 + random_tensor((count,), generator)
            tensors[f"{stem}.{GATE}"] = 1 + random_tensor((1,), generator).abs()
            if not is_plain:
                for key in (ROWS, COLUMNS):
                    tensors[f"{stem}.{key}"] = torch.randint(0, size, (count,), generator=generator)
            if has_basis or not is_plain:
                tensors[f"{stem}.{LEFT}"] = random_tensor((site.out_features, size), generator)
                tensors[f"{stem}.{RIGHT}"] = random_tensor((size, site.in_features), generator)
        options = {"pattern": "banded" if is_plain else "random", "off_diag": 0, "rank": None}
        return peft_file("SVFT", chosen, options), tensors


def _part(found: SiteTensors) -> Projected:
    values_N = found.need(VALUES, ("n",)).to(torch.float32)
    values_N = values_N * torch.sigmoid(found.need(GATE, (1,)).to(torch.float32))
    left_OK, right_KI = _basis(found)
    size = len(right_KI)
    if not {ROWS, COLUMNS} & found.tensors.keys():
        if len(values_N) != size:
            raise InvalidTensors(
                f"{found.name_of(VALUES)}: found {len(values_N)} values, expected the {size} of the "
                f"diagonal, as the file has no {ROWS} and {COLUMNS}"
            )
        basis = shared_basis(right_KI.unsqueeze(0), left_OK.unsqueeze(0))
        return Projected(form="diagonal", core=values_N.unsqueeze(0), basis=basis)
    rows_N, columns_N = (found.need(key, (len(values_N),), INDICES) for key in (ROWS, COLUMNS))
    return Projected(
        form="sparse",
        core=values_N,
        basis=shared_basis(right_KI.unsqueeze(0), left_OK.unsqueeze(0)),
        rows_K=rows_N.to(torch.int64, copy=True),
        columns_K=columns_N.to(torch.int64, copy=True),
    )


def _basis(found: SiteTensors) -> tuple[Tensor, Tensor]:
    """U [O, K] and V [K, I], from the file or derived."""
    if DERIVED_LEFT in found.derived:
        return found.derived[DERIVED_LEFT], found.derived[DERIVED_RIGHT]
    size = min(found.site.out_features, found.site.in_features)
    missing = [found.name_of(key) for key in (LEFT, RIGHT) if key not in found.tensors]
    if missing:
        raise InvalidTensors(
            f"{missing[0]} is missing: values off the diagonal mean nothing without the singular vectors "
            "they were trained with, whose signs no other machine finds again; save u and v"
        )
    shapes = {LEFT: (found.site.out_features, size), RIGHT: (size, found.site.in_features)}
    left_OK, right_KI = (found.need(key, shapes[key]) for key in (LEFT, RIGHT))
    return left_OK, right_KI
