"""Which modules with bare parameters are offered to adapters: those whose rows can be run apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import Llama4TextConfig, PreTrainedConfig, PreTrainedModel

from timbre_server.adapters.groups import ParameterModule
from timbre_server.engine.assembly import layers_of
from timbre_server.engine.attention import install_attention
from timbre_server.engine.messages import SiteShape
from timbre_server.engine.parameters import ParameterCalls, matrices_of, parameter_weight_of
from timbre_server.engine.probe import probe

NUM_ROWS, SIZE = 5, 6


class Matrix(nn.Module):
    """Multiplies rows by its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(SIZE, SIZE))

    def forward(self, x: Tensor, order: Tensor | None = None) -> Tensor:
        return x.reshape(-1, SIZE) @ self.matrix


class WithScores(Matrix):
    def forward(self, x: Tensor, order: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y = super().forward(x)
        return y, y.argmax(dim=-1)


class InDouble(Matrix):
    def forward(self, x: Tensor, order: Tensor | None = None) -> Tensor:
        return super().forward(x).double()


class OverAllRows(Matrix):
    def forward(self, x: Tensor, order: Tensor | None = None) -> Tensor:
        return super().forward(x).softmax(dim=0)


class Around(nn.Module):
    """Calls a module in some way."""

    def __init__(self, inner: nn.Module, call: Callable[[nn.Module, Tensor], object]) -> None:
        super().__init__()
        self.inner = inner
        self._call = call

    def forward(self, x: Tensor) -> object:
        return self._call(self.inner, x)


def found(inner: nn.Module, call: Callable[[nn.Module, Tensor], object]) -> tuple[ParameterModule, ...]:
    torch.manual_seed(1)
    model = nn.Sequential(Around(inner, call))
    calls = ParameterCalls()
    hooks = calls.watch(model)
    model(torch.randn(1, NUM_ROWS, SIZE))
    for hook in hooks:
        hook.remove()
    return calls.found(model, NUM_ROWS)


OFFERED: dict[str, tuple[nn.Module, Callable[[nn.Module, Tensor], object], tuple[object, object]]] = {
    "rows in front": (Matrix(), lambda m, x: m(x[0]), ((0,), (0,))),
    "rows behind a batch of one": (Matrix(), lambda m, x: m(x), ((1,), (0,))),
    "several results": (WithScores(), lambda m, x: m(x[0]), ((0,), (0, 0))),
    "a result of another precision": (InDouble(), lambda m, x: m(x[0]), ((0,), (0,))),
    "an argument without rows": (Matrix(), lambda m, x: m(x[0], order=torch.ones(2)), ((0, None), (0,))),
}


class OwnLinear(nn.Linear):
    """A layer that the probe takes as one of the linear ones."""


LEFT_OUT: dict[str, tuple[nn.Module, Callable[[nn.Module, Tensor], object]]] = {
    "rows in another order": (Matrix(), lambda m, x: m(x[0].flip(0))),
    "each row twice": (Matrix(), lambda m, x: m(x[0].repeat(2, 1))),
    "rows of the module's own": (Matrix(), lambda m, x: m(x[0] + 1)),
    "rows that see each other": (OverAllRows(), lambda m, x: m(x[0])),
    "two calls": (Matrix(), lambda m, x: m(m(x[0]))),
    "no call": (Matrix(), lambda m, x: x),
    "a linear layer of a class of its own": (OwnLinear(SIZE, SIZE), lambda m, x: m(x[0])),
    "a sum over the rows": (Matrix(), lambda m, x: m(x.sum(dim=1))),
}


@pytest.mark.parametrize("case", OFFERED)
def test_a_module_that_is_given_the_rows_in_order_is_offered(case: str) -> None:
    inner, call, axes = OFFERED[case]
    assert found(inner, call) == (ParameterModule("0.inner", ("matrix",), *axes, 4 * SIZE * SIZE),)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", LEFT_OUT)
def test_a_module_whose_rows_cannot_be_run_apart_is_left_out(case: str) -> None:
    assert found(*LEFT_OUT[case]) == ()


def test_slices_that_are_not_side_by_side_are_read_in_order() -> None:
    stack = torch.arange(24.0).view(2, 3, 4)
    torch.testing.assert_close(parameter_weight_of(stack.transpose(1, 2)), stack.mT.flatten(0, 1))


def test_layers_of_a_known_kind_and_what_holds_others_have_no_bare_parameters() -> None:
    holder, quantised, turned = Matrix(), Matrix(), Matrix()
    holder.layer = nn.Linear(2, 2)
    quantised.matrix = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    turned.is_transposed = True  # type: ignore[assignment]
    turned.matrix = nn.Parameter(torch.zeros(1, 2, 3))
    known = [nn.Linear(2, 2), nn.Embedding(2, 2), nn.Conv1d(2, 2, 1), nn.LayerNorm(2)]
    for module in (*known, holder, quantised, turned):
        assert matrices_of(module) == ()
    assert matrices_of(Matrix()) == ("matrix",)


def test_experts_and_routers_are_sites_beside_the_layers(
    tiny_model: Callable[[str], PreTrainedModel],
) -> None:
    model = tiny_model("qwen3_moe")
    install_attention(model)
    probed = probe(model)
    sites = [site for site in probed.sites if "layers.1.mlp" in site.path]
    experts = "model.layers.1.mlp.experts"
    assert sites == [
        SiteShape("model.layers.1.mlp.gate.weight", 6, 32, False, "parameter"),
        SiteShape(f"{experts}.gate_up_proj", 6 * 40, 32, False, "parameter", slices=6),
        SiteShape(f"{experts}.down_proj", 6 * 32, 20, False, "parameter", slices=6),
    ]
    weights = {shape.path: weight for shape, weight, _ in layers_of(model, sites)}
    stored = model.get_parameter(f"{experts}.down_proj")
    assert torch.equal(weights[f"{experts}.down_proj"][32:64], stored[1])
    assert weights[f"{experts}.down_proj"].data_ptr() == stored.data_ptr()
    assert probed.changed_bytes == 4 * 6 * (40 * 32 + 32 * 20)


def test_experts_that_lie_as_in_out_say_so(tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model = tiny_model("gpt_oss")
    install_attention(model)
    sites = {site.path.rpartition(".mlp.")[2]: site for site in probe(model).sites if ".0.mlp" in site.path}
    assert {name: (site.is_transposed, site.slices) for name, site in sites.items()} == {
        "router.weight": (False, 1),
        "experts.gate_up_proj": (True, 4),
        "experts.gate_up_proj_bias": (False, 1),
        "experts.down_proj": (True, 4),
        "experts.down_proj_bias": (False, 1),
    }


def test_experts_that_see_all_rows_each_are_left_out_and_a_router_is_no_linear_layer(
    model_of: Callable[[PreTrainedConfig], PreTrainedModel],
) -> None:
    config = Llama4TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, intermediate_size_mlp=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=1,
        attention_chunk_size=None, layer_types=["full_attention"], no_rope_layers=[0], pad_token_id=0,
    )  # fmt: skip
    model = model_of(config)
    install_attention(model)
    kinds = {site.path.rpartition("feed_forward.")[2]: site.kind for site in probe(model).sites}
    assert not any("experts." in path and "shared" not in path for path in kinds)
    assert (kinds["router.weight"], kinds["shared_expert.up_proj"]) == ("parameter", "linear")
    assert "router" not in kinds
