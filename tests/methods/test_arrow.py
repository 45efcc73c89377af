from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import ArrowConfig, LoraConfig
from peft.tuners.lora.arrow import ArrowLoraLinearLayer, create_arrow_model
from torch import Tensor, nn

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidConfig, InvalidTensors, UnsupportedMethod
from timbre_methods.registry import check_adapter, compile_adapter, derive, method_for

LAYERS = ["q_proj", "k_proj", "v_proj"]
STEM = "base_model.model.model.layers.0.self_attn.q_proj."
NAME = "derived.model.layers.0.self_attn.q_proj.arrow_prototypes"
RAW: dict[str, Any] = {
    "peft_type": "ARROW",
    "scales": [2.0, 0.5, 1.0],
    "top_k": 2,
    "router_temperature": 0.7,
    "prototypes": "svd",
}
OF_PEFT = {"prototypes": "peft", "rng_seed": 42}


def joined(folders: list[tuple[str, Any]]) -> dict[str, Tensor]:
    """One file of many: each adapter's tensors under its own name and number."""
    return {
        key.replace(".lora_", f".{name}.lora_"): tensor
        for name, written in folders
        for key, tensor in written.tensors.items()
    }


@pytest.mark.parametrize("num_general", [0, 2])
def test_arrow_gives_the_logits_of_peft(
    llama: nn.Module,
    write_with_peft: Callable[..., Any],
    timbre_logits: Callable[..., Tensor],
    token_ids: Tensor,
    quiet: Any,
    num_general: int,
) -> None:
    def lora(alpha: int) -> Any:
        config = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=alpha, target_modules=LAYERS)
        written = write_with_peft(llama, config)
        noise = torch.Generator().manual_seed(alpha)
        for tensor in written.tensors.values():
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=noise))
        save(written.folder, written.tensors)
        return written

    experts, general = [lora(alpha) for alpha in (2, 3, 5)], [lora(11 + g) for g in range(num_general)]
    options = ArrowConfig(top_k=2, router_temperature=0.7, use_gks=num_general > 0, rng_seed=42)
    with quiet(), torch.no_grad():
        wrapped = create_arrow_model(
            copy.deepcopy(llama),
            [str(each.folder) for each in experts],
            options,
            [str(each.folder) for each in general] or None,
        ).eval()
        expected = wrapped(token_ids).logits
        base = llama(token_ids).logits
    assert (expected - base).abs().max() > 0.05
    named = [(f"experts.{e}", each) for e, each in enumerate(experts)]
    named += [(f"general.{g}", each) for g, each in enumerate(general)]
    config = {**RAW, **OF_PEFT, "scales": [1.0, 1.5, 2.5], "num_general": num_general}

    actual = timbre_logits(llama, type(experts[0])(config, joined(named), Path()), token_ids)

    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def save(folder: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(tensors, folder / "adapter_model.safetensors")


def tensors(num_general: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    names = [f"experts.{e}" for e in range(3)] + [f"general.{g}" for g in range(num_general)]
    shapes = {"lora_A.weight": (2, 5), "lora_B.weight": (6, 2)}
    return {
        f"{STEM}{name}.{key}": torch.randn(shape, generator=generator)
        for name in names
        for key, shape in shapes.items()
    }


def test_the_power_iteration_has_pefts_bits(site: Callable[..., Site]) -> None:
    base, given = site(), tensors()
    options = ArrowConfig(rng_seed=42)
    options.task_adapter_names, options.gks_adapter_names = [], []
    module = ArrowLoraLinearLayer(5, options)
    found = derive({**RAW, **OF_PEFT}, given, {base.path: base})[NAME]
    for e, prototype in enumerate(found):
        a, b = (given[f"{STEM}experts.{e}.lora_{side}.weight"] for side in "AB")
        assert torch.equal(prototype, module.top_right_singular_vec_from_BA(a, b))


@pytest.mark.parametrize("options", [{}, OF_PEFT], ids=["svd", "peft"])
@pytest.mark.parametrize("empty", ["AB", "B"])
def test_an_expert_that_does_nothing_at_a_layer_takes_no_row(
    site: Callable[..., Site], evaluate: Any, empty: str, options: dict[str, Any]
) -> None:
    """Experts that were trained on different layers are padded with zeros."""
    base, given = site(), tensors()
    for side in empty:
        given[f"{STEM}experts.2.lora_{side}.weight"].zero_()
    derived = derive({**RAW, **options}, given, {base.path: base})
    program = compile_adapter({**RAW, **options}, {**given, **derived}, {base.path: base})
    x_TI = torch.randn(64, 5, generator=torch.Generator().manual_seed(1))
    (part,) = program.sites[base.path]

    gates_TE = evaluate.gates.gates(part.router, x_TI)

    assert torch.equal(part.router.weight_EI[2], torch.zeros(5))
    assert torch.equal(gates_TE[:, 2], torch.zeros(64))
    assert (gates_TE[:, :2] > 0).all()


@pytest.mark.parametrize("num_general", [0, 2])
def test_exact_prototypes_are_the_first_right_singular_vectors(
    site: Callable[..., Site], evaluate: Any, num_general: int
) -> None:
    """Token by token; the same for both signs of a prototype."""
    base, given = site(), tensors(num_general)
    raw, deltas, prototypes = {**RAW, "num_general": num_general}, [], []
    for e in range(3):
        pair = []
        for side in "AB":
            own = given[f"{STEM}experts.{e}.lora_{side}.weight"].double()
            for g in range(num_general):
                own = own - given[f"{STEM}general.{g}.lora_{side}.weight"].double() / num_general
            pair.append(own)
        deltas.append(pair[1] @ pair[0])
        prototypes.append(torch.linalg.svd(deltas[-1]).Vh[0])
    x_TI = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = []
    for x in x_TI:
        near = [abs(float(v @ x)) for v in prototypes]
        kept = sorted(range(3), key=lambda e: -near[e])[:2]
        total, y = sum(math.exp(near[e] / 0.7) for e in kept), base.weight_OI.double() @ x
        for e in kept:
            y = y + math.exp(near[e] / 0.7) / total * RAW["scales"][e] * (deltas[e] @ x)
        expected.append(y)

    derived = derive(raw, given, {base.path: base})
    for sign in (1, -1):
        program = compile_adapter(raw, {**given, NAME: sign * derived[NAME]}, {base.path: base})
        actual = evaluate.run_parts(base, program.sites[base.path], x_TI)
        torch.testing.assert_close(actual, torch.stack(expected), rtol=0, atol=1e-5)


def test_what_does_not_fit_is_refused(site: Callable[..., Site]) -> None:
    base = site()

    def check(changes: dict[str, Any], given: dict[str, Tensor]) -> None:
        check_adapter({**RAW, **changes}, given, {base.path: base})

    with pytest.raises(InvalidConfig, match="top_k: found 4, expected at most 3"):
        check({"top_k": 4}, tensors())
    for temperature in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InvalidConfig, match="router_temperature"):
            check({"router_temperature": temperature}, tensors())
    with pytest.raises(InvalidConfig, match="rng_seed: found None with prototypes='peft'"):
        check({"prototypes": "peft"}, tensors())
    with pytest.raises(InvalidConfig, match="rng_seed: found 3 with prototypes='svd'"):
        check({"rng_seed": 3}, tensors())
    with pytest.raises(InvalidConfig, match=r"scales: .*at most 256 items"):
        check({"scales": [1.0] * 257}, tensors())
    with pytest.raises(InvalidTensors, match=r"general\.0\.lora_A\.weight is missing"):
        check({"num_general": 1}, tensors())
    with pytest.raises(InvalidTensors, match=r"general\.0\.lora_A\.weight' is surplus"):
        check({}, tensors(num_general=1))
    with pytest.raises(UnsupportedMethod, match=r"'use_gks' is on .*write num_general"):
        method_for(RAW).parse({**RAW, "use_gks": True})


def test_general_experts_need_one_rank_for_all(site: Callable[..., Site]) -> None:
    base, given = site(), tensors(num_general=1)
    given[f"{STEM}general.0.lora_A.weight"] = torch.ones(3, 5)
    given[f"{STEM}general.0.lora_B.weight"] = torch.ones(6, 3)
    with pytest.raises(InvalidTensors, match="ranks 3 and 2, expected one rank for all"):
        check_adapter({**RAW, "num_general": 1}, given, {base.path: base})


def test_experts_that_lose_their_numbers_to_the_general_ones_are_refused(site: Callable[..., Site]) -> None:
    base = site()
    raw = {**RAW, "num_general": 1}
    given = {name: torch.full_like(t, -3e38 if "general" in name else 3e38) for name, t in tensors(1).items()}
    check_adapter(raw, given, {base.path: base})
    with pytest.raises(InvalidTensors, match="an expert without the mean of the general ones comes to more"):
        derive(raw, given, {base.path: base})
