"""Runs compiled programs on a plain model, by the semantics that `timbre_methods.program` writes down.

The tests' own reading of the vocabulary, one row of formula a part; it shares nothing with the operators.

Legend: T tokens, I in features, O out features.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from timbre_methods.contract import Site
from timbre_methods.program import (
    AdapterProgram,
    Block,
    Dense,
    Diagonal,
    Kronecker,
    LowRank,
    Part,
    Projected,
    Sparse,
    Spectral,
)


def linear_sites(model: nn.Module) -> dict[str, Site]:
    """The model's linear layers as sites, `Conv1D` transposed."""
    sites = {}
    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            weight = module.weight.detach()
            bias = None if module.bias is None else module.bias.detach()
            sites[path] = Site(path, weight.T if isinstance(module, Conv1D) else weight, bias)
    return sites


def change(part: Part, x_TI: Tensor, y0_TO: Tensor) -> Tensor:
    """What a part on the output side adds, in x's dtype."""
    dtype = x_TI.dtype
    if isinstance(part, LowRank):
        return (x_TI @ part.a_RI.to(dtype).T) @ part.b_OR.to(dtype).T
    if isinstance(part, Spectral):
        places = part.places
        z_TI = torch.fft.ifft(x_TI, dim=-1)
        h_TO = torch.zeros(*x_TI.shape[:-1], places.out_features, dtype=z_TI.dtype)
        h_TO.index_add_(-1, places.rows_N, z_TI[..., places.columns_N] * part.c_N.to(dtype))
        return torch.fft.ifft(h_TO, dim=-1).real
    if isinstance(part, Sparse):
        rows = [
            x_TI[..., part.columns_N[start:end].long()] @ part.values_N[start:end].to(dtype)
            for start, end in zip(part.row_ends[:-1].tolist(), part.row_ends[1:].tolist(), strict=True)
        ]
        return torch.stack(rows, dim=-1)
    if isinstance(part, Block):
        matrix_OI = torch.zeros(part.out_features, x_TI.shape[-1], dtype=dtype)
        if part.side == "input":
            matrix_OI[:, part.index_N] = part.block.to(dtype)
        else:
            matrix_OI[part.index_N] = part.block.to(dtype)
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
    assert part.side == "output"
    shift = torch.zeros_like(part.gain) if part.shift is None else part.shift
    return (part.gain.to(dtype) - 1) * y0_TO + shift.to(dtype)


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


def run_parts(site: Site, parts: tuple[Part, ...], x_TI: Tensor) -> Tensor:
    """The adapted layer's output at one site, in x's dtype."""
    changed_TI = x_TI
    for part in parts:
        if isinstance(part, Diagonal) and part.side == "input":
            changed_TI = changed_TI + (part.gain.to(x_TI.dtype) - 1) * x_TI
    bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
    y0_TO = nn.functional.linear(changed_TI, site.weight_OI.to(x_TI.dtype), bias_O)
    y_TO = y0_TO
    for part in parts:
        if not (isinstance(part, Diagonal) and part.side == "input"):
            y_TO = y_TO + change(part, x_TI, y0_TO)
    return y_TO


class AdaptedLinear(nn.Module):
    """A layer of the base with an adapter's parts; they act in float32 and are rounded once."""

    def __init__(self, base: nn.Module, parts: tuple[Part, ...]) -> None:
        super().__init__()
        self.base = base
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        wide, changed = x.float(), x
        for part in self.parts:
            if isinstance(part, Diagonal) and part.side == "input":
                changed = (wide * part.gain).to(x.dtype)
        y0 = self.base(changed)
        y = y0.float()
        for part in self.parts:
            if not (isinstance(part, Diagonal) and part.side == "input"):
                y = y + change(part, wide, y0.float())
        return y.to(y0.dtype)


def adapted_copy(model: nn.Module, program: AdapterProgram) -> nn.Module:
    """A copy of the model that computes what the program says; the model itself stays as it is."""
    adapted = copy.deepcopy(model)
    for path, parts in program.sites.items():
        parent, _, name = path.rpartition(".")
        holder = adapted.get_submodule(parent)
        setattr(holder, name, AdaptedLinear(getattr(holder, name), parts))
    return adapted
