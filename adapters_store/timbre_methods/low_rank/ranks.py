"""What several low-rank formats share: which ranks a config allows, and when factors are smaller than ΔW.

Knows no format's tensors.
"""

from __future__ import annotations

from collections.abc import Mapping

from timbre_methods.contract import Site
from timbre_methods.named_sizes import check_named_size
from timbre_methods.site_tensors import SiteTensors


def check_rank(
    found: SiteTensors, key: str, rank: int, r: int, rank_pattern: Mapping[str, int] | None
) -> None:
    """The rank is read from the tensor under ``key`` and must be one that the config names.

    Raises `InvalidTensors`.
    """
    check_named_size(found, key, rank, f"rank {rank}", r, rank_pattern)


def factors_are_smaller(rank: int, site: Site) -> bool:
    """Whether two factors of this rank need no more memory than the product of them."""
    return rank * (site.in_features + site.out_features) <= site.in_features * site.out_features
