"""What several low-rank formats share: which ranks a config allows, and when factors are smaller than ΔW.

Knows no format's tensors.
"""

from __future__ import annotations

from collections.abc import Mapping

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidTensors
from timbre_methods.site_tensors import SiteTensors


def check_rank(
    found: SiteTensors, key: str, rank: int, r: int, rank_pattern: Mapping[str, int] | None
) -> None:
    """The rank is read from the tensor under ``key`` and must be one that the config names.

    Which layer has which is not looked up: a pattern's order does not survive the writing of the file.
    Raises `InvalidTensors`.
    """
    ranks = {r, *(rank_pattern or {}).values()}
    if rank not in ranks:
        raise InvalidTensors(f"{found.name_of(key)}: found rank {rank}, the config says {sorted(ranks)}")


def factors_are_smaller(rank: int, site: Site) -> bool:
    """Whether two factors of this rank need no more memory than the product of them."""
    return rank * (site.in_features + site.out_features) <= site.in_features * site.out_features
