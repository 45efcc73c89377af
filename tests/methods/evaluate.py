"""Runs compiled programs on a plain model, by the semantics that `timbre_methods.program` writes down.

The tests' own reading of the vocabulary, one row of formula a part; it shares nothing with the operators.

Legend: T tokens, I in features, O out features.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from timbre_methods.contract import Site
from timbre_methods.program import (
    AdapterProgram,
    Block,
    Circulant,
    Dense,
    Diagonal,
    Kronecker,
    LowRank,
    Part,
    Projected,
    Rotation,
    SlicedLowRank,
    Sparse,
    Spectral,
    TokenRows,
)
from timbre_methods.routing import Routed, RoutedBlock, Router, Scouted


def _load(name: str) -> ModuleType:
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"methods_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


gates, spectra = _load("gates"), _load("spectra")

CHOSEN: dict[Router | Scouted, Tensor] = {}
"""The gates [N, E] that blocks and scouts have chosen for the rows (`adapted_copy`)."""


def block_sites(model: nn.Module) -> dict[str, Site]:
    """The MLPs of the model."""
    width = model.config.hidden_size
    empty = torch.empty(width, width, device="meta")
    return {
        path: Site(path, empty, None, "block") for path, _ in model.named_modules() if path.endswith(".mlp")
    }


def linear_sites(model: nn.Module) -> dict[str, Site]:
    """The model's linear layers as sites, `Conv1D` transposed."""
    sites = {}
    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
            sites[path] = Site(path, weight.T if isinstance(module, Conv1D) else weight, bias)
    return sites


def all_sites(model: nn.Module) -> dict[str, Site]:
    """The linear layers, the embedding of tokens, the norms and the MLPs."""
    sites = linear_sites(model) | block_sites(model)
    for path, module in model.named_modules():
        if is_embedding(path):
            table, scale = module.weight.detach().T, float(getattr(module, "embed_scale", 1.0))
            sites[path] = Site(path, table, None, "embedding", is_transposed=True, scale=scale)
        elif is_norm(module):
            bias = getattr(module, "bias", None)
            sites[path] = Site(path, module.weight.detach(), None if bias is None else bias.detach(), "norm")
    table = model.get_input_embeddings()
    for path, site in sites.items():
        module = model.get_submodule(path)
        if isinstance(module, nn.Linear) and module.weight is table.weight:
            tied_to = next(other for other in sites if model.get_submodule(other) is table)
            sites[path] = replace(site, tied_to=tied_to)
        if isinstance(module, Conv1D):
            sites[path] = replace(site, is_transposed=True)
    return sites


def is_embedding(path: str) -> bool:
    return path.endswith(("embed_tokens", "wte"))


def is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Norm")


def change(part: Part, x_TI: Tensor, y0_TO: Tensor) -> Tensor:
    """What a part on the output side adds, in x's dtype."""
    dtype = x_TI.dtype
    if isinstance(part, LowRank):
        return (x_TI @ part.a_RI.to(dtype).T) @ part.b_OR.to(dtype).T
    if isinstance(part, Spectral):
        return x_TI @ spectra.spectral_delta(part).T.to(dtype)
    if isinstance(part, Circulant):
        return x_TI @ spectra.circulant_delta(part).T.to(dtype)
    if isinstance(part, Sparse):
        rows = [
            x_TI[..., part.columns_N[start:end].long()] @ part.values_N[start:end].to(dtype)
            for start, end in zip(part.row_ends[:-1].tolist(), part.row_ends[1:].tolist(), strict=True)
        ]
        return torch.stack(rows, dim=-1)
    if isinstance(part, Block):
        matrix_OI = torch.zeros(part.out_features, x_TI.shape[-1], dtype=dtype)
        channels = (slice(None), part.index_N) if part.side == "input" else part.index_N
        matrix_OI[channels] = part.block.to(dtype)
        return x_TI @ matrix_OI.T
    if isinstance(part, Dense):
        return x_TI @ part.delta_OI.to(dtype).T
    if isinstance(part, Kronecker):
        w2_KN = part.w2_KR.to(dtype)
        if part.w2_RN is not None:
            w2_KN = w2_KN @ part.w2_RN.to(dtype)
        return x_TI @ torch.kron(part.w1_LM.to(dtype), w2_KN).T
    if isinstance(part, Projected):
        return projected(part, x_TI)
    if isinstance(part, Rotation):
        return y0_TO @ rotation_matrix(part, y0_TO).T - y0_TO
    if isinstance(part, SlicedLowRank):
        return x_TI @ (part.b_EOR.to(dtype) @ part.a_ERI.to(dtype)).flatten(0, 1).T
    if isinstance(part, TokenRows):
        return x_TI[..., part.tokens_K] @ part.rows_KO.to(dtype)
    if isinstance(part, Routed):
        return routed(part, x_TI, y0_TO)
    assert isinstance(part, Diagonal)
    assert part.side == "output"
    shift = torch.zeros_like(part.gain) if part.shift is None else part.shift
    return (part.gain.to(dtype) - 1) * y0_TO + shift.to(dtype)


def routed(part: Routed, x_TI: Tensor, y0_TO: Tensor) -> Tensor:
    """Expert after expert. Without a block or a scout that has chosen, each has gate 1."""
    x_NI, y0_NO = x_TI.flatten(0, -2), y0_TO.flatten(0, -2)
    if part.from_block or isinstance(part.router, Scouted):
        gates_NE = CHOSEN.get(part.router, torch.ones(len(x_NI), len(part.experts))).to(x_NI.dtype)
    else:
        gates_NE = gates.gates(part.router, x_NI)
    total_NO = torch.zeros_like(y0_NO)
    for gate_N, expert in zip(gates_NE.T, part.experts, strict=True):
        for inner in expert:
            total_NO = total_NO + gate_N[:, None] * change(inner, x_NI, y0_NO)
    return total_NO.view_as(y0_TO)


def projected(part: Projected, x_TI: Tensor) -> Tensor:
    """The sum over a part's blocks, one after the other."""
    dtype = x_TI.dtype
    p_NPI, q_NOQ = part.basis.p_NPI.to(dtype), part.basis.q_NOQ.to(dtype)
    core = part.core.to(dtype)
    total = torch.zeros(*x_TI.shape[:-1], q_NOQ.shape[1], dtype=dtype)
    for n in range(len(core) if part.form == "diagonal" else 1):
        inner = 1.0 if part.inner_NI is None else part.inner_NI[n].to(dtype)
        outer = 1.0 if part.outer_NO is None else part.outer_NO[n].to(dtype)
        z = (x_TI * inner) @ p_NPI[min(n, len(p_NPI) - 1)].T
        if part.form == "diagonal":
            z = z * core[n]
        elif part.form == "dense":
            z = z @ core.T
        else:
            matrix_QP = torch.zeros(q_NOQ.shape[2], p_NPI.shape[1], dtype=dtype)
            matrix_QP.index_put_((part.rows_K, part.columns_K), core, accumulate=True)
            z = z @ matrix_QP.T
        total = total + outer * (z @ q_NOQ[min(n, len(q_NOQ) - 1)].T)
    return total


def rotation_matrix(part: Rotation, v_TD: Tensor) -> Tensor:
    """R of a rotation of vectors like ``v_TD``, [D, D]: block by block into empty matrices."""
    features, block = v_TD.shape[-1], part.blocks_FSBB.shape[-1]
    whole_DD = torch.eye(features, dtype=v_TD.dtype)
    for blocks_SBB, chunk in zip(part.blocks_FSBB.to(v_TD.dtype), part.chunks, strict=True):
        factor_DD = torch.zeros(features, features, dtype=v_TD.dtype)
        for n in range(features // block):
            start, place = n * block // chunk * chunk, n * block % chunk // 2
            piece = torch.arange(block // 2) + start + place
            entries = torch.cat([piece, piece + chunk // 2])
            if chunk == block:
                entries = torch.arange(block) + start
            factor_DD[entries[:, None], entries] = blocks_SBB[min(n, len(blocks_SBB) - 1)]
        whole_DD = factor_DD @ whole_DD
    return whole_DD


def is_input_side(part: Part) -> bool:
    return isinstance(part, (Diagonal, Rotation)) and part.side == "input"


def input_change(part: Part, x_TI: Tensor) -> Tensor:
    """What a part on the input side adds to the base product's input, in x's dtype."""
    if isinstance(part, Diagonal):
        return (part.gain.to(x_TI.dtype) - 1) * x_TI
    assert isinstance(part, Rotation)
    return x_TI @ rotation_matrix(part, x_TI).T - x_TI


def apply_parts(parts: tuple[Part, ...], x_TI: Tensor, product: Callable[[Tensor], Tensor]) -> Tensor:
    """The adapted layer's output. ``product`` gives ``W x + b`` in x's dtype."""
    y0_TO = product(x_TI)
    y_TO = product(x_TI + sum(input_change(part, x_TI) for part in parts if is_input_side(part)))
    for part in parts:
        if not is_input_side(part):
            y_TO = y_TO + change(part, x_TI, y0_TO)
        elif isinstance(part, Rotation) and part.scale_O is not None:
            bias_O = product(torch.zeros_like(x_TI))
            turned_TI = x_TI + input_change(part, x_TI)
            y_TO = y_TO + (part.scale_O.to(x_TI.dtype) - 1) * (product(turned_TI) - bias_O)
    return y_TO


def run_parts(site: Site, parts: tuple[Part, ...], x_TI: Tensor) -> Tensor:
    """The adapted layer's output at one site, in x's dtype; of a block, the gates of its router."""
    if site.kind == "block":
        return block_gates(parts, x_TI)
    bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
    weight = site.weight_OI.to(x_TI.dtype)

    def product(v_TI: Tensor) -> Tensor:
        if site.kind == "norm":
            return v_TI * weight + (0.0 if bias_O is None else bias_O)
        return nn.functional.linear(v_TI, weight, bias_O)

    return apply_parts(parts, x_TI, product)


def scouted_gates(program: AdapterProgram, num_rows: int = 3) -> Tensor:
    """What an adapter's scout gives for one input, [T, L, E] in float64; nothing where it has none."""
    if program.scout is None:
        return torch.zeros(0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(41)
    h_TD = torch.randn(num_rows, program.scout.width, generator=generator, dtype=torch.float64)
    return gates.of_scout(program.scout, h_TD)


def block_gates(parts: tuple[Part, ...], x_TI: Tensor) -> Tensor:
    """[T, E], or zeros [T, 1] where no adapter has a router."""
    if not parts:
        return torch.zeros(len(x_TI), 1, dtype=x_TI.dtype)
    (part,) = parts
    assert isinstance(part, RoutedBlock)
    return gates.gates(part.router, x_TI)
