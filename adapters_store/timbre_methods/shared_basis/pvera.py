"""PVeRA, as PEFT saves it: VeRA whose middle has a mean and a log-variance, of which the mean is served.

A [2 R, largest in] and λ_d [2 R] hold the mean first. Sampling at inference depends on how often a layer
was called before, so it is refused.

Paper: arXiv 2512.07703.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from timbre_methods.config import read_config
from timbre_methods.shared_basis.vera import ProjectionConfig, VectorsBetweenMatrices


class PveraConfig(ProjectionConfig):
    inert = frozenset({"d_initial", "generator_seed", "init_weights", "pvera_dropout"})
    reasons: ClassVar[Mapping[str, str]] = {
        "sample_at_inference": "an answer would depend on how often the layers ran before; switch it off"
    }


class Pvera(VectorsBetweenMatrices):
    name = "pvera"
    paper = "arXiv 2512.07703"
    stored = "λ_b [out], λ_d [2 r]; A [2 r, max in], B [max out, r] once, or not"
    regenerated = "A and B, from the seed, with save_projection=false"
    checked_against = "PEFT"
    halves = 2

    def parse(self, raw_config: Mapping[str, Any]) -> PveraConfig:
        return read_config(PveraConfig, raw_config)
