from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from timbre_methods.contract import Site
from timbre_methods.errors import AdapterMismatch, InvalidConfig, InvalidTensors, UnsupportedMethod
from timbre_methods.registry import check_adapter, compile_adapter, method_for

E = 3
PATH = "model.layers.0.self_attn.q_proj"
STEM = "mola.layers.0.self_attn.q_proj"
RAW: dict[str, Any] = {
    "bias": "none",
    "peft_type": "MOLA",
    "r": 2,
    "lora_alpha": 5,
    "lora_dropout": 0.05,
    "target_modules": ["q_proj"],
    "routing_strategy": "mola",
    "num_experts": E,
    "top_k": 2,
}
GENERATOR = torch.Generator().manual_seed(0)
SITE = Site(PATH, torch.randn(5, 4, generator=GENERATOR), torch.randn(5, generator=GENERATOR))
FILE = {f"{STEM}.moe_gate.weight": torch.randn(E, 4, generator=GENERATOR)}
for number in range(E):
    FILE[f"{STEM}.experts.{number}.lora_A.weight"] = torch.randn(2, 4, generator=GENERATOR)
    FILE[f"{STEM}.experts.{number}.lora_B.weight"] = torch.randn(5, 2, generator=GENERATOR)
X_TI = torch.randn(9, 4, generator=GENERATOR, dtype=torch.float64)


def expected_row(x: Tensor, top_k: int, scale: float) -> Tensor:
    """As the released code computes it, one expert after the other."""
    probabilities = torch.softmax(FILE[f"{STEM}.moe_gate.weight"].double() @ x, 0)
    kept = sorted(range(E), key=lambda e: -float(probabilities[e]))[:top_k]
    assert SITE.bias_O is not None
    y = SITE.weight_OI.double() @ x + SITE.bias_O.double()
    for e in kept:
        a, b = (FILE[f"{STEM}.experts.{e}.lora_{letter}.weight"].double() for letter in "AB")
        y = y + probabilities[e] / sum(probabilities[other] for other in kept) * scale * (b @ (a @ x))
    return y


@pytest.mark.parametrize(
    ("options", "top_k", "scale"),
    [({}, 2, 2.5), ({"top_k": 1}, 1, 2.5), ({"top_k": 3}, 3, 2.5), ({"use_rslora": True}, 2, 5 / 2**0.5)],
    ids=["top 2", "top 1", "all", "rslora"],
)
def test_a_projection_is_the_loop_over_tokens_and_experts(
    options: dict[str, Any], top_k: int, scale: float, evaluate: ModuleType
) -> None:
    parts = compile_adapter({**RAW, **options}, FILE, {PATH: SITE}).sites[PATH]
    wanted = torch.stack([expected_row(x, top_k, scale) for x in X_TI])
    torch.testing.assert_close(evaluate.run_parts(SITE, parts, X_TI), wanted, rtol=1e-5, atol=1e-5)


REFUSED: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "no router": ({f"{STEM}.moe_gate.weight": None}, r"moe_gate\.weight is missing"),
    "a router of other width": ({f"{STEM}.moe_gate.weight": torch.ones(2, 4)}, r"found shape \[2, 4\]"),
    "a gap": (
        {f"{STEM}.experts.1.lora_A.weight": None, f"{STEM}.experts.1.lora_B.weight": None},
        r"experts\.1\.lora_A\.weight is missing, while the file holds mola\.layers\.0",
    ),
    "an expert too many": (
        {f"{STEM}.experts.3.lora_A.weight": torch.ones(2, 4)},
        r"experts\.3\.lora_A\.weight is surplus: each layer has a router and 3 experts",
    ),
    "a rank that the config does not say": (
        {f"{STEM}.experts.1.lora_A.weight": torch.ones(3, 4)},
        r"found shape \[3, 4\], expected \[2, 4\]",
    ),
    "a plain LoRA": ({f"{STEM}.lora_A.weight": torch.ones(2, 4)}, r"q_proj\.lora_A\.weight is surplus"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tensors_that_do_not_make_a_mixture_are_refused(case: str) -> None:
    changes, message = REFUSED[case]
    tensors = {name: t for name, t in {**FILE, **changes}.items() if t is not None}
    with pytest.raises(InvalidTensors, match=message):
        check_adapter(RAW, tensors, {PATH: SITE})


def test_the_router_of_a_whole_mlp_is_mixloras() -> None:
    tensors = {**FILE, "mola.layers.0.mlp.moe_gate.weight": torch.ones(E, 4)}
    with pytest.raises(AdapterMismatch, match=r"this base has no linear layer 'model\.layers\.0\.mlp'"):
        check_adapter(RAW, tensors, {PATH: SITE})


def test_options_that_cannot_be_honoured_are_refused() -> None:
    parse = method_for(RAW).parse
    with pytest.raises(InvalidConfig, match="top_k: found 4, expected at most 3, the number of experts"):
        parse({**RAW, "top_k": 4})
    with pytest.raises(InvalidConfig, match="num_experts"):
        parse({**RAW, "num_experts": 257})
    with pytest.raises(InvalidConfig, match="routing_strategy"):
        parse({**RAW, "routing_strategy": "mixlora"})
    with pytest.raises(UnsupportedMethod, match=r"'use_dora' is on .*no magnitudes"):
        parse({**RAW, "use_dora": True})
    with pytest.raises(InvalidConfig, match="lora_alpha: Field required"):
        parse({key: RAW[key] for key in RAW if key != "lora_alpha"})
