"""AdaMSS, as PEFT saves it: ``y[rows_k] = (W x + b)[rows_k] + B_k A_k N x'`` for each cluster k of the rows.

x' is x, with a 1 after it where the layer has a bias, so the last column of N trains a bias. Which rows
belong to which cluster is not in the file: PEFT clusters the rows of the left factor of a seeded random SVD
of ``[W b]`` with k-means. `derive` does the same with scikit-learn and compares the sizes of the clusters
with the file. Equal sizes do not prove equal clusters, unequal ones are refused.

All clusters together are one low-rank change whose B has its rows in the base's order; its inner size is that
of N, or the sum of the clusters' ranks where that is smaller.

Legend: T tokens, I in features, O out features, J in features with the bias's column, R inner size.

Paper: AdaMSS, NeurIPS 2025, as PEFT has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from timbre_methods.config import PeftConfig, Rank, Seed, read_config, shown
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.decompositions import on_cpu, seeded_svd_lowrank
from timbre_methods.errors import InvalidTensors, UnsupportedMethod
from timbre_methods.examples import chosen_sites, peft_file, random_tensor, whole_number
from timbre_methods.program import AdapterProgram, Diagonal, LowRank, Part
from timbre_methods.site_tensors import PREFIX, SiteTensors, derived_name, tensors_by_site, tensors_of_site

SHRINK, A, B = "adamss_newB", "adamss_A.", "adamss_B."
ROWS = "rows"
"""The base's rows, cluster after cluster."""

KMEANS_SEED = 123456789
KMEANS_STEPS = 10
SVD_STEPS = 2


class AdamssConfig(PeftConfig):
    """The fields that matter at inference. The defaults are PEFT's."""

    inert = frozenset(
        {
            "asa_importance_beta",
            "asa_schedule_exponent",
            "asa_target_subspaces",
            "asa_uncertainty_beta",
            "final_warmup",
            "init_warmup",
            "init_weights",
            "mask_interval",
            "svd_threshold",
            "use_asa",
            "use_dynamic_rank",
        }
    )

    r: Rank = 100
    num_subspaces: Annotated[int, Field(ge=1, le=64)] = 5
    subspace_rank: Rank = 1
    random_seed: Seed = 0


class Adamss(Method[AdamssConfig]):
    name = "adamss"
    paper = "AdaMSS, NeurIPS 2025"
    stored = "N [r, in]; A [rank, r], B [rows, rank] for each cluster of rows"
    regenerated = "which rows each cluster has, from the base"
    checked_against = "PEFT"

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "ADAMSS"

    def parse(self, raw_config: Mapping[str, Any]) -> AdamssConfig:
        return read_config(AdamssConfig, raw_config)

    def derive(self, config: AdamssConfig, tensors: Tensors, sites: Sites) -> dict[str, Tensor]:
        derived = {}
        for found in tensors_by_site(tensors, sites, _keys(config)):
            rows_O, sizes = _partition(config, found.site)
            stored = [len(b) for _, b in _clusters(config, found)]
            if sizes and sizes != stored:
                raise InvalidTensors(
                    f"{found.name_of(B)[:-1]}: found clusters of {shown(stored)} rows, expected "
                    f"{shown(sizes)} on this base: trained on another one, or with another scikit-learn"
                )
            derived[derived_name(found.site.path, ROWS)] = rows_O
        return derived

    def compile(self, config: AdamssConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        return AdapterProgram(
            {
                found.site.path: _parts(config, found)
                for found in tensors_by_site(tensors, sites, _keys(config))
            }
        )

    def reference(self, config: AdamssConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        bias_O = None if site.bias_O is None else site.bias_O.to(x_TI.dtype)
        y_TO = torch.nn.functional.linear(x_TI, site.weight_OI.to(x_TI.dtype), bias_O)
        stored = tensors_of_site(tensors, site, _keys(config))
        own = {key: tensor.to(x_TI.dtype) for key, tensor in stored.items()}
        if own:
            wide_TJ = x_TI if bias_O is None else torch.cat([x_TI, torch.ones_like(x_TI[:, :1])], dim=1)
            z_TR = wide_TJ @ own[SHRINK].T
            remaining = tensors[derived_name(site.path, ROWS)]
            for number in range(min(config.num_subspaces, site.out_features)):
                change = z_TR @ own[f"{A}{number}"].T @ own[f"{B}{number}"].T
                y_TO[:, remaining[: change.shape[1]]] += change
                remaining = remaining[change.shape[1] :]
        return y_TO

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        chosen = chosen_sites(sites, generator)
        config = AdamssConfig(
            r=whole_number(3, 14, generator),
            num_subspaces=whole_number(1, 3, generator),
            subspace_rank=whole_number(1, 3, generator),
            random_seed=whole_number(0, 100, generator),
        )
        tensors = {}
        for site in chosen:
            stem = PREFIX + site.path
            columns, rank = _sizes(config, site)
            tensors[f"{stem}.{SHRINK}"] = random_tensor((rank, columns), generator)
            for number, size in enumerate(_partition(config, site)[1]):
                inner = min(size, config.subspace_rank)
                tensors[f"{stem}.{A}{number}"] = random_tensor((inner, rank), generator)
                tensors[f"{stem}.{B}{number}"] = random_tensor((size, inner), generator)
        options = {"init_weights": "orthogonal", "modules_to_save": None, "use_asa": False}
        return peft_file("ADAMSS", chosen, {**options, **config.model_dump()}), tensors


def _keys(config: AdamssConfig) -> frozenset[str]:
    return frozenset({SHRINK, *(f"{key}{n}" for key in (A, B) for n in range(config.num_subspaces))})


def _sizes(config: AdamssConfig, site: Site) -> tuple[int, int]:
    """Columns of N and its rank."""
    columns = site.in_features + (site.bias_O is not None)
    return columns, min(config.r, site.out_features, columns)


def _partition(config: AdamssConfig, site: Site) -> tuple[Tensor, list[int]]:
    """The rows, cluster after cluster, and the clusters' sizes; on the meta device no sizes.

    Raises `UnsupportedMethod` without scikit-learn.
    """
    try:
        from sklearn.cluster import KMeans  # type: ignore[import-untyped]
    except ImportError as error:
        raise UnsupportedMethod(
            "ADAMSS: the clusters of rows are not in the file, and finding them again needs scikit-learn, "
            "which this server lacks: pip install 'timbre[adamss]'"
        ) from error
    if site.weight_OI.is_meta:
        return torch.empty(site.out_features, dtype=torch.int64, device="meta"), []
    weight_OJ = on_cpu(site.weight_OI)
    if site.bias_O is not None:
        weight_OJ = torch.cat([weight_OJ, on_cpu(site.bias_O).unsqueeze(1)], dim=1)
    _, rank = _sizes(config, site)
    points_OR = seeded_svd_lowrank(weight_OJ, rank, SVD_STEPS, config.random_seed).u_OR.contiguous()
    count = min(config.num_subspaces, site.out_features)
    kmeans = KMeans(count, init="random", n_init=1, max_iter=KMEANS_STEPS, random_state=KMEANS_SEED)
    cluster_O = torch.from_numpy(kmeans.fit_predict(points_OR.numpy())).long()
    return torch.argsort(cluster_O, stable=True), torch.bincount(cluster_O, minlength=count).tolist()


def _clusters(config: AdamssConfig, found: SiteTensors) -> list[tuple[Tensor, Tensor]]:
    """A [rank, R] and B [rows, rank] of each cluster."""
    site = found.site
    _, inner = _sizes(config, site)
    count = min(config.num_subspaces, site.out_features)
    clusters = []
    for number in range(count):
        a = found.need(f"{A}{number}", ("rank", inner))
        if len(a) > config.subspace_rank:
            raise InvalidTensors(
                f"{found.name_of(A)}{number}: found rank {len(a)}, "
                f"the config says at most {config.subspace_rank}"
            )
        clusters.append((a, found.need(f"{B}{number}", ("rows", len(a)))))
    num_rows = sum(len(b) for _, b in clusters)
    if num_rows != site.out_features:
        raise InvalidTensors(
            f"{found.name_of(B)[:-1]}: found {num_rows} rows in all clusters, expected {site.out_features}"
        )
    for number in range(count, config.num_subspaces):
        for key in (A, B):
            if f"{key}{number}" in found.tensors:
                raise InvalidTensors(
                    f"{found.name_of(key)}{number} is surplus: {count} rows have {count} clusters"
                )
    return clusters


def _parts(config: AdamssConfig, found: SiteTensors) -> tuple[Part, ...]:
    columns, inner = _sizes(config, found.site)
    shrink_RJ = found.need(SHRINK, (inner, columns)).to(torch.float32)
    clusters = [(a.to(torch.float32), b.to(torch.float32)) for a, b in _clusters(config, found)]
    if sum(len(a) for a, _ in clusters) < inner:
        shrink_RJ = torch.cat([a for a, _ in clusters]) @ shrink_RJ
        stacked_OR = torch.block_diag(*(b for _, b in clusters))  # type: ignore[no-untyped-call]
    else:
        stacked_OR = torch.cat([b @ a for a, b in clusters])
    b_OR = torch.empty_like(stacked_OR).index_copy(0, found.derived[ROWS], stacked_OR)
    factors = LowRank(a_RI=shrink_RJ[:, : found.site.in_features].clone(), b_OR=b_OR)
    if found.site.bias_O is None:
        return (factors,)
    shift_O = b_OR @ shrink_RJ[:, -1]
    return factors, Diagonal(side="output", gain=torch.ones_like(shift_O), shift=shift_O)
