from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from timbre_methods.errors import AdapterMismatch, InvalidConfig, InvalidTensors
from timbre_methods.program import LowRank
from timbre_methods.registry import check_adapter, compile_adapter, method_for

E = 3
RAW: dict[str, Any] = {"peft_type": "LLAVA_MOLE", "r": 2, "lora_alpha": 3, "mode": "sparse"}
SIZES = {"gate": (9, 6), "up": (9, 6), "down": (6, 9)}
BLOCK = "base_model.model.model.layers.0.mlp"
QUERY = "base_model.model.model.layers.0.self_attn.q_proj"


def file(names: tuple[str, ...] = tuple(SIZES), adapter: str = ".default") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {f"{BLOCK}.router.weight": draw(E, 6), f"{BLOCK}.router.bias": draw(E)}
    for name in names:
        out_features, in_features = SIZES[name]
        for e in range(E):
            tensors[f"{BLOCK}.moe_{name}.{e}.lora_A"] = draw(2, in_features)
            tensors[f"{BLOCK}.moe_{name}.{e}.lora_B"] = draw(out_features, 2)
    tensors[f"{QUERY}.lora_A{adapter}.weight"] = draw(2, 6)
    tensors[f"{QUERY}.lora_B{adapter}.weight"] = draw(4, 2)
    return tensors


def expected_row(mode: str, base: Any, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """As the released code computes it, for one token."""
    logits = tensors[f"{BLOCK}.router.weight"].double() @ x + tensors[f"{BLOCK}.router.bias"].double()
    routing = torch.softmax(logits, 0)
    best = max(range(E), key=lambda e: float(routing[e]))

    def layer(name: str, v: Tensor) -> Tensor:
        y: Tensor = base.base(f"{name}_proj", v)
        for e in range(E):
            if f"{BLOCK}.moe_{name}.{e}.lora_A" in tensors:
                a, b = (tensors[f"{BLOCK}.moe_{name}.{e}.lora_{letter}"].double() for letter in "AB")
                factor = routing[e] if mode == "dense" else float(e == best)
                y = y + factor * 1.5 * (b @ (a @ v))
        return y

    return layer("down", base.act(layer("gate", x)) * layer("up", x))


@pytest.mark.parametrize("act", [nn.functional.silu, nn.functional.gelu])
@pytest.mark.parametrize("names", [tuple(SIZES), ("up",), ("gate", "down")])
@pytest.mark.parametrize("mode", ["sparse", "dense"])
def test_an_mlp_is_the_loop_over_tokens_and_experts(
    mode: str, names: tuple[str, ...], act: Any, evaluate: ModuleType, mlp: ModuleType
) -> None:
    base, tensors = mlp.make(evaluate, act), file(names)
    program = compile_adapter({**RAW, "mode": mode}, tensors, base.sites)
    x_TD = torch.randn(12, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = torch.stack([expected_row(mode, base, tensors, x) for x in x_TD])
    torch.testing.assert_close(base.adapted(program, x_TD), wanted, rtol=1e-5, atol=1e-5)


def test_sparse_and_dense_are_two_models(evaluate: ModuleType, mlp: ModuleType) -> None:
    base = mlp.make(evaluate, nn.functional.silu)
    x_TD = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sparse, dense = (
        base.adapted(compile_adapter({**RAW, "mode": mode}, file(), base.sites), x_TD)
        for mode in ("sparse", "dense")
    )
    assert (sparse - dense).abs().max() > 0.1
    with pytest.raises(InvalidConfig, match="mode: Field required"):
        method_for(RAW).parse({key: RAW[key] for key in RAW if key != "mode"})


@pytest.mark.parametrize("adapter", [".default", ""])
def test_attention_has_plain_loras(adapter: str, evaluate: ModuleType, mlp: ModuleType) -> None:
    tensors = file(adapter=adapter)
    program = compile_adapter(RAW, tensors, mlp.make(evaluate, nn.functional.silu).sites)
    (part,) = program.sites["model.layers.0.self_attn.q_proj"]
    assert isinstance(part, LowRank)
    assert torch.equal(part.b_OR, tensors[f"{QUERY}.lora_B{adapter}.weight"] * 1.5)


REFUSED: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "a router of other width": (
        {f"{BLOCK}.router.weight": torch.ones(4, 6)},
        r"router\.weight: found shape \[4, 6\], expected \[3, 6\]",
    ),
    "no router": (
        {f"{BLOCK}.router.weight": None, f"{BLOCK}.router.bias": None},
        r"mlp\.router\.weight is missing, while the file holds its experts",
    ),
    "no bias": ({f"{BLOCK}.router.bias": None}, r"router\.bias is missing"),
    "half an expert": ({f"{BLOCK}.moe_up.1.lora_B": None}, r"moe_up\.1\.lora_B is missing"),
    "a gap": (
        {f"{BLOCK}.moe_up.1.lora_A": None, f"{BLOCK}.moe_up.1.lora_B": None},
        r"moe_up\.1\.lora_A is missing, while the file holds .*moe_up\.0\.lora_A",
    ),
    "fewer experts at one projection": (
        {f"{BLOCK}.moe_up.2.lora_A": None, f"{BLOCK}.moe_up.2.lora_B": None},
        r"moe_up\.2\.lora_A is missing",
    ),
    "too many experts": (
        {f"{BLOCK}.moe_up.256.lora_A": torch.ones(2, 6)},
        r"mlp\.moe_\*: found 257 experts, expected at most 256",
    ),
    "a LoRA beside experts": (
        {f"{BLOCK}.up_proj.lora_A.weight": torch.ones(2, 6)},
        r"up_proj\.lora_A\.weight is surplus: the file has .*\.mlp\.moe_up\.\* for the same layer",
    ),
    "two ways of writing": (
        {f"{QUERY}.lora_A.weight": torch.ones(2, 6)},
        r"q_proj\.lora_A\.weight is surplus",
    ),
    "a copy of the base": (
        {f"{BLOCK}.original_module.up_proj.weight": torch.ones(9, 6)},
        r"original_module.*surplus: .*timbre convert, which has --strip-prefix",
    ),
    "a projector": ({"projector.0.weight": torch.ones(2, 6)}, r"'projector.*--keep"),
    "a vision tower": ({"vit.layers.0.mlp.fc1.weight": torch.ones(2, 6)}, r"'vit.*timbre convert"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tensors_that_do_not_make_a_mixture_are_refused(
    case: str, evaluate: ModuleType, mlp: ModuleType
) -> None:
    changes, message = REFUSED[case]
    tensors = {name: t for name, t in {**file(), **changes}.items() if t is not None}
    with pytest.raises(InvalidTensors, match=message):
        check_adapter(RAW, tensors, mlp.make(evaluate, nn.functional.silu).sites)


def test_a_lora_of_a_projection_below_a_router_is_refused(evaluate: ModuleType, mlp: ModuleType) -> None:
    sites = mlp.make(evaluate, nn.functional.silu).sites
    stem = f"{BLOCK}.up_proj"
    plain = {f"{stem}.lora_A.weight": torch.ones(2, 6), f"{stem}.lora_B.weight": torch.ones(9, 2)}
    with pytest.raises(InvalidTensors, match=r"up_proj\.lora_A\.weight is surplus: below a router"):
        check_adapter(RAW, {**file(("gate",)), **plain}, sites)
    with pytest.raises(InvalidTensors, match=r"router\.weight is surplus: no projection below it"):
        check_adapter(RAW, file(()), sites)


def test_a_base_without_the_block_or_the_projection_is_refused(evaluate: ModuleType, mlp: ModuleType) -> None:
    sites = mlp.make(evaluate, nn.functional.silu).sites
    for missing, message in (
        ("model.layers.0.mlp", r"router\.weight.*'model\.layers\.0\.mlp' of this base is no block"),
        ("model.layers.0.mlp.up_proj", r"moe_up\.0\.lora_A: this base has no .*mlp\.up_proj'"),
    ):
        rest = {path: site for path, site in sites.items() if path != missing}
        with pytest.raises(AdapterMismatch, match=message):
            compile_adapter(RAW, file(), rest)
