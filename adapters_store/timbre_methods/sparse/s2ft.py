"""S2FT: dense blocks on a few channels, ``y = W x + b + S_in x[inputs]`` and ``y[outputs] += S_out x``.

The released trainer permutes coupled weights so that the trained channels lie together and saves the whole
permuted model. The permutation is a symmetry of the model; undone, what is left of it is the list of channels
and the difference of their columns or rows, which is what this format holds.

Legend: T tokens, I in features, O out features, N channels.

Paper: arXiv 2412.06289.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from timbre_methods.config import PeftConfig, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import InvalidTensors
from timbre_methods.examples import chosen_sites, peft_file, random_tensor, whole_number
from timbre_methods.program import AdapterProgram, Block
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_by_site, tensors_of_site
from timbre_methods.sparse.places import INDEX_DTYPES, check_channels

Side = Literal["input", "output"]
SIDES: tuple[Side, ...] = ("input", "output")
KEYS = frozenset(f"s2ft_{side}_{what}" for side in SIDES for what in ("indices", "block"))


class S2ftConfig(PeftConfig):
    """Nothing of the config matters at inference: blocks and channels are in the file."""


class S2ft(Method[S2ftConfig]):
    name = "s2ft"
    paper = "arXiv 2412.06289"
    stored = "n input channels and [out, n], or n output channels and [n, in]"
    checked_against = "the paper's formula"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "S2FT"

    def parse(self, raw_config: Mapping[str, Any]) -> S2ftConfig:
        return read_config(S2ftConfig, raw_config)

    def compile(self, config: S2ftConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        return AdapterProgram(
            {
                found.site.path: tuple(_block(found, side) for side in _sides(found))
                for found in tensors_by_site(tensors, sites, KEYS)
            }
        )

    def check_values(self, config: S2ftConfig, tensors: Tensors, sites: Sites) -> None:
        for found in tensors_by_site(tensors, sites, KEYS):
            for side in _sides(found):
                key = f"s2ft_{side}_indices"
                features = found.site.in_features if side == "input" else found.site.out_features
                check_channels(found.name_of(key), found.tensors[key], features)

    def reference(self, config: S2ftConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        weight_OI = site.weight_OI.to(x_TI.dtype, copy=True)
        own = tensors_of_site(tensors, site, KEYS)
        if "s2ft_input_block" in own:
            weight_OI[:, own["s2ft_input_indices"].long()] += own["s2ft_input_block"].to(x_TI.dtype)
        if "s2ft_output_block" in own:
            weight_OI[own["s2ft_output_indices"].long()] += own["s2ft_output_block"].to(x_TI.dtype)
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        return torch.nn.functional.linear(x_TI, weight_OI, bias_O)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen, tensors = chosen_sites(sites, generator), {}
        for number, site in enumerate(chosen):
            for side in (SIDES[:1], SIDES[1:], SIDES)[number % 3]:
                count = whole_number(1, 3, generator)
                features = site.in_features if side == "input" else site.out_features
                shape = (site.out_features, count) if side == "input" else (count, site.in_features)
                channels = torch.randperm(features, generator=generator)[:count].to(torch.int32)
                tensors[f"{PREFIX}{site.path}.s2ft_{side}_indices"] = channels
                tensors[f"{PREFIX}{site.path}.s2ft_{side}_block"] = random_tensor(shape, generator)
        return peft_file("S2FT", chosen, {}), tensors


def _sides(found: SiteTensors) -> list[Side]:
    """The sides of which the file holds anything."""
    return [side for side in SIDES if any(key.startswith(f"s2ft_{side}_") for key in found.tensors)]


def _block(found: SiteTensors, side: Side) -> Block:
    site, key = found.site, f"s2ft_{side}_indices"
    index_N = found.need(key, ("n",), INDEX_DTYPES)
    (count,) = index_N.shape
    features = site.in_features if side == "input" else site.out_features
    if count > features:
        raise InvalidTensors(f"{found.name_of(key)}: found {count} channels, expected at most {features}")
    shape = (site.out_features, count) if side == "input" else (count, site.in_features)
    block = found.need(f"s2ft_{side}_block", shape)
    return Block(
        side, index_N.to(torch.int64, copy=True), block.to(torch.float32, copy=True), site.out_features
    )
