"""FRoD's matrices: V of a category of layers from their weights, U and λ_0 of a layer from V.

Legend: I in features, O out features, L rows of a category's weights.

Paper: doi.org/10.1609/aaai.v40i31.39813; the joint decomposition is a hierarchical generalised SVD.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from timbre_methods.contract import Site
from timbre_methods.decompositions import on_cpu
from timbre_methods.errors import InvalidConfig, InvalidTensors

MAX_STACKED = 2**30
"""Numbers in all weights of a category from which V may be derived: 4 GiB, and its factors beside it."""


def category_of(path: str) -> str:
    """The name under which layers share V: the last two steps, or one after a number."""
    steps = path.split(".")
    if len(steps) == 1 or steps[-2].isdigit():
        return steps[-1]
    if steps[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return f"{steps[-2]}_{steps[-1]}"


def numbered_layers(paths: Iterable[str]) -> dict[str, int]:
    """The number of the block that each adapted layer is in, as PEFT finds it; it orders the weights.

    A layer without a number gets its place among all layers. Of two with the same, PEFT keeps the last.
    """
    numbers = {}
    for place, path in enumerate(paths):
        steps = path.split(".")
        after = steps[steps.index("layers") + 1 :][:1] if "layers" in steps else []
        found = next((step for step in (*after, *steps) if step.isdecimal()), None)
        numbers[path] = place if found is None else int(found)
    return numbers


def derived_right(numbered: Mapping[int, Site], ridge: float) -> Tensor:
    """V of a category from its weights by number of their block, rounded to their dtype as in PEFT."""
    members = [site for _, site in sorted(numbered.items())]
    first = members[0]
    if any(site.in_features != first.in_features for site in members):
        raise InvalidTensors(
            f"layers of {category_of(first.path)} have inputs of different sizes: no V is theirs"
        )
    if sum(site.weight_OI.numel() for site in members) > MAX_STACKED:
        raise InvalidConfig(
            f"V of {category_of(first.path)} is not derived from more than {MAX_STACKED} numbers; "
            "save with save_projection=true"
        )
    stacked_LI = torch.cat([on_cpu(site.weight_OI) for site in members])
    right_II: Tensor
    if len(stacked_LI) < first.in_features:
        right_II = torch.linalg.svd(stacked_LI, full_matrices=True).Vh.T
    else:
        q_LI, r_II = torch.linalg.qr(stacked_LI)
        mean_II = torch.zeros_like(r_II)
        for q_OI in q_LI.split([site.out_features for site in members]):
            ridge_II = ridge * torch.eye(first.in_features, device=r_II.device)
            inverse = torch.linalg.inv_ex(q_OI.T @ q_OI + ridge_II)
            if not inverse.info.is_meta and int(inverse.info):
                raise InvalidConfig(
                    f"regularization_alpha: found {ridge}, which is too small to derive V of "
                    f"{category_of(first.path)} from its weights; save with save_projection=true"
                )
            mean_II = mean_II + inverse.inverse
        right_II = r_II.T @ torch.linalg.eigh(mean_II / len(members)).eigenvectors
    right_II = right_II.to(first.weight_OI.dtype).to(torch.float32)
    return right_II.contiguous()


def lefts(right_II: Tensor, members: Sequence[Site]) -> Iterator[tuple[Site, Tensor, Tensor]]:
    """U [O, I] and λ_0 [I] of each layer: the columns of ``W V^-T`` and their lengths."""
    wide_II = on_cpu(right_II, torch.float64)
    factors = torch.linalg.lu_factor_ex(wide_II)
    is_regular = right_II.is_meta or int(factors.info) == 0
    inverse_II = None if is_regular else torch.linalg.pinv(wide_II, rtol=1e-6)
    for site in members:
        w_IO = on_cpu(site.weight_OI, torch.float64).T
        if inverse_II is None:
            scaled_OI = torch.linalg.lu_solve(factors.LU, factors.pivots, w_IO).T
        else:
            scaled_OI = (inverse_II @ w_IO).T
        lengths_I = torch.linalg.vector_norm(scaled_OI, dim=0)
        left_OI = torch.where(lengths_I > 1e-12, scaled_OI / lengths_I, 0.0).to(torch.float32).contiguous()
        lengths_I = lengths_I.to(torch.float32)
        if not right_II.is_meta and not (lengths_I.isfinite().all() and left_OI.isfinite().all()):
            raise InvalidTensors(
                f"V of {category_of(site.path)}: found a matrix that cannot be inverted in float32; "
                "it is not the basis of this layer"
            )
        yield site, left_OI, lengths_I
