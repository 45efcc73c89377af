from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from timbre_methods.contract import Site
from timbre_methods.errors import AdapterMismatch, InvalidConfig, InvalidTensors, UnsupportedMethod
from timbre_methods.program import LowRank
from timbre_methods.registry import check_adapter, compile_adapter, method_for

E = 4
RAW: dict[str, Any] = {
    "bias": "none",
    "peft_type": "MIXLORA",
    "r": 2,
    "lora_alpha": 3,
    "lora_dropout": 0.05,
    "target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"],
    "routing_strategy": "mixlora",
    "num_experts": E,
    "top_k": 2,
    "base_model_name_or_path": "a/base",
    "task_type": "CAUSAL_LM",
}
DYNAMIC = {**{key: RAW[key] for key in RAW if key != "top_k"}, "routing_strategy": "mixlora-dynamic"}
SIZES = {"gate_proj": (9, 6), "up_proj": (9, 6), "down_proj": (6, 9)}
GATE = "mixlora.layers.0.mlp.moe_gate.weight"


def file(rank: int = 2, names: tuple[str, ...] = tuple(SIZES), attention_rank: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {GATE: draw(E, 6)}
    for name in names:
        out_features, in_features = SIZES[name]
        for e in range(E):
            stem = f"mixlora.layers.0.mlp.{name}.experts.{e}"
            tensors[f"{stem}.lora_A.weight"] = draw(rank, in_features)
            tensors[f"{stem}.lora_B.weight"] = draw(out_features, rank)
    tensors["mixlora.layers.0.self_attn.q_proj.lora_A.weight"] = draw(attention_rank, 6)
    tensors["mixlora.layers.0.self_attn.q_proj.lora_B.weight"] = draw(4, attention_rank)
    return tensors


def expert_output(base: Any, tensors: dict[str, Tensor], e: int, scale: float, x: Tensor) -> Tensor:
    """One expert for one row, as the released code computes it."""

    def layer(name: str, v: Tensor) -> Tensor:
        stem = f"mixlora.layers.0.mlp.{name}.experts.{e}"
        y: Tensor = base.base(name, v)
        if f"{stem}.lora_A.weight" in tensors:
            a, b = (tensors[f"{stem}.lora_{letter}.weight"].double() for letter in "AB")
            y = y + scale * (b @ (a @ v))
        return y

    hidden = base.act(layer("gate_proj", x)) * layer("up_proj", x)
    return layer("down_proj", hidden)


def expected(
    raw: dict[str, Any], base: Any, tensors: dict[str, Tensor], scale: float, x_TD: Tensor
) -> Tensor:
    rows = []
    for x in x_TD:
        probabilities = torch.softmax(tensors[GATE].double() @ x, 0)
        order = sorted(range(E), key=lambda e: -float(probabilities[e]))
        if raw["routing_strategy"] == "mixlora":
            kept = order[: raw["top_k"]]
            weights = {e: probabilities[e] / sum(probabilities[other] for other in kept) for e in kept}
        else:
            temperature = raw.get("temperature", 0.0) or 1.0
            weights, mass = {}, 0.0
            for e in order:
                weights[e] = probabilities[e] / temperature
                mass += float(weights[e])
                if mass > raw["top_p"]:
                    break
        rows.append(sum(w * expert_output(base, tensors, e, scale, x) for e, w in weights.items()))
    return torch.stack(rows)


def rows(count: int = 12) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


CASES: dict[str, tuple[dict[str, Any], float]] = {
    "top 1": ({**RAW, "top_k": 1}, 1.5),
    "top 2": (RAW, 1.5),
    "all": ({**RAW, "top_k": E}, 1.5),
    "rslora": ({**RAW, "use_rslora": True}, 3 / 2**0.5),
    "top p": ({**DYNAMIC, "top_p": 0.8, "temperature": 0.0}, 1.5),
    "top p, cold": ({**DYNAMIC, "top_p": 0.8, "temperature": 0.5}, 1.5),
    "top p, hot": ({**DYNAMIC, "top_p": 0.4, "temperature": 2.0}, 1.5),
    "top p, all kept": ({**DYNAMIC, "top_p": 0.9, "temperature": 1.5}, 1.5),
    "an expert's own scale": ({**RAW, "expert_lora": {"bias": "none", "lora_alpha": 5}}, 2.5),
}


@pytest.mark.parametrize("act", [nn.functional.silu, nn.functional.gelu])
@pytest.mark.parametrize("case", CASES)
def test_an_mlp_is_the_loop_over_tokens_and_experts(
    case: str, act: Any, evaluate: ModuleType, mlp: ModuleType
) -> None:
    raw, scale = CASES[case]
    base, tensors = mlp.make(evaluate, act), file()
    program = compile_adapter(raw, tensors, base.sites)
    wanted = expected(raw, base, tensors, scale, rows())
    torch.testing.assert_close(base.adapted(program, rows()), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("names", [("up_proj",), ("down_proj",), ("gate_proj", "up_proj")])
@pytest.mark.parametrize("raw", [RAW, {**DYNAMIC, "top_p": 0.8, "temperature": 0.5}], ids=["k", "p"])
def test_a_projection_without_experts_is_the_bases(
    names: tuple[str, ...], raw: dict[str, Any], evaluate: ModuleType, mlp: ModuleType
) -> None:
    base, tensors = mlp.make(evaluate, nn.functional.silu), file(names=names)
    program = compile_adapter(raw, tensors, base.sites)
    wanted = expected(raw, base, tensors, 1.5, rows())
    torch.testing.assert_close(base.adapted(program, rows()), wanted, rtol=1e-5, atol=1e-5)


def test_experts_may_have_a_rank_of_their_own(evaluate: ModuleType, mlp: ModuleType) -> None:
    base, tensors = mlp.make(evaluate, nn.functional.silu), file(rank=3)
    raw = {**RAW, "expert_lora": {"r": 3, "lora_alpha": 6, "use_rslora": True, "lora_dropout": 0.05}}
    program = compile_adapter(raw, tensors, base.sites)
    wanted = expected(raw, base, tensors, 6 / 3**0.5, rows())
    torch.testing.assert_close(base.adapted(program, rows()), wanted, rtol=1e-5, atol=1e-5)
    (attention,) = program.sites["model.layers.0.self_attn.q_proj"]
    assert isinstance(attention, LowRank)
    factor = tensors["mixlora.layers.0.self_attn.q_proj.lora_B.weight"]
    assert torch.equal(attention.b_OR, factor * 1.5)


@pytest.mark.parametrize("layers", ["layers", "model.language_model.layers"])
def test_the_bases_own_name_for_its_layers_is_found(
    layers: str, evaluate: ModuleType, mlp: ModuleType
) -> None:
    base = mlp.make(evaluate, nn.functional.silu, layers)
    assert set(compile_adapter(RAW, file(), base.sites).sites) == set(base.sites)


def test_two_places_of_layers_are_ambiguous(evaluate: ModuleType, mlp: ModuleType) -> None:
    sites = {
        **mlp.make(evaluate, nn.functional.silu, "encoder.layers").sites,
        **mlp.make(evaluate, nn.functional.silu, "decoder.layers").sites,
    }
    with pytest.raises(AdapterMismatch, match=r"'decoder\.layers' and 'encoder\.layers', expected one"):
        compile_adapter(RAW, file(), sites)
    with pytest.raises(AdapterMismatch, match="this base has none, expected one"):
        compile_adapter(RAW, file(), {"h.0": Site("h.0", torch.ones(2, 2), None)})


REFUSED_OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "switch": ({"routing_strategy": "mixlora-switch"}, UnsupportedMethod, "input unchanged"),
    "an old name": ({"routing_strategy": "mixtral"}, UnsupportedMethod, "former name"),
    "an unknown strategy": ({"routing_strategy": "sink"}, UnsupportedMethod, "expected 'mixlora'"),
    "DoRA": ({"use_dora": True}, UnsupportedMethod, "'use_dora' is on .*no magnitudes"),
    "DoRA experts": ({"expert_lora": {"use_dora": True}}, UnsupportedMethod, "expert_lora.*no magnitudes"),
    "an activation": ({"act_fn": "gelu_new"}, UnsupportedMethod, "'act_fn' is on .*base's own activation"),
    "k above E": ({"top_k": 5}, InvalidConfig, "top_k: found 5, expected at most 4, the number of experts"),
    "too many experts": ({"num_experts": 257}, InvalidConfig, "num_experts.*256"),
    "no temperature": ({**DYNAMIC, "temperature": float("nan")}, InvalidConfig, "temperature"),
    "a tiny temperature": ({**DYNAMIC, "temperature": 1e-30}, InvalidConfig, "temperature: found 1e-30"),
    "a share above 1": ({**DYNAMIC, "top_p": 1.5}, InvalidConfig, "top_p"),
    "a foreign rank": ({"expert_lora": {"r": "3"}}, InvalidConfig, "r: Input should be a valid integer"),
}


@pytest.mark.parametrize("case", REFUSED_OPTIONS)
def test_options_that_cannot_be_honoured_are_refused(case: str) -> None:
    options, error, message = REFUSED_OPTIONS[case]
    with pytest.raises(error, match=message):
        method_for(RAW).parse({**RAW, **options})


def test_what_only_training_reads_and_what_is_off_is_accepted() -> None:
    method = method_for(RAW)
    training = {"jitter_noise": 0.1, "router_aux_loss_coef": 0.01, "router_init_range": 0.02, "name": "x"}
    off = {"act_fn": None, "use_dora": False, "expert_lora": None}
    assert method.parse({**RAW, **training, **off}) == method.parse(RAW)


EXPERT = "mixlora.layers.0.mlp.up_proj.experts"
REFUSED_FILES: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "a router of other width": ({GATE: torch.ones(E + 1, 6)}, r"moe_gate.*found shape \[5, 6\], .*\[4, 6\]"),
    "no router": ({GATE: None}, r"moe_gate\.weight is missing above 'model\.layers\.0\.mlp\.(gate|up)_proj'"),
    "half an expert": ({f"{EXPERT}.3.lora_B.weight": None}, r"experts\.3\.lora_B\.weight is missing"),
    "a gap": (
        {f"{EXPERT}.1.lora_A.weight": None, f"{EXPERT}.1.lora_B.weight": None},
        r"up_proj\.experts\.1\.lora_A\.weight is missing",
    ),
    "an expert too many": ({f"{EXPERT}.4.lora_A.weight": torch.ones(2, 6)}, r"experts\.4\.lora_A.* surplus"),
    "a number with a zero": ({f"{EXPERT}.01.lora_A.weight": torch.ones(2, 6)}, r"experts\.01\..* surplus"),
    "a router of a projection": (
        {"mixlora.layers.0.mlp.up_proj.moe_gate.weight": torch.ones(E, 6)},
        r"up_proj\.moe_gate\.weight is surplus",
    ),
    "a plain LoRA in the MLP": (
        {"mixlora.layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, 6)},
        r"up_proj\.lora_A\.weight is surplus: below a router",
    ),
    "experts in attention": (
        {"mixlora.layers.0.self_attn.q_proj.experts.0.lora_A.weight": torch.ones(2, 6)},
        r"q_proj\.experts\.0\.lora_A\.weight is surplus",
    ),
    "a classifier": ({"classifier": torch.ones(2, 6)}, "'classifier' is surplus"),
    "another mixture": (
        {"mola.layers.0.mlp.up_proj.moe_gate.weight": torch.ones(E, 6)},
        "'mola.*' is surplus",
    ),
}


@pytest.mark.parametrize("case", REFUSED_FILES)
def test_tensors_that_do_not_make_a_mixture_are_refused(
    case: str, evaluate: ModuleType, mlp: ModuleType
) -> None:
    changes, message = REFUSED_FILES[case]
    tensors = {name: t for name, t in {**file(), **changes}.items() if t is not None}
    with pytest.raises(InvalidTensors, match=message):
        check_adapter(RAW, tensors, mlp.make(evaluate, nn.functional.silu).sites)


def test_a_router_without_experts_is_refused(evaluate: ModuleType, mlp: ModuleType) -> None:
    tensors = file(names=())
    with pytest.raises(
        InvalidTensors, match=r"moe_gate\.weight is surplus: no projection below it has experts"
    ):
        check_adapter(RAW, tensors, mlp.make(evaluate, nn.functional.silu).sites)


def test_a_base_without_the_block_is_refused(evaluate: ModuleType, mlp: ModuleType) -> None:
    sites = mlp.make(evaluate, nn.functional.silu).sites
    without = {path: site for path, site in sites.items() if site.kind != "block"}
    with pytest.raises(AdapterMismatch, match=r"moe_gate.*'model\.layers\.0\.mlp' of this base is no block"):
        compile_adapter(RAW, file(), without)
    moved = {name.replace("layers.0", "layers.1"): tensor for name, tensor in file().items()}
    with pytest.raises(AdapterMismatch, match=r"this base has no .* 'model\.layers\.1\.mlp'"):
        compile_adapter(RAW, moved, sites)


def test_a_temperature_needs_the_mlps_last_projection(evaluate: ModuleType, mlp: ModuleType) -> None:
    base = mlp.make(evaluate, nn.functional.silu)
    sites = {path: site for path, site in base.sites.items() if not path.endswith("down_proj")}
    tensors = file(names=("up_proj",))
    raw = {**DYNAMIC, "top_p": 0.8, "temperature": 0.5}
    with pytest.raises(AdapterMismatch, match="a temperature that is not 0 or 1 divides the output"):
        compile_adapter(raw, tensors, sites)
    assert compile_adapter({**raw, "temperature": 1.0}, tensors, sites).sites
