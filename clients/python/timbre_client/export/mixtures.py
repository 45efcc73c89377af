"""Mixtures of experts at single layers: SMoRA, MoRAM, MoLoRA, MoV, PHATGOOSE, LoRA-Mixer, Arrow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from timbre_client.export.folder import write_folder

Lora = tuple[ArrayLike, ArrayLike]
"""One expert at one layer: A [r, in] and B [out, r]."""


@dataclass(frozen=True, slots=True)
class RankMixture:
    """SMoRA at one layer: ``a`` [r, in], ``b`` [out, r], ``router`` [r, in] and, in all layers or in none,
    ``balance_bias`` [r]."""

    a: ArrayLike
    b: ArrayLike
    router: ArrayLike
    balance_bias: ArrayLike | None = None


def smora(
    folder: str | Path,
    layers: Mapping[str, RankMixture],
    *,
    top_k: int,
    gate: Literal["softmax", "renormalised", "one"],
    scale: float,
) -> Path:
    """SMoRA. All layers have one rank."""
    arrays = {}
    for path, each in layers.items():
        arrays[path] = {"lora_A.weight": each.a, "lora_B.weight": each.b, "router.weight": each.router}
        if each.balance_bias is not None:
            arrays[path]["router.balance_bias"] = each.balance_bias
    first = next(iter(layers.values()), None)
    options = {
        "r": 0 if first is None else len(np.asarray(first.a)),
        "top_k": top_k,
        "gate": gate,
        "scale": scale,
        "balance_bias": first is not None and first.balance_bias is not None,
    }
    return write_folder(folder, "SMORA", options, arrays)


def moram(folder: str | Path, layers: Mapping[str, Lora], *, tau: float, k: int, delta: float) -> Path:
    """MoRAM: the ranks of all tasks that are done, A [R, in] and B [out, R]."""
    arrays = {path: {"lora_A.weight": a, "lora_B.weight": b} for path, (a, b) in layers.items()}
    r_sum = next((len(np.asarray(a)) for a, _ in layers.values()), 0)
    return write_folder(folder, "MORAM", {"tau": tau, "k": k, "delta": delta, "r_sum": r_sum}, arrays)


def molora(
    folder: str | Path,
    layers: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike]],
    *,
    lora_alpha: float,
    top_k: int | None = None,
) -> Path:
    """MoLoRA, as T5X has the arrays of each layer: ``lora_A`` [E, in, r], ``lora_B`` [E, r, out], and the
    router's kernel [in, E]."""
    arrays = {
        path: {
            "molora_A": np.swapaxes(np.asarray(a), 1, 2),
            "molora_B": np.swapaxes(np.asarray(b), 1, 2),
            "molora_router": np.transpose(np.asarray(kernel)),
        }
        for path, (a, b, kernel) in layers.items()
    }
    r = next((np.shape(np.asarray(a))[2] for a, _, _ in layers.values()), 0)
    return write_folder(folder, "MOLORA", {"r": r, "lora_alpha": lora_alpha, "top_k": top_k}, arrays)


def mov(
    folder: str | Path, layers: Mapping[str, tuple[ArrayLike, ArrayLike]], *, top_k: int | None = None
) -> Path:
    """MoV, as T5X has the arrays of each layer: the vectors [E, out], and the router's kernel [in, E]."""
    arrays = {
        path: {"mov_gain": gain, "mov_router": np.transpose(np.asarray(kernel))}
        for path, (gain, kernel) in layers.items()
    }
    return write_folder(folder, "MOV", {"top_k": top_k}, arrays)


def phatgoose(
    folder: str | Path,
    layers: Mapping[str, tuple[Sequence[Lora], ArrayLike]],
    *,
    top_k: int = 2,
) -> Path:
    """PHATGOOSE: for each layer its experts and their gate vectors [E, in], as trained."""
    arrays = {
        path: {**_numbered("experts", experts), "gate_vector": vectors}
        for path, (experts, vectors) in layers.items()
    }
    num_experts = next((len(experts) for experts, _ in layers.values()), 0)
    return write_folder(folder, "PHATGOOSE", {"num_experts": num_experts, "top_k": top_k}, arrays)


def lora_mixer(
    folder: str | Path,
    layers: Mapping[str, Sequence[Lora]],
    routers: Mapping[str, ArrayLike],
    *,
    scales: Sequence[float],
    top_k: int,
    renormalised: bool,
    biases: Mapping[str, ArrayLike] | None = None,
) -> Path:
    """LoRA-Mixer: the experts of each layer, and routers [E, in] by the path of that layer, or all of them by
    the path of the attention around it; ``biases`` [E], of all of them or of none, likewise. ``scales`` are
    the experts' alpha / r."""
    arrays: dict[str, dict[str, ArrayLike]] = {
        path: _numbered("experts", experts) for path, experts in layers.items()
    }
    own = set(routers) <= set(layers)
    for path, router in routers.items():
        arrays.setdefault(path, {})["router.weight"] = router
    for path, bias in (biases or {}).items():
        arrays.setdefault(path, {})["router.bias"] = bias
    options = {
        "scales": [float(scale) for scale in scales],
        "top_k": top_k,
        "renormalised": renormalised,
        "routers": "projection" if own else "attention",
        "router_bias": biases is not None,
    }
    return write_folder(folder, "LORA_MIXER", options, arrays)


def arrow(
    folder: str | Path,
    layers: Mapping[str, Sequence[Lora]],
    general: Mapping[str, Sequence[Lora]] | None = None,
    *,
    scales: Sequence[float],
    top_k: int = 3,
    router_temperature: float = 1.0,
    peft_seed: int | None = None,
) -> Path:
    """Arrow: the experts of each layer, with ``scales`` their alpha / r, and of the same layers the general
    ones of GenKnowSub. ``peft_seed``: prototypes by PEFT's power iteration from this ``rng_seed``.

    Raises ValueError for general experts of a layer that has no others."""
    given = general or {}
    stray = next((path for path in given if path not in layers), None)
    if stray is not None:
        raise ValueError(f"general has the layer {stray!r}, expected layers that have experts")
    arrays = {
        path: {**_numbered("experts", experts), **_numbered("general", given.get(path, ()))}
        for path, experts in layers.items()
    }
    options = {
        "scales": [float(scale) for scale in scales],
        "top_k": top_k,
        "router_temperature": router_temperature,
        "prototypes": "svd" if peft_seed is None else "peft",
        "rng_seed": peft_seed,
        "num_general": next((len(each) for each in given.values()), 0),
    }
    return write_folder(folder, "ARROW", options, arrays)


def _numbered(name: str, experts: Sequence[Lora]) -> dict[str, ArrayLike]:
    return {
        f"{name}.{e}.lora_{side}.weight": factor
        for e, pair in enumerate(experts)
        for side, factor in zip("AB", pair, strict=True)
    }
