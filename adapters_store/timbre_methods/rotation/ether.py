"""ETHER and ETHER+: a weight multiplied by hyperplane reflections, on its input, its output, or both.

``y = H_out (W (H_in x)) + b``: the base's bias is not turned. H is block-diagonal with one vector u a block,
made a unit vector, and for ETHER+ a second one, v:

    ETHER    H_n = I − 2 u uᵀ
    ETHER+   H_n = I − u uᵀ + v vᵀ

On the input the authors' code does not do what the paper says: ``block_diagonal`` is the paper, and with
``every_chunk``, the code, the rows of W are cut into n blocks and block i of them applies H_i to *each* of
the n chunks of its input. With one block they are the same.

Each vector changes the weight by one rank, so with the vectors' products with W folded at load, ETHER is low
rank. Only ``every_chunk`` with many blocks has as much rank as W itself and becomes dense.

Legend: T tokens, I in features, O out features, N blocks, D entries of a block, R ranks, C rows of W in one
block.

Paper: arXiv 2405.20271.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from timbre_methods.base_products import left_product, right_product
from timbre_methods.config import PeftConfig, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import InvalidTensors
from timbre_methods.examples import chosen_sites, coin, peft_file, random_tensor, whole_number
from timbre_methods.program import AdapterProgram, Dense, LowRank, Part
from timbre_methods.site_tensors import PREFIX, SiteTensors, tensors_by_site, tensors_of_site

KEYS = frozenset({"ether_in_u", "ether_in_v", "ether_out_u", "ether_out_v"})

Turns = Sequence[tuple[float, Tensor]]
"""Factors and unit vectors [N, D]: block n is ``I + Σ factor · u_n u_nᵀ``."""


class EtherConfig(PeftConfig):
    """All of it is written out: nothing can be told from the tensors alone."""

    plus: bool
    side: Literal["input", "output", "both"]
    input_reading: Literal["block_diagonal", "every_chunk"]


class Ether(Method[EtherConfig]):
    name = "ether"
    paper = "arXiv 2405.20271"
    stored = "u [n, in / n] or [n, out / n], for ETHER+ also v"
    regenerated = "their products with the base's weight"
    checked_against = "the paper's formula"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "ETHER"

    def parse(self, raw_config: Mapping[str, Any]) -> EtherConfig:
        return read_config(EtherConfig, raw_config)

    def compile(self, config: EtherConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        keys = frozenset(key for side in _sides(config) for key in _keys(config, side))
        return AdapterProgram(
            {found.site.path: _parts(config, found) for found in tensors_by_site(tensors, sites, keys)}
        )

    def check_values(self, config: EtherConfig, tensors: Tensors, sites: Sites) -> None:
        for found in tensors_by_site(tensors, sites, KEYS):
            for key, vectors_ND in found.tensors.items():
                if not vectors_ND.double().norm(dim=1).all():
                    raise InvalidTensors(f"{found.name_of(key)}: found a row of zeros, expected directions")

    def reference(self, config: EtherConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        own = {key: t.to(x_TI.dtype) for key, t in tensors_of_site(tensors, site, KEYS).items()}
        weight_OI = site.weight_OI.to(x_TI.dtype)
        if own and config.side != "output":
            turns = _reference_blocks(own, "in")
            if config.input_reading == "every_chunk":
                rows = [
                    torch.cat([chunk @ turn for chunk in row_block.chunk(len(turns), dim=1)], dim=1)
                    for row_block, turn in zip(weight_OI.chunk(len(turns)), turns, strict=True)
                ]
                weight_OI = torch.cat(rows)
            else:
                chunks = weight_OI.chunk(len(turns), dim=1)
                weight_OI = torch.cat([c @ t for c, t in zip(chunks, turns, strict=True)], dim=1)
        if own and config.side != "input":
            turns = _reference_blocks(own, "out")
            weight_OI = torch.cat([t @ w for t, w in zip(turns, weight_OI.chunk(len(turns)), strict=True)])
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        return torch.nn.functional.linear(x_TI, weight_OI, bias_O)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen = chosen_sites(sites, generator)
        options = {
            "input_reading": "every_chunk" if coin(generator) else "block_diagonal",
            "plus": coin(generator),
            "side": ("input", "output", "both")[whole_number(0, 2, generator)],
        }
        config = self.parse({"peft_type": "ETHER", **options})
        tensors = {}
        for site in chosen:
            for side in _sides(config):
                features = site.in_features if side == "in" else site.out_features
                whole = site.out_features if config.input_reading == "every_chunk" else features
                counts = [n for n in range(1, 5) if features % n == 0 and whole % n == 0]
                count = counts[whole_number(0, len(counts) - 1, generator)]
                for key in _keys(config, side):
                    vectors_ND = random_tensor((count, features // count), generator)
                    tensors[f"{PREFIX}{site.path}.{key}"] = vectors_ND
        return peft_file("ETHER", chosen, options), tensors


def _sides(config: EtherConfig) -> tuple[str, ...]:
    return {"input": ("in",), "output": ("out",), "both": ("in", "out")}[config.side]


def _keys(config: EtherConfig, side: str) -> list[str]:
    return [f"ether_{side}_{letter}" for letter in ("uv" if config.plus else "u")]


def _reference_blocks(own: Mapping[str, Tensor], side: str) -> list[Tensor]:
    """Each block's H, from outer products."""
    blocks = []
    for n, u_D in enumerate(own[f"ether_{side}_u"]):
        block_DD = torch.eye(len(u_D), dtype=u_D.dtype)
        outer_DD = torch.outer(u_D, u_D) / torch.dot(u_D, u_D)
        if f"ether_{side}_v" in own:
            v_D = own[f"ether_{side}_v"][n]
            blocks.append(block_DD - outer_DD + torch.outer(v_D, v_D) / torch.dot(v_D, v_D))
        else:
            blocks.append(block_DD - 2 * outer_DD)
    return blocks


def _parts(config: EtherConfig, found: SiteTensors) -> tuple[Part, ...]:
    parts: list[LowRank | Dense] = []
    if config.side != "output":
        turns = _turns(config, found, "in", found.site.in_features)
        every_chunk = config.input_reading == "every_chunk"
        parts.append(_every_chunk(found, turns) if every_chunk else _block_diagonal(found, turns))
    if config.side != "input":
        turns = _turns(config, found, "out", found.site.out_features)
        rows_RO = _laid_out(turns)
        seen_RI = left_product(rows_RO, found.site.weight_OI)
        for part in parts:  # the output's turn sees what the input's has made of W
            seen_RI += _times_change(rows_RO, part)
        parts.append(LowRank(a_RI=seen_RI, b_OR=(_factors(turns)[:, None] * rows_RO).T))
    return tuple(parts)


def _turns(config: EtherConfig, found: SiteTensors, side: str, features: int) -> Turns:
    """The unit vectors of one side, of equal shape."""
    keys = _keys(config, side)
    count = found.need(keys[0], ("blocks", "entries")).shape[0]
    if features % count:
        raise InvalidTensors(
            f"{found.name_of(keys[0])}: found {count} blocks, expected a number that divides {features}"
        )
    vectors = [found.need(key, (count, features // count)).to(torch.float64) for key in keys]
    units = [v_ND / torch.linalg.vector_norm(v_ND, dim=1, keepdim=True) for v_ND in vectors]
    signs = (-1.0, 1.0) if config.plus else (-2.0,)
    return [(sign, unit_ND.to(torch.float32)) for sign, unit_ND in zip(signs, units, strict=True)]


def _laid_out(turns: Turns) -> Tensor:
    """Every vector as a row of its own, zero outside its block."""
    eye_NN = torch.eye(len(turns[0][1]), device=turns[0][1].device)
    return torch.cat([(eye_NN[:, :, None] * unit_ND).flatten(1) for _, unit_ND in turns])


def _factors(turns: Turns) -> Tensor:
    """The factor of each row of `_laid_out`."""
    return torch.cat([torch.full_like(unit_ND[:, 0], factor) for factor, unit_ND in turns])


def _times_change(rows_RO: Tensor, part: LowRank | Dense) -> Tensor:
    return rows_RO @ part.delta_OI if isinstance(part, Dense) else (rows_RO @ part.b_OR) @ part.a_RI


def _block_diagonal(found: SiteTensors, turns: Turns) -> LowRank:
    a_RI = _laid_out(turns)
    return LowRank(a_RI=a_RI, b_OR=right_product(found.site.weight_OI, _factors(turns) * a_RI.T))


def _every_chunk(found: SiteTensors, turns: Turns) -> LowRank | Dense:
    (out_features, in_features), count = found.site.weight_OI.shape, len(turns[0][1])
    if out_features % count:
        raise InvalidTensors(
            f"{found.site.path}: found {out_features} outputs, expected a multiple of the {count} blocks, "
            "as input_reading is every_chunk"
        )
    seen = [(factor * _seen(found.site.weight_OI, unit_ND), unit_ND) for factor, unit_ND in turns]
    if len(turns) * count**2 * (out_features + in_features) >= out_features * in_features:
        deltas = [torch.einsum("icj,id->icjd", seen_NCN, unit_ND) for seen_NCN, unit_ND in seen]
        return Dense(torch.stack(deltas).sum(0).reshape(out_features, in_features))
    eye_NN = torch.eye(count, device=turns[0][1].device)
    shrinks = [torch.einsum("id,jk->ijkd", unit_ND, eye_NN) for _, unit_ND in seen]
    expands = [torch.einsum("icj,ik->ickj", seen_NCN, eye_NN) for seen_NCN, _ in seen]
    return LowRank(
        a_RI=torch.cat([shrink.reshape(-1, in_features) for shrink in shrinks]),
        b_OR=torch.cat([expand.reshape(out_features, -1) for expand in expands], dim=1),
    )


def _seen(weight_OI: Tensor, unit_ND: Tensor) -> Tensor:
    """[N, C, N]: what each row in block i of W makes of u_i in each of its chunks."""
    count, size = unit_ND.shape
    blocks = weight_OI.split_with_sizes([len(weight_OI) // count] * count, 0)
    seen = [right_product(b.reshape(-1, size), u_D) for b, u_D in zip(blocks, unit_ND, strict=True)]
    return torch.stack(seen).view(count, -1, count)
