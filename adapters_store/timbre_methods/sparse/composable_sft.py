"""Composable (lottery-ticket) sparse fine-tuning: ``y = (W + S) x + b + d``, S and d sparse.

The steps from one place to the next are stored, the first from zero. Places in the weight are
**column-major**, ``row + column * O``, as the authors' decoder reads them. Diffs of embeddings and norms, and
the dense heads that the authors store beside the diffs, belong to no linear layer and are refused by name.

Legend: T tokens, I in features, O out features, N stored values.

Paper: arXiv 2110.07560 (composable sparse fine-tuning for cross-lingual transfer).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from timbre_methods.config import PeftConfig, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import AdapterMismatch, InvalidTensors
from timbre_methods.examples import chosen_sites, coin, peft_file, random_tensor, whole_number
from timbre_methods.program import AdapterProgram, Diagonal, Part
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_by_site, tensors_of_site
from timbre_methods.sparse.places import check_channels, check_places, check_range, sparse_part

Parameter = Literal["weight", "bias"]
PARAMETERS: tuple[Parameter, ...] = ("weight", "bias")
KEYS = frozenset(f"{parameter}_diff.{what}" for parameter in PARAMETERS for what in ("values", "index_steps"))
STEP_DTYPES = (torch.int32,)


class ComposableSftConfig(PeftConfig):
    """Nothing of the config matters at inference."""


class ComposableSft(Method[ComposableSftConfig]):
    name = "composable_sft"
    paper = "arXiv 2110.07560"
    stored = "n values, the steps between their column-major indices; the same for biases"
    checked_against = "the paper's formula"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "COMPOSABLE_SFT"

    def parse(self, raw_config: Mapping[str, Any]) -> ComposableSftConfig:
        return read_config(ComposableSftConfig, raw_config)

    def compile(self, config: ComposableSftConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        return AdapterProgram(
            {found.site.path: _parts(found) for found in tensors_by_site(tensors, sites, KEYS)}
        )

    def check_values(self, config: ComposableSftConfig, tensors: Tensors, sites: Sites) -> None:
        for found in tensors_by_site(tensors, sites, KEYS):
            site = found.site
            for parameter in _parameters(found):
                name = found.name_of(f"{parameter}_diff.index_steps")
                index_N, _ = _read(found, parameter)
                if parameter == "bias":
                    check_channels(name, index_N, site.out_features)
                else:
                    check_range(name, "place", index_N, site.out_features * site.in_features)
                    check_places(name, site, index_N % site.out_features, index_N // site.out_features)

    def reference(self, config: ComposableSftConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        own = tensors_of_site(tensors, site, KEYS)
        diffs = {"weight": site.weight_OI.to(x_TI.dtype)}
        if site.bias_O is not None:
            diffs["bias"] = site.bias_O.to(x_TI.dtype)
        for parameter, before in diffs.items():
            if f"{parameter}_diff.values" in own:
                columns_first = before.T.flatten().clone() if before.ndim == 2 else before.clone()
                place = 0
                steps = own[f"{parameter}_diff.index_steps"].tolist()
                for step, value in zip(steps, own[f"{parameter}_diff.values"], strict=True):
                    place += step
                    columns_first[place] += value.to(x_TI.dtype)
                diffs[parameter] = columns_first.view(before.T.shape).T if before.ndim == 2 else columns_first
        return torch.nn.functional.linear(x_TI, diffs["weight"], diffs.get("bias"))

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen, tensors = chosen_sites(sites, generator), {}
        for number, site in enumerate(chosen):
            sizes = {"weight": site.out_features * site.in_features}
            if site.bias_O is not None and coin(generator):
                sizes["bias"] = site.out_features
                if number % 2:
                    del sizes["weight"]
            for parameter, size in sizes.items():
                count = whole_number(1, size // 3, generator)
                index_N = torch.randperm(size, generator=generator)[:count].sort().values
                steps_N = torch.diff(index_N, prepend=torch.zeros(1, dtype=torch.int64))
                stem = f"{PREFIX}{site.path}.{parameter}_diff"
                tensors[f"{stem}.values"] = random_tensor((count,), generator)
                tensors[f"{stem}.index_steps"] = steps_N.to(torch.int32)
        return peft_file("COMPOSABLE_SFT", chosen, {}), tensors


def _parameters(found: SiteTensors) -> list[Parameter]:
    """The parameters of which the file holds anything."""
    return [one for one in PARAMETERS if any(key.startswith(f"{one}_diff.") for key in found.tensors)]


def _read(found: SiteTensors, parameter: Parameter) -> tuple[Tensor, Tensor]:
    """Flat indices, int64, and values of one parameter."""
    site = found.site
    key = f"{parameter}_diff.values"
    if parameter == "bias" and site.bias_O is None:
        raise AdapterMismatch(f"{found.name_of(key)}: this base's layer {site.path} has no bias")
    values_N = found.need(key, ("n",))
    size = site.out_features * (site.in_features if parameter == "weight" else 1)
    if len(values_N) > size:
        raise InvalidTensors(f"{found.name_of(key)}: found {len(values_N)} values, expected at most {size}")
    steps_N = found.need(f"{parameter}_diff.index_steps", (len(values_N),), STEP_DTYPES)
    return torch.cumsum(steps_N, 0, dtype=torch.int64), values_N


def _parts(found: SiteTensors) -> tuple[Part, ...]:
    site = found.site
    parts: list[Part] = []
    for parameter in _parameters(found):
        index_N, values_N = _read(found, parameter)
        if parameter == "weight":
            rows_N, columns_N = index_N % site.out_features, index_N // site.out_features
            parts.append(sparse_part(site, rows_N, columns_N, values_N))
        else:
            shift_O = torch.zeros(site.out_features, device=values_N.device)
            shift_O = shift_O.index_put((index_N,), values_N.to(torch.float32))
            parts.append(Diagonal(side="output", gain=torch.ones_like(shift_O), shift=shift_O))
    return tuple(parts)
