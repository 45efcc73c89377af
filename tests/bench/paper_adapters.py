"""Adapters of the papers' own methods at usual sizes, by name: random values, as fast as trained ones.

Each takes a folder, the layers' shapes (out, in) by path and their weights, and writes an adapter with
`timbre_client.export`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from timbre_client.export import factors, low_rank, multiplicative, quantised, sparse, spectral, weight_bases

Shapes = Mapping[str, tuple[int, int]]
Weights = Mapping[str, np.ndarray[Any, np.dtype[np.float32]]]
RANDOM = np.random.default_rng(3)


def normal(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return 0.02 * RANDOM.standard_normal(shape, dtype=np.float32)


def cells(out: int, in_: int, count: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Distinct places (rows, columns), in row-major order."""
    flat = np.sort(RANDOM.choice(out * in_, count, replace=False))
    return flat // in_, flat % in_


def a_and_b(shapes: Shapes, rank: int) -> dict[str, tuple[Any, Any]]:
    return {path: (normal(rank, in_), normal(out, rank)) for path, (out, in_) in shapes.items()}


def sdctft(folder: Path, shapes: Shapes, weights: Weights) -> Path:
    layers = {p: spectral.Coefficients(normal(700), *cells(*shape, 700)) for p, shape in shapes.items()}
    return spectral.sdctft(folder, layers, scale=1.0)


def loca(folder: Path, shapes: Shapes, weights: Weights) -> Path:
    layers = {p: spectral.Located(normal(1000), RANDOM.random((2, 1000), np.float32)) for p in shapes}
    return spectral.loca(folder, layers, scale=1.0)


def wara(folder: Path, shapes: Shapes, weights: Weights) -> Path:
    layers = {p: (normal(8, in_ // 2), normal(out // 2, 8)) for p, (out, in_) in shapes.items()}
    return spectral.wara(folder, layers, rank=8, scale=1.0)


def nola(folder: Path, shapes: Shapes, weights: Weights) -> Path:
    layers = {
        path: tuple(low_rank.Combination(start, normal(64), seed=7) for start in pair)
        for path, pair in a_and_b(shapes, 8).items()
    }
    return low_rank.nola(folder, layers, r=8, lora_alpha=8, normalised=True)


def mos(folder: Path, shapes: Shapes, weights: Weights) -> Path:
    layers, pools = {}, {}
    for path, (out, in_) in shapes.items():
        layers[path] = (RANDOM.integers(0, 32, (8, 2)), RANDOM.integers(0, 32, (8, 2)))
        pools[path.split(".")[-1]] = (normal(32, in_ // 2), normal(32, out // 2))
    return low_rank.mos(folder, layers, pools, lora_alpha=8)


def lorta(folder: Path, shapes: Shapes, weights: Weights) -> Path:
    square = [path for path, (out, in_) in shapes.items() if out == in_]
    width = shapes[square[0]][1]
    found = low_rank.Factors(
        normal(width, 8), normal(8, width // 9), normal(9, 8), normal(1, 8), normal(4, 8)
    )
    return low_rank.lorta(folder, found, {path: (0, i) for i, path in enumerate(square)}, lora_alpha=8)


def sora(folder: Path, shapes: Shapes, weights: Weights) -> Path:
    layers = {p: factors.Gated(a, b, [0.5] * 8) for p, (a, b) in a_and_b(shapes, 8).items()}
    return factors.sora(folder, layers, r=16, lora_alpha=16)


def increlora(folder: Path, shapes: Shapes, weights: Weights) -> Path:
    layers = {p: factors.Gated(a, b, [0.5] * 8) for p, (a, b) in a_and_b(shapes, 8).items()}
    return factors.increlora(folder, layers, lora_alpha=16)


def block_lora(folder: Path, shapes: Shapes, weights: Weights) -> Path:
    layers = {p: (a, np.stack([b, b])) for p, (a, b) in a_and_b(shapes, 8).items()}
    return factors.block_lora(folder, layers, r=16, lora_alpha=16)


def tlora(folder: Path, shapes: Shapes, weights: Weights) -> Path:
    def digits(size: int) -> tuple[int, int]:
        first = math.gcd(size, 64)
        return first, size // first

    layers = {
        path: factors.Rings(
            transform=[normal(n, n, 2, 2) for n in digits(in_)],
            out=[normal(n, 2, 2) for n in digits(out)],
            in_=[normal(n, 2, 2) for n in digits(in_)],
        )
        for path, (out, in_) in shapes.items()
    }
    return factors.tlora(folder, layers)


def hydra(folder: Path, shapes: Shapes, weights: Weights) -> Path:
    layers = {
        path: {
            "parallel_A": normal(8, in_),
            "parallel_B": normal(out, 8),
            "sequential_A": normal(8, out),
            "sequential_B": normal(out, 8),
        }
        for path, (out, in_) in shapes.items()
    }
    return multiplicative.hydra(folder, layers)


def ether(folder: Path, shapes: Shapes, weights: Weights) -> Path:
    layers = {path: {"out_u": normal(32, out // 32)} for path, (out, _) in shapes.items()}
    options = {"plus": False, "side": "output", "input_reading": "every_chunk"}
    return multiplicative.ether(folder, layers, **options)


def ether_plus(folder: Path, shapes: Shapes, weights: Weights) -> Path:
    layers = {
        path: {
            f"{side}_{vector}": normal(32, size // 32)
            for side, size in (("out", out), ("in", in_))
            for vector in "uv"
        }
        for path, (out, in_) in shapes.items()
    }
    return multiplicative.ether(folder, layers, plus=True, side="both", input_reading="every_chunk")


def ssf(folder: Path, shapes: Shapes, weights: Weights) -> Path:
    return multiplicative.ssf(folder, {p: (1 + normal(out), normal(out)) for p, (out, _) in shapes.items()})


def propulsion(folder: Path, shapes: Shapes, weights: Weights) -> Path:
    return multiplicative.propulsion(
        folder, {p: 1 + normal(out) for p, (out, _) in shapes.items()}, degree=15
    )


def composable_sft(folder: Path, shapes: Shapes, weights: Weights) -> Path:
    layers = {}
    for path, (out, in_) in shapes.items():
        count = out * in_ // 100
        flat = np.sort(RANDOM.choice(out * in_, count, replace=False))
        layers[path] = (np.diff(flat, prepend=0), normal(count))
    return sparse.composable_sft(folder, weights=layers)


def s2ft(folder: Path, shapes: Shapes, weights: Weights) -> Path:
    layers = {
        path: (np.sort(RANDOM.choice(in_, in_ // 50, replace=False)), normal(out, in_ // 50))
        for path, (out, in_) in shapes.items()
    }
    return sparse.s2ft(folder, inputs=layers)


def sara(folder: Path, shapes: Shapes, weights: Weights) -> Path:
    threshold = 2.5e-4
    values = {p: normal(int((np.abs(w) < np.float32(threshold)).sum())) for p, w in weights.items()}
    return sparse.sara(folder, threshold=threshold, values=values)


def snell(folder: Path, shapes: Shapes, weights: Weights) -> Path:
    points = {path: (normal(2, in_, 8), normal(2, out, 8)) for path, (out, in_) in shapes.items()}
    return sparse.snell(folder, threshold=0.5, points=points)


def snella(folder: Path, shapes: Shapes, weights: Weights) -> Path:
    points = {path: (normal(2, in_, 8), normal(2, out, 8)) for path, (out, in_) in shapes.items()}
    kernels = dict.fromkeys(shapes, (1.0, 1.0, 0.5))
    return sparse.snella(folder, thresholds=dict.fromkeys(shapes, 0.5), points=points, kernels=kernels)


def spt(folder: Path, shapes: Shapes, weights: Weights) -> Path:
    scattered = {}
    for path, (out, in_) in shapes.items():
        rows, columns = cells(out, in_, out * in_ // 100)
        scattered[path] = (rows * in_ + columns, normal(len(rows)))
    return sparse.spt(folder, sparse=scattered, low_rank=a_and_b(shapes, 8))


def lq_lora(folder: Path, shapes: Shapes, weights: Weights) -> Path:
    split = a_and_b(shapes, 8)
    layers = {p: (a, b, split[p][1], split[p][0]) for p, (a, b) in a_and_b(shapes, 8).items()}
    return quantised.lq_lora(folder, r=8, lora_alpha=8, layers=layers)


def lora_xs(folder: Path, shapes: Shapes, weights: Weights) -> Path:
    layers = {p: (a, b, normal(64, 64)) for p, (a, b) in a_and_b(shapes, 64).items()}
    return weight_bases.lora_xs(folder, alpha=64, layers=layers)


def lora_sb(folder: Path, shapes: Shapes, weights: Weights) -> Path:
    layers = {p: (a, b, normal(8, 8)) for p, (a, b) in a_and_b(shapes, 8).items()}
    return weight_bases.lora_sb(folder, alpha=8, layers=layers)


def svfit(folder: Path, shapes: Shapes, weights: Weights) -> Path:
    return weight_bases.svfit(folder, sigma={path: 1 + normal(64) for path in shapes})


def svft(folder: Path, shapes: Shapes, weights: Weights) -> Path:
    layers = {p: weight_bases.SvftLayer(normal(min(shape)), 0.0) for p, shape in shapes.items()}
    return weight_bases.svft(folder, layers=layers)


def salt(folder: Path, shapes: Shapes, weights: Weights) -> Path:
    layers = {}
    for path, weight in weights.items():
        u, s, vt = np.linalg.svd(weight, full_matrices=False)
        tail = len(s) - 64
        layers[path] = weight_bases.SaltLayer(
            u, s, vt, 1 + normal(64), normal(64), normal(tail, 8), normal(8, tail)
        )
    return weight_bases.salt(folder, layers=layers)


def loldu(folder: Path, shapes: Shapes, weights: Weights) -> Path:
    layers = {path: weight_bases.LolduLayer(normal(64), 1.0) for path in shapes}
    return weight_bases.loldu(folder, alpha=64, layers=layers)


METHODS: dict[str, Callable[[Path, Shapes, Weights], Path]] = {
    "sdctft n=700": sdctft,
    "loca n=1000": loca,
    "wara r=8": wara,
    "nola r=8": nola,
    "mos r=8": mos,
    "lorta r=8": lorta,
    "sora r=8": sora,
    "increlora r=8": increlora,
    "block_lora r=8": block_lora,
    "tlora R=2": tlora,
    "hydra r=8": hydra,
    "ether n=32": ether,
    "ether+ n=32, both sides": ether_plus,
    "ssf": ssf,
    "propulsion": propulsion,
    "composable_sft 1 %": composable_sft,
    "s2ft 2 %": s2ft,
    "sara 1 %": sara,
    "snell": snell,
    "snella": snella,
    "spt 1 %, r=8": spt,
    "lq_lora r=8": lq_lora,
    "lora_xs r=64": lora_xs,
    "lora_sb r=8": lora_sb,
    "svfit r=64": svfit,
    "svft plain": svft,
    "salt r=64": salt,
    "loldu r=64": loldu,
}
