"""GLoRA, as PEFT saves it: ``y = (W + W * A + B) x + b + b * D + E + W C``.

Each of A to E is a product of two factors (``Xd``, ``Xu``), a vector or a single number (``X``), or is
absent, for which the file holds zeros in its full shape. A layer without a bias has A and B alone. A
factored A makes a change of full rank, W * A, that is kept as it is, B in it; a vector or number is a gain
on the layer's outputs, and then B is low-rank or gives every output a multiple of the sum of x. The rest is
one shift.

Legend: T tokens, I in features, O out features, R rank.

Paper: arXiv 2306.07967.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from timbre_methods.base_products import right_product
from timbre_methods.config import PeftConfig, Rank, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import InvalidTensors
from timbre_methods.examples import chosen_sites, peft_file, random_tensor, whole_number
from timbre_methods.program import AdapterProgram, Dense, Diagonal, LowRank, Part
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_by_site, tensors_of_site

KEYS = frozenset(f"glora_{path}.{leaf}" for path in "ABCDE" for leaf in ("Xd", "Xu", "X", "zeros"))

Form = Literal["lora", "vector", "constant", "none"]


class GloraConfig(PeftConfig):
    """The fields that matter at inference. The defaults are PEFT's; r has no scale."""

    inert = frozenset({"init_weights"})

    r: Rank = 8
    config_A_B: Form = "lora"
    config_C: Literal["lora", "vector", "none"] = "lora"
    config_D_E: Literal["vector", "constant", "none"] = "constant"

    def shapes(self, path: str, site: Site) -> dict[str, tuple[int, ...]]:
        """The tensors of one of A to E at a site: leaf and shape."""
        form: Form = {"C": self.config_C, "D": self.config_D_E, "E": self.config_D_E}.get(
            path, self.config_A_B
        )
        if path in "CDE" and site.bias_O is None:
            form = "none"
        whole: dict[str, tuple[int, ...]] = {
            "A": (site.out_features, site.in_features),
            "B": (site.out_features, site.in_features),
            "C": (site.in_features, 1),
        }
        shape = whole.get(path, (site.out_features,))
        if form == "none":
            return {"zeros": shape}
        if form == "lora":
            return {"Xd": (shape[0], self.r), "Xu": (self.r, shape[1])}
        if form == "constant":
            return {"X": (1,)}
        return {"X": (shape[0], 1) if len(shape) == 2 else shape}


class Glora(Method[GloraConfig]):
    name = "glora"
    paper = "arXiv 2306.07967"
    stored = "A to E, each as factors, a vector, a number or zeros"
    scales_bias = True
    checked_against = "PEFT"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "GLORA"

    def parse(self, raw_config: Mapping[str, Any]) -> GloraConfig:
        return read_config(GloraConfig, raw_config)

    def compile(self, config: GloraConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        parts = {
            found.site.path: _parts(found.site, _read(config, found))
            for found in tensors_by_site(tensors, sites, KEYS)
        }
        return AdapterProgram({path: own for path, own in parts.items() if own})

    def check_values(self, config: GloraConfig, tensors: Tensors, sites: Sites) -> None:
        for name, tensor in tensors.items():
            if name.endswith(".zeros") and tensor.any():
                raise InvalidTensors(f"{name[:200]}: found a value that is not zero, expected zeros alone")

    def reference(self, config: GloraConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        weight_OI = site.weight_OI.to(x_TI.dtype)
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        own = {key: t.to(x_TI.dtype) for key, t in tensors_of_site(tensors, site, KEYS).items()}
        if not own:
            return torch.nn.functional.linear(x_TI, weight_OI, bias_O)

        def whole(path: str) -> Tensor:
            stem = f"glora_{path}"
            if f"{stem}.Xd" in own:
                return own[f"{stem}.Xd"] @ own[f"{stem}.Xu"]
            return own[f"{stem}.X"] if f"{stem}.X" in own else own[f"{stem}.zeros"]

        adapted_OI = weight_OI + weight_OI * whole("A") + whole("B")
        if bias_O is not None:
            bias_O = bias_O + bias_O * whole("D") + whole("E") + (weight_OI @ whole("C"))[:, 0]
        return torch.nn.functional.linear(x_TI, adapted_OI, bias_O)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        forms = ("lora", "vector", "constant", "none")
        a_b = forms[whole_number(0, 3, generator)]
        fitting = sites
        if a_b == "none":  # then a layer without a bias would stay as it is
            fitting = {path: site for path, site in sites.items() if site.bias_O is not None}
            a_b, fitting = (a_b, fitting) if fitting else ("vector", sites)
        c = ("lora", "vector", "none")[whole_number(0, 2, generator)]
        d_e = ("vector", "constant", "none")[whole_number(0, 1 if c == "none" else 2, generator)]
        chosen = chosen_sites(fitting, generator)
        options = {
            "r": whole_number(1, 3, generator),
            "config_A_B": a_b,
            "config_C": c,
            "config_D_E": d_e,
            "init_weights": True,
            "bias": "none",
            "modules_to_save": None,
        }
        raw_config = peft_file("GLORA", chosen, options)
        config = self.parse(raw_config)
        tensors = {
            f"{PREFIX}{site.path}.glora_{path}.{leaf}": (
                torch.zeros(shape) if leaf == "zeros" else random_tensor(shape, generator)
            )
            for site in chosen
            for path in "ABCDE"
            for leaf, shape in config.shapes(path, site).items()
        }
        return raw_config, tensors


Path = tuple[Tensor, ...]
"""One of A to E in float32: two factors, a vector or number, or nothing."""


def _read(config: GloraConfig, found: SiteTensors) -> dict[str, Path]:
    paths: dict[str, Path] = {}
    expected: set[str] = set()
    for path in "ABCDE":
        shapes = {f"glora_{path}.{leaf}": shape for leaf, shape in config.shapes(path, found.site).items()}
        read = [(key, found.need(key, shape)) for key, shape in shapes.items()]
        paths[path] = tuple(t.to(torch.float32, copy=True) for key, t in read if not key.endswith("zeros"))
        expected |= shapes.keys()
    surplus = next((key for key in found.tensors if key not in expected), None)
    if surplus is not None:
        raise InvalidTensors(
            f"{found.name_of(surplus)} is surplus: the config and the layer's bias ask for {sorted(expected)}"
        )
    return paths


def _parts(site: Site, paths: Mapping[str, Path]) -> tuple[Part, ...]:
    a, b = paths["A"], paths["B"]
    shift_O = _shift(site, paths)
    parts: list[Part] = []
    gain_O = None
    if len(a) == 2:
        delta_OI = (a[0] @ a[1]).mul_(site.weight_OI.to(a[0].device))
        parts.append(Dense(delta_OI.addmm_(b[0], b[1])))
    elif a:
        extra_O = a[0].flatten().expand(site.out_features)
        gain_O = 1 + extra_O
        parts.append(
            LowRank(b[0].new_ones(1, site.in_features), b[0].expand(site.out_features, 1).contiguous())
        )
        if site.bias_O is not None:
            own_O = extra_O * site.bias_O.to(extra_O.device, torch.float32)
            shift_O = -own_O if shift_O is None else shift_O - own_O
    if shift_O is not None and gain_O is None:
        gain_O = torch.ones_like(shift_O)
    if gain_O is not None:
        parts.append(Diagonal(side="output", gain=gain_O, shift=shift_O))
    return tuple(parts)


def _shift(site: Site, paths: Mapping[str, Path]) -> Tensor | None:
    """``b * D + E + W C``, or None where there is none of them."""
    terms = []
    if paths["D"] and site.bias_O is not None:
        d, e = paths["D"][0], paths["E"][0]
        terms.append(site.bias_O.to(d.device, torch.float32) * d + e)
    if paths["C"]:
        c = paths["C"]
        c_I1 = c[0] @ c[1] if len(c) == 2 else c[0]
        terms.append(right_product(site.weight_OI, c_I1[:, 0]))
    return sum(terms[1:], terms[0]) if terms else None
