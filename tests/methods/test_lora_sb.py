from __future__ import annotations

from collections.abc import Callable

import torch

from timbre_methods.contract import Site
from timbre_methods.program import LowRank
from timbre_methods.registry import method_for

STEM = "base_model.model.model.layers.0.self_attn.q_proj"


def test_a_core_is_folded_into_b_and_its_start_is_not_taken_off(site: Callable[..., Site]) -> None:
    """The numbers of the formula itself are in test_lora_xs.py, for both methods."""
    raw = {"peft_type": "LORA_SB", "r": 2, "lora_alpha": 1}
    generator = torch.Generator().manual_seed(4)
    a_RI, b_OR, r_RR = (torch.randn(shape, generator=generator) for shape in ((2, 5), (6, 2), (2, 2)))
    given = {
        f"{STEM}.lora_A.weight": a_RI.half(),
        f"{STEM}.lora_B.weight": b_OR,
        f"{STEM}_lora_latent_mapping.weight": r_RR,
    }
    method, base = method_for(raw), site()
    (part,) = method.compile(method.parse(raw), given, {base.path: base}).sites[base.path]
    assert isinstance(part, LowRank)
    assert torch.equal(part.a_RI, a_RI.half().float())
    torch.testing.assert_close(part.b_OR, 0.5 * (b_OR.double() @ r_RR.double()).float())
