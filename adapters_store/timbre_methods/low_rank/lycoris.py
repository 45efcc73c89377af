"""What PEFT's LOHA and LOKR share: ``s = alpha / r``, and patterns that give some layers their own of both.

Reads no tensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from timbre_methods.config import Finite, PeftConfig, Rank, RankPattern, read_config
from timbre_methods.contract import Site
from timbre_methods.patterns import PathPatterns


class LycorisConfig(PeftConfig):
    """The fields of both that matter at inference. The defaults are PEFT's."""

    inert = frozenset({"init_weights", "module_dropout", "rank_dropout", "use_effective_conv2d"})

    r: Rank = 8
    alpha: Finite = 8.0
    rank_pattern: RankPattern | None = None
    alpha_pattern: dict[str, Finite] | None = None


C = TypeVar("C", bound=LycorisConfig)


def read_lycoris_config(model: type[C], raw_config: Mapping[str, Any]) -> C:
    """The config of one of the two. Raises as `Method.parse` does."""
    config = read_config(model, raw_config)
    Patterns(config)
    return config


class Patterns:
    """Alpha and rank of each layer, looked up as PEFT does when it loads the file."""

    def __init__(self, config: LycorisConfig) -> None:
        self._config = config
        self._alphas = PathPatterns("alpha_pattern", config.alpha_pattern or {})
        self._ranks = PathPatterns("rank_pattern", config.rank_pattern or {})

    def rank(self, path: str) -> int:
        """The rank that the config gives a layer; the tensors' own is better where they show it."""
        rank = self._ranks.first(path)
        return self._config.r if rank is None else int(rank)

    def scale(self, path: str, rank: int) -> float:
        """``s`` of one layer."""
        alpha = self._alphas.first(path)
        return (self._config.alpha if alpha is None else alpha) / rank


def reference_scale(config: LycorisConfig, site: Site) -> float:
    """The scale as PEFT computes it. For references only: nowhere else does `re` see a key from a file."""

    def looked_up(pattern: Mapping[str, float] | None, default: float) -> float:
        keys = (key for key in pattern or {} if re.match(rf"(.*\.)?({key})$", site.path))
        return next(((pattern or {})[key] for key in keys), default)

    return looked_up(config.alpha_pattern, config.alpha) / looked_up(config.rank_pattern, config.r)


def lycoris_options(
    r: int, alpha: int, ranks: Mapping[str, int], alphas: Mapping[str, float]
) -> dict[str, Any]:
    """The options of a valid config that both write."""
    return {
        "r": r,
        "alpha": alpha,
        "rank_pattern": dict(ranks),
        "alpha_pattern": dict(alphas),
        "rank_dropout": 0.0,
        "module_dropout": 0.1,
        "init_weights": True,
        "use_effective_conv2d": False,
        "modules_to_save": None,
    }
