from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from peft import IA3Config
from torch import Tensor, nn

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidTensors
from timbre_methods.program import Diagonal
from timbre_methods.registry import method_for

OPTIONS = {
    "as in the paper": {
        "target_modules": ["k_proj", "v_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
    },
    "inputs only": {
        "target_modules": ["q_proj", "up_proj"],
        "feedforward_modules": ["q_proj", "up_proj"],
    },
    "outputs only": {"target_modules": ["o_proj", "q_proj"], "feedforward_modules": []},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_ia3_gives_the_logits_of_peft(
    llama: nn.Module, agrees_with_peft: Callable[..., None], options: dict[str, object]
) -> None:
    agrees_with_peft(llama, IA3Config(task_type="CAUSAL_LM", **options))


@pytest.mark.parametrize(
    ("modules", "feedforward"),
    [(["c_attn", "mlp.c_proj"], ["mlp.c_proj"]), (["c_attn", "c_fc"], []), (["c_fc"], ["c_fc"])],
)
def test_ia3_on_conv1d_gives_the_logits_of_peft(
    gpt2: nn.Module, agrees_with_peft: Callable[..., None], modules: list[str], feedforward: list[str]
) -> None:
    config = IA3Config(target_modules=modules, feedforward_modules=feedforward, fan_in_fan_out=True)
    agrees_with_peft(gpt2, config)


def test_ia3_on_a_bf16_base_is_as_near_as_peft(llama: nn.Module, agrees_in_bf16: Callable[..., None]) -> None:
    agrees_in_bf16(llama, IA3Config(**OPTIONS["as in the paper"]))


RAW = {"peft_type": "IA3"}
KEY = "base_model.model.model.layers.0.self_attn.q_proj.ia3_l"


def compiled(vector: Tensor, base: Site, **options: object) -> Diagonal:
    raw = {**RAW, **options}
    method = method_for(raw)
    (part,) = method.compile(method.parse(raw), {KEY: vector}, {base.path: base}).sites[base.path]
    return part


@pytest.mark.parametrize("feedforward", [[], ["q_proj"], "((("])
def test_the_shape_alone_tells_the_side(feedforward: object, site: Callable[..., Site]) -> None:
    square = site(out_features=5, in_features=5)
    on_input = compiled(torch.arange(5.0)[None, :], square, feedforward_modules=feedforward)
    on_output = compiled(torch.arange(5.0)[:, None], square, feedforward_modules=feedforward)
    assert (on_input.side, on_output.side) == ("input", "output")
    assert on_input.gain.tolist() == on_output.gain.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert on_input.shift is None
    assert on_output.shift is None


def test_a_gain_on_the_output_scales_the_bias_and_one_on_the_input_does_not(
    site: Callable[..., Site], evaluate: ModuleType
) -> None:
    base = site(bias=True)
    assert base.bias_O is not None
    zero = torch.zeros(1, 5)
    on_output = evaluate.run_parts(base, (compiled(torch.full((6, 1), 3.0), base),), zero)
    on_input = evaluate.run_parts(base, (compiled(torch.full((1, 5), 3.0), base),), zero)
    torch.testing.assert_close(on_output[0], 3 * base.bias_O)
    torch.testing.assert_close(on_input[0], base.bias_O)


@pytest.mark.parametrize("shape", [(5, 1), (1, 6), (6,), (6, 5), (1, 1), (6, 1, 1)])
def test_a_vector_of_neither_side_is_refused_with_both(
    shape: tuple[int, ...], site: Callable[..., Site]
) -> None:
    with pytest.raises(InvalidTensors, match=r"expected \[1, 5\] \(input\) or \[6, 1\] \(output\)"):
        compiled(torch.ones(shape), site())
