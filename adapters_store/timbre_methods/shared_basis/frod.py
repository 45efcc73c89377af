"""FRoD, as PEFT saves it: ``y = b + U (S + diag(λ)) V^T x`` in place of ``W x + b``.

V [I, I] belongs to a category of layers (``self_attn_q_proj``): it is in the file, or derived from all
adapted weights of the category where the file says ``save_projection=false``. U and λ_0 are never in the
file: they are the normalised columns of ``W V^-T`` and their lengths, so ``W = U diag(λ_0) V^T``, and what
is added to the base is ``U (S + diag(λ − λ_0)) V^T``. S is sparse, off its diagonal; its places are in the
file, or drawn again from ``projection_prng_key``, category after category in alphabetical order.

Trap: PEFT computes U from a V that it has just derived and only then takes V from the file. Where the two
differ by a sign, which they may on another machine than the trainer's, its result is noise. Here U is
computed from the V that is used.

Legend: T tokens, I in features, O out features, N stored values of S.

Paper: doi.org/10.1609/aaai.v40i31.39813.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from timbre_methods.bases import MAX_GRID, Matrix, content_key, interned_basis
from timbre_methods.config import PeftConfig, Seed, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.errors import InvalidConfig, InvalidTensors
from timbre_methods.examples import chosen_sites, coin, peft_file, random_tensor, whole_number
from timbre_methods.program import AdapterProgram, Projected
from timbre_methods.shared_basis.frod_projection import category_of, derived_right, lefts, numbered_layers
from timbre_methods.shared_basis.model_tensors import model_tensor
from timbre_methods.site_tensors import PREFIX, SiteTensors, derived_name, tensors_by_site, tensors_of_site

DIAGONAL, VALUES = "frod_lambda_l", "frod_lambda_s_values"
KEYS = frozenset({DIAGONAL, VALUES})
RIGHT, PLACES, SIZE = "base_model.frod_V.", "base_model.frod_s_indices.", "base_model.frod_s_size."
LEFT, LENGTHS, DRAWN, DERIVED_RIGHT = "left", "lengths", "places", "right"


class FrodConfig(PeftConfig):
    """The fields that matter at inference. The defaults are PEFT's."""

    inert = frozenset({"frod_dropout", "init_weights", "progressbar", "runtime_offload_base_weight"})

    projection_prng_key: Seed = 0
    save_projection: bool = True
    sparse_rate: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.01
    regularization_alpha: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)] = 1e-3


class Frod(Method[FrodConfig]):
    name = "frod"
    paper = "doi.org/10.1609/aaai.v40i31.39813"
    stored = "λ [in], n values of S; V [in, in] and the places of S for a category of layers"
    regenerated = "U, from the base; V and places too with save_projection=false"
    checked_against = "PEFT"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "FROD"

    def parse(self, raw_config: Mapping[str, Any]) -> FrodConfig:
        return read_config(FrodConfig, raw_config)

    def derive(self, config: FrodConfig, tensors: Tensors, sites: Sites) -> dict[str, Tensor]:
        derived = {}
        generator = torch.Generator().manual_seed(config.projection_prng_key)
        categories = _by_category(tensors, sites)
        adapted = {own.site.path for members in categories.values() for own in members}
        numbers = numbered_layers(path for path in sites if path in adapted)
        for category in sorted(categories):
            members = [found.site for found in categories[category]]
            if config.save_projection:
                right_II = _right_of_file(tensors, category, members)
            else:
                numbered = {numbers[site.path]: site for site in members}
                right_II = derived_right(numbered, config.regularization_alpha)
                derived[derived_name(category, DERIVED_RIGHT)] = right_II
                derived[derived_name(category, DRAWN)] = _drawn_places(config, right_II, generator)
            for site, left_OI, lengths_I in lefts(right_II, members):
                derived[derived_name(site.path, LEFT)] = left_OI
                derived[derived_name(site.path, LENGTHS)] = lengths_I
        return derived

    def compile(self, config: FrodConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        parts = {}
        for category, members in _by_category(tensors, sites).items():
            right_II, places_2N = _projection(config, tensors, category, [own.site for own in members])
            right = _side(right_II.T)
            for own in members:
                parts[own.site.path] = (_part(own, right, places_2N),)
        return AdapterProgram({path: parts[path] for path in sites if path in parts})

    def check_values(self, config: FrodConfig, tensors: Tensors, sites: Sites) -> None:
        for name, tensor in tensors.items():
            if name.startswith(PLACES):
                size = len(tensors[RIGHT + name.removeprefix(PLACES)])
                lowest, highest = (int(bound) for bound in tensor.aminmax()) if tensor.numel() else (0, 0)
                if lowest < 0 or highest >= size:
                    wrong = lowest if lowest < 0 else highest
                    raise InvalidTensors(f"{name}: found place {wrong}, expected 0 to {size - 1}")
            if name.startswith(SIZE):
                size = len(tensors[RIGHT + name.removeprefix(SIZE)])
                if tensor.tolist() != [size, size]:
                    raise InvalidTensors(f"{name}: found {tensor.tolist()}, expected {[size, size]}")

    def reference(self, config: FrodConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        weight_OI = site.weight_OI.to(x_TI.dtype)
        own = {key: t.to(x_TI.dtype) for key, t in tensors_of_site(tensors, site, KEYS).items()}
        if own:
            category = category_of(site.path)
            right_II, places_2N = tensors.get(RIGHT + category), tensors.get(PLACES + category)
            if right_II is None or places_2N is None:
                right_II = tensors[derived_name(category, DERIVED_RIGHT)]
                places_2N = tensors[derived_name(category, DRAWN)]
            core_II = torch.diag(own[DIAGONAL])
            for row, column, value in zip(*places_2N.tolist(), own[VALUES], strict=True):
                core_II[row, column] += value
            left_OI = tensors[derived_name(site.path, LEFT)].to(x_TI.dtype)
            weight_OI = torch.einsum("op,pq,iq->oi", left_OI, core_II, right_II.to(x_TI.dtype))
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        return torch.nn.functional.linear(x_TI, weight_OI, bias_O)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen = chosen_sites(sites, generator)
        config = FrodConfig(
            projection_prng_key=whole_number(0, 1000, generator),
            save_projection=coin(generator),
            sparse_rate=whole_number(1, 10, generator) / 50,
        )
        tensors = {}
        for site in chosen:
            count = _num_values(config, site.in_features)
            lengths_I = 3 + random_tensor((site.in_features,), generator)
            tensors[f"{PREFIX}{site.path}.{DIAGONAL}"] = lengths_I
            tensors[f"{PREFIX}{site.path}.{VALUES}"] = random_tensor((count,), generator)
        if config.save_projection:
            for category in sorted({category_of(site.path) for site in chosen}):
                numbers = numbered_layers(site.path for site in chosen)
                members = {numbers[s.path]: s for s in chosen if category_of(s.path) == category}
                right_II = derived_right(members, config.regularization_alpha)
                tensors[RIGHT + category] = right_II
                tensors[PLACES + category] = _drawn_places(config, right_II, generator)
                tensors[SIZE + category] = torch.tensor(right_II.shape)
        options = {"bias": "none", "frod_dropout": 0.0, "modules_to_save": None, "progressbar": True}
        return peft_file("FROD", chosen, {**options, **config.model_dump()}), tensors


def _by_category(tensors: Tensors, sites: Sites) -> dict[str, list[SiteTensors]]:
    """The adapted layers of each category. Raises for a tensor of a category that has none."""
    shared = [name for name in tensors if name.startswith((RIGHT, PLACES, SIZE))]
    categories: dict[str, list[SiteTensors]] = {}
    for found in tensors_by_site(tensors, sites, KEYS, beside=shared):
        categories.setdefault(category_of(found.site.path), []).append(found)
    for name in shared:
        if name.split(".", 2)[2] not in categories:
            raise InvalidTensors(f"{name[:200]!r} is surplus: no adapted layer is of this category")
    return categories


def _right_of_file(tensors: Tensors, category: str, members: Sequence[Site]) -> Tensor:
    size = members[0].in_features
    if any(site.in_features != size for site in members):
        raise InvalidTensors(f"{RIGHT}{category}: layers of {category} have inputs of different sizes")
    return model_tensor(tensors, RIGHT + category, (size, size)).to(torch.float32)


def _projection(
    config: FrodConfig, tensors: Tensors, category: str, members: Sequence[Site]
) -> tuple[Tensor, Tensor]:
    """V and the places of S."""
    if config.save_projection:
        right_II = _right_of_file(tensors, category, members)
        shape = (2, _num_values(config, len(right_II)))
        places_2N = model_tensor(tensors, PLACES + category, shape, (torch.int64,))
        model_tensor(tensors, SIZE + category, (2,), (torch.int64,))
        return right_II, places_2N
    for name in (RIGHT + category, PLACES + category, SIZE + category):
        if name in tensors:
            raise InvalidTensors(f"{name} is surplus: the config says save_projection=false")
    return tensors[derived_name(category, DERIVED_RIGHT)], tensors[derived_name(category, DRAWN)]


def _num_values(config: FrodConfig, in_features: int) -> int:
    """How many values S has."""
    num_cells = in_features * (in_features - 1)
    count = min(int(in_features * in_features * config.sparse_rate), num_cells)
    return max(1, count) if config.sparse_rate > 0 and num_cells > 0 else count


def _part(own: SiteTensors, right: Matrix, places_2N: Tensor) -> Projected:
    size = own.site.in_features
    diagonal_I = own.need(DIAGONAL, (size,)).to(torch.float32) - own.derived[LENGTHS]
    values_N = own.need(VALUES, (places_2N.shape[1],)).to(torch.float32)
    every = torch.arange(size, device=diagonal_I.device)
    return Projected(
        form="sparse",
        core=torch.cat([diagonal_I, values_N]),
        basis=interned_basis(right, _side(own.derived[LEFT]), diagonal_I.device),
        rows_K=torch.cat([every, places_2N[0]]),
        columns_K=torch.cat([every, places_2N[1]]),
    )


def _side(matrix: Tensor) -> Matrix:
    """One side of a basis of one block, laid out row by row, as it is read."""
    block = matrix.unsqueeze(0)
    return Matrix(content_key(block), partial(block.clone, memory_format=torch.contiguous_format))


def _drawn_places(config: FrodConfig, right_II: Tensor, generator: torch.Generator) -> Tensor:
    """Row and column of each value of S; every category's draw goes on where the last one ended."""
    size = len(right_II)
    count, num_cells = _num_values(config, size), size * (size - 1)
    if num_cells > MAX_GRID:
        raise InvalidConfig(
            f"random places in {size} x {size} are not served: the draw is limited to {MAX_GRID} cells; "
            "save with save_projection=true"
        )
    if right_II.is_meta:
        return torch.empty(2, count, dtype=torch.int64, device="meta")
    if not count:
        return torch.empty(2, 0, dtype=torch.int64)
    cells_N = torch.randperm(num_cells, generator=generator)[:count]
    rows_N, columns_N = cells_N // (size - 1), cells_N % (size - 1)
    return torch.stack([rows_N, columns_N + (columns_N >= rows_N)])  # the diagonal has no cell
