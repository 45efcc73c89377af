from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidConfig, InvalidTensors, UnsupportedMethod
from timbre_methods.program import LowRank
from timbre_methods.registry import check_adapter, compile_adapter, method_for

E = 3
UP, QUERY = "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"
STEM = "loramoe.layers.0.mlp.up_proj"
RAW: dict[str, Any] = {
    "bias": "none",
    "peft_type": "LORAMOE",
    "r": 2,
    "lora_alpha": 5,
    "lora_dropout": 0.05,
    "target_modules": ["up_proj"],
    "routing_strategy": "loramoe",
    "num_experts": E,
}
GENERATOR = torch.Generator().manual_seed(0)
SITE = Site(UP, torch.randn(5, 4, generator=GENERATOR), torch.randn(5, generator=GENERATOR))
SITES = {QUERY: Site(QUERY, torch.randn(3, 4, generator=GENERATOR), None), UP: SITE}
FILE = {f"{STEM}.moe_gate.weight": torch.randn(E, 4, generator=GENERATOR)}
for number in range(E):
    FILE[f"{STEM}.experts.{number}.lora_A.weight"] = torch.randn(2, 4, generator=GENERATOR)
    FILE[f"{STEM}.experts.{number}.lora_B.weight"] = torch.randn(5, 2, generator=GENERATOR)
X_TI = torch.randn(9, 4, generator=GENERATOR, dtype=torch.float64)


def expected_row(x: Tensor, scale: float) -> Tensor:
    """As the released code computes it: all experts, one after the other."""
    probabilities = torch.softmax(FILE[f"{STEM}.moe_gate.weight"].double() @ x, 0)
    assert SITE.bias_O is not None
    y = SITE.weight_OI.double() @ x + SITE.bias_O.double()
    for e in range(E):
        a, b = (FILE[f"{STEM}.experts.{e}.lora_{letter}.weight"].double() for letter in "AB")
        y = y + probabilities[e] * scale * (b @ (a @ x))
    return y


@pytest.mark.parametrize(
    ("options", "scale"), [({}, 2.5), ({"use_rslora": True}, 5 / 2**0.5)], ids=["lora", "rslora"]
)
def test_all_experts_act_on_each_token(options: dict[str, Any], scale: float, evaluate: ModuleType) -> None:
    parts = compile_adapter({**RAW, **options}, FILE, SITES).sites[UP]
    wanted = torch.stack([expected_row(x, scale) for x in X_TI])
    torch.testing.assert_close(evaluate.run_parts(SITE, parts, X_TI), wanted, rtol=1e-5, atol=1e-5)


def test_attention_may_have_a_plain_lora() -> None:
    stem = "loramoe.layers.0.self_attn.q_proj"
    plain = {f"{stem}.lora_A.weight": torch.ones(2, 4), f"{stem}.lora_B.weight": torch.ones(3, 2)}
    program = compile_adapter(RAW, {**FILE, **plain}, SITES)
    assert list(program.sites) == [QUERY, UP]
    (part,) = program.sites[QUERY]
    assert isinstance(part, LowRank)
    assert torch.equal(part.b_OR, torch.full((3, 2), 2.5))


REFUSED: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "no router": ({f"{STEM}.moe_gate.weight": None}, r"moe_gate\.weight is missing"),
    "a router of other width": ({f"{STEM}.moe_gate.weight": torch.ones(4, 4)}, r"found shape \[4, 4\]"),
    "half an expert": ({f"{STEM}.experts.2.lora_A.weight": None}, r"experts\.2\.lora_A\.weight is missing"),
    "an expert too many": (
        {f"{STEM}.experts.3.lora_A.weight": torch.ones(2, 4)},
        r"experts\.3\.lora_A\.weight is surplus: the config says num_experts=3",
    ),
    "a LoRA beside experts": (
        {f"{STEM}.lora_A.weight": torch.ones(2, 4)},
        r"up_proj\.moe_gate\.weight is surplus: a layer has experts and a router, or one LoRA",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tensors_that_do_not_make_a_mixture_are_refused(case: str) -> None:
    changes, message = REFUSED[case]
    tensors = {name: t for name, t in {**FILE, **changes}.items() if t is not None}
    with pytest.raises(InvalidTensors, match=message):
        check_adapter(RAW, tensors, SITES)


def test_options_that_cannot_be_honoured_are_refused() -> None:
    parse = method_for(RAW).parse
    with pytest.raises(InvalidConfig, match="num_experts: Field required"):
        parse({key: RAW[key] for key in RAW if key != "num_experts"})
    with pytest.raises(InvalidConfig, match="routing_strategy"):
        parse({**RAW, "routing_strategy": "mola"})
    with pytest.raises(UnsupportedMethod, match="'top_k' is on"):
        parse({**RAW, "top_k": 2})
    with pytest.raises(UnsupportedMethod, match=r"'use_dora' is on .*no magnitudes"):
        parse({**RAW, "use_dora": True})
