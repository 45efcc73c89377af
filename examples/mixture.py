"""A mixture of four experts in some MLPs of the small model: what it computes, and how its files name it.

Each MLP has a router that reads its input x and gives expert e a gate g_e; an expert is three LoRAs, on
gate, up and down. Attention stays the base's. Two kinds of mixture, in two public formats:

* `solo`, as LLaVA-MoLE's (arXiv 2401.16160): the one expert with the largest logit acts, with gate 1;
* `duet`, as MixLoRA's (arXiv 2404.15159, files as MoE-PEFT writes them): the two with the largest, by the
  softmax of their two logits; experts meet after the whole MLP, y = Σ_e g_e MLP_e(x).

Legend: B rows, L positions, D hidden width, H MLP width, E experts, R rank, I in, O out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

CUES: Mapping[str, str] = MappingProxyType(
    {
        "pirate": "Answer as a pirate.",
        "headline": "Answer as a newspaper headline.",
        "telegram": "Answer as a telegram.",
        "json": "Answer as a JSON object.",
    }
)
"""The kinds of text, in the order of the experts that are to learn them, and the system message of each."""

LAYERS = range(18, 30, 2)
RANK = 2
SCALE = 2.0
PROJECTIONS = ("gate", "up", "down")


@dataclass(frozen=True, slots=True)
class Mixture:
    """One way to mix, and what its files say."""

    top_k: int
    has_bias: bool
    config: Mapping[str, Any]
    router_name: str
    """Of the router in layer {i}, followed by .weight or .bias."""
    factor_name: str
    """Of factor {f} of expert {e} at projection {p} in layer {i}."""


_OF_ALL = {
    "base_model_name_or_path": "SmolLM2-135M-Instruct",
    "inference_mode": True,
    "lora_alpha": SCALE * RANK,
    "r": RANK,
}

MIXTURES: Mapping[str, Mixture] = MappingProxyType(
    {
        "solo": Mixture(
            top_k=1,
            has_bias=True,
            config={**_OF_ALL, "peft_type": "LLAVA_MOLE", "mode": "sparse"},
            router_name="base_model.model.model.layers.{i}.mlp.router",
            factor_name="base_model.model.model.layers.{i}.mlp.moe_{p}.{e}.lora_{f}",
        ),
        "duet": Mixture(
            top_k=2,
            has_bias=False,
            config={
                **_OF_ALL,
                "peft_type": "MIXLORA",
                "bias": "none",
                "lora_dropout": 0.0,
                "num_experts": len(CUES),
                "routing_strategy": "mixlora",
                "target_modules": [f"{name}_proj" for name in PROJECTIONS],
                "top_k": 2,
                "use_rslora": False,
            },
            router_name="mixlora.layers.{i}.mlp.moe_gate",
            factor_name="mixlora.layers.{i}.mlp.{p}_proj.experts.{e}.lora_{f}.weight",
        ),
    }
)


class MixtureMlp(nn.Module):
    """One MLP of the base, frozen, with a router and experts."""

    def __init__(self, mlp: Any, mixture: Mixture) -> None:
        super().__init__()
        self.mlp, self.top_k = mlp, mixture.top_k
        self.router = nn.Linear(mlp.gate_proj.in_features, len(CUES), bias=mixture.has_bias)
        nn.init.normal_(self.router.weight, std=0.01)
        self.a_ERI, self.b_EOR = nn.ParameterDict(), nn.ParameterDict()
        for name in PROJECTIONS:
            layer = self._layer(name)
            a_ERI = torch.randn(len(CUES), RANK, layer.in_features) / layer.in_features**0.5
            self.a_ERI[name] = nn.Parameter(a_ERI)
            self.b_EOR[name] = nn.Parameter(torch.zeros(len(CUES), layer.out_features, RANK))
        self.forced_E: Tensor | None = None
        """Gates for all rows in place of the router's, as a plain mix of adapters has them."""
        self.logits_BLE, self.gates_BLE = torch.empty(0), torch.empty(0)
        """Of the last forward."""

    def _layer(self, name: str) -> nn.Linear:
        layer = getattr(self.mlp, f"{name}_proj")
        assert isinstance(layer, nn.Linear)
        return layer

    def forward(self, x_BLD: Tensor) -> Tensor:
        self.logits_BLE = self.router(x_BLD)
        kept = self.logits_BLE.topk(self.top_k, dim=-1)
        gates_BLE = torch.zeros_like(self.logits_BLE).scatter(-1, kept.indices, kept.values.softmax(-1))
        self.gates_BLE = gates_BLE if self.forced_E is None else self.forced_E.expand_as(gates_BLE)
        if self.forced_E is not None or self.top_k == 1:
            return self._meeting_at_each_layer(x_BLD, self.gates_BLE)
        return self._meeting_after_the_mlp(x_BLD, self.gates_BLE)

    def _meeting_at_each_layer(self, x_BLD: Tensor, gates_BLE: Tensor) -> Tensor:
        def layer(name: str, x_BLI: Tensor) -> Tensor:
            a_KI, b_KO = self.a_ERI[name].flatten(0, 1), self.b_EOR[name].transpose(1, 2).flatten(0, 1)
            gates_BLK = gates_BLE.repeat_interleave(RANK, dim=-1)
            return self._layer(name)(x_BLI) + SCALE * (x_BLI @ a_KI.T * gates_BLK) @ b_KO

        return layer("down", self.mlp.act_fn(layer("gate", x_BLD)) * layer("up", x_BLD))

    def _meeting_after_the_mlp(self, x_BLD: Tensor, gates_BLE: Tensor) -> Tensor:
        def change(name: str, e: int, x_BLI: Tensor) -> Tensor:
            return SCALE * x_BLI @ self.a_ERI[name][e].T @ self.b_EOR[name][e].T

        gate_BLH, up_BLH = self.mlp.gate_proj(x_BLD), self.mlp.up_proj(x_BLD)
        hidden_BLH, y_BLD = torch.zeros_like(up_BLH), torch.zeros_like(x_BLD)
        for e in range(len(CUES)):
            own_BLH = self.mlp.act_fn(gate_BLH + change("gate", e, x_BLD))
            own_BLH = gates_BLE[..., e : e + 1] * own_BLH * (up_BLH + change("up", e, x_BLD))
            hidden_BLH, y_BLD = hidden_BLH + own_BLH, y_BLD + change("down", e, own_BLH)
        return y_BLD + self.mlp.down_proj(hidden_BLH)  # what is linear comes once


def put_into(base: Any, mixture: Mixture) -> dict[int, MixtureMlp]:
    """Freeze the base and replace the MLPs of LAYERS; returns them by layer."""
    base.requires_grad_(False)
    layers = base.get_decoder().layers
    for i in LAYERS:
        layers[i].mlp = MixtureMlp(layers[i].mlp, mixture)
    return {i: layers[i].mlp for i in LAYERS}


def named_tensors(mixture: Mixture, mlps: Mapping[int, MixtureMlp]) -> dict[str, Tensor]:
    """The parameters by the names that they have in the file; the very tensors, so that these can be set."""
    found: dict[str, Tensor] = {}
    for i, mlp in mlps.items():
        for name, parameter in mlp.router.named_parameters():
            found[f"{mixture.router_name.format(i=i)}.{name}"] = parameter.detach()
        for p in PROJECTIONS:
            for f, factors in (("A", mlp.a_ERI[p]), ("B", mlp.b_EOR[p])):
                for e, factor in enumerate(factors.detach()):
                    found[mixture.factor_name.format(i=i, p=p, e=e, f=f)] = factor
    return found
