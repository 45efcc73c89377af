"""Adapted layers in a small network: who gets what, and what is shared."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from timbre_methods.program import AdapterProgram, Diagonal, LowRank, Part, Places, Rotation, Spectral
from timbre_server.adapters.adapted_model import AdaptedModel, Arithmetic
from timbre_server.adapters.groups import LinearGroup
from timbre_server.operators.contract import Bound, Uses
from timbre_server.operators.low_rank import LowRankOperator
from timbre_server.operators.row_table import RowTable, Span

SIZE = 8
GROUPS = [LinearGroup(("q", "k")), LinearGroup(("o",)), LinearGroup(("head",), is_head=True)]


class Network(nn.Module):
    """q and k read the same tensor, o reads their sum, the head reads kept rows."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in ("q", "k", "o", "head"):
            setattr(self, name, nn.Linear(SIZE, SIZE, bias=name != "k", dtype=dtype))

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        hidden: Tensor = self.o(self.q(x) * self.k(x).sigmoid())
        return self.head(hidden[:, keep])  # type: ignore[no-any-return]


def low_rank(seed: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(2, SIZE, generator=generator), torch.randn(SIZE, 2, generator=generator))


def gain(side: str, seed: int) -> Diagonal:
    generator = torch.Generator().manual_seed(seed)
    return Diagonal(side, 1 + torch.randn(SIZE, generator=generator))  # type: ignore[arg-type]


def dense_delta(part: LowRank) -> Tensor:
    return part.b_OR @ part.a_RI


def run(model: Network, adapted: AdaptedModel, spans: list[Span], x_TI: Tensor, keep: list[int]) -> Tensor:
    rows = [span for span in spans for _ in range(span.num_rows)]
    head = RowTable([Span(1, rows[row].pairs) for row in keep])
    adapted.set_rows(RowTable(spans), head)
    try:
        with torch.inference_mode():
            return model(x_TI.unsqueeze(0), torch.tensor(keep)).squeeze(0)  # type: ignore[no-any-return]
    finally:
        adapted.clear_rows()


def adapted_network(*programs: dict[str, tuple[Part, ...]]) -> tuple[Network, AdaptedModel]:
    model = Network()
    adapted = AdaptedModel(model, GROUPS)
    for slot, sites in enumerate(programs):
        adapted.put(slot, AdapterProgram(sites))
    return model, adapted


def test_each_row_gets_its_own_adapter_and_base_rows_keep_every_bit() -> None:
    parts = {name: low_rank(seed) for seed, name in enumerate(("q", "k", "o", "head"))}
    model, adapted = adapted_network({name: (part,) for name, part in parts.items()})
    x_TI = torch.randn(4, SIZE)

    out = run(model, adapted, [Span(1), Span(2, ((0, 1.0),)), Span(1)], x_TI, [0, 1, 2, 3])

    base = Network()
    with torch.inference_mode():
        base_out = base(x_TI.unsqueeze(0), torch.arange(4)).squeeze(0)
        for name, part in parts.items():
            getattr(base, name).weight += dense_delta(part)
        merged_out = base(x_TI.unsqueeze(0), torch.arange(4)).squeeze(0)
    assert torch.equal(out[[0, 3]], base_out[[0, 3]])
    torch.testing.assert_close(out[1:3], merged_out[1:3], atol=1e-5, rtol=1e-5)


def test_the_head_looks_kept_rows_up_in_a_table_of_its_own() -> None:
    model, adapted = adapted_network({"head": (low_rank(1),)}, {"head": (low_rank(2),)})
    x_TI = torch.randn(5, SIZE)
    spans = [Span(2, ((0, 1.0),)), Span(2), Span(1, ((1, 1.0),))]

    kept = run(model, adapted, spans, x_TI, [1, 4])

    everything = run(model, adapted, spans, x_TI, [0, 1, 2, 3, 4])
    torch.testing.assert_close(kept, everything[[1, 4]])
    assert not torch.allclose(kept[0], run(model, adapted, [Span(5)], x_TI, [1])[0])


def test_a_mix_is_the_weighted_sum_of_the_changes_of_all_families() -> None:
    places = Places("dft", SIZE, SIZE, torch.tensor([1, 7, 4]), torch.tensor([2, 0, 6]))
    spectral = Spectral(torch.tensor([0.5, -2.0, 3.0]), places)
    model, adapted = adapted_network({"q": (low_rank(1),)}, {"q": (spectral,)}, {"q": (gain("output", 3),)})
    x_TI = torch.randn(3, SIZE)
    weights = (0.7, -0.4, 1.5)

    mixed = run(model, adapted, [Span(3, tuple(enumerate(weights)))], x_TI, [0, 1, 2])

    base = Network()
    q = base.q
    assert isinstance(q, nn.Linear)
    dense = torch.zeros(SIZE, SIZE, dtype=torch.complex64)
    dense[places.rows_N, places.columns_N] = spectral.c_N.to(dense.dtype)
    extra_gain = gain("output", 3).gain - 1
    with torch.inference_mode():
        weight, bias = q.weight.clone(), q.bias.clone()
        q.weight += weights[0] * dense_delta(low_rank(1)) + weights[1] * torch.fft.ifft2(dense).real
        q.weight += weights[2] * extra_gain[:, None] * weight
        q.bias += weights[2] * extra_gain * bias
        expected = base(x_TI.unsqueeze(0), torch.arange(3)).squeeze(0)
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=1e-5)


def test_an_output_gain_acts_on_the_base_even_beside_an_input_gain_in_one_mix() -> None:
    inward, outward = gain("input", 1), gain("output", 2)
    model, adapted = adapted_network({"q": (inward,)}, {"q": (outward,)})
    x_TI = torch.randn(3, SIZE)

    mixed = run(model, adapted, [Span(3, ((0, 0.5), (1, 2.0)))], x_TI, [0, 1, 2])

    base = Network()
    q = base.q
    assert isinstance(q, nn.Linear)
    with torch.inference_mode():
        weight, bias = q.weight.clone(), q.bias.clone()
        q.weight += 0.5 * (inward.gain - 1) * weight + 2 * (outward.gain - 1)[:, None] * weight
        q.bias += 2 * (outward.gain - 1) * bias
        expected = base(x_TI.unsqueeze(0), torch.arange(3)).squeeze(0)
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=1e-5)


def test_only_rows_with_a_scale_pay_for_a_product_of_their_own() -> None:
    """`y = W x + b + Σ w (scale ∘ (W R x) − W x)`: the base's bias is not scaled, in a mix either."""
    rows_given: list[int] = []

    def counted(module: nn.Module) -> Callable[[Tensor], Tensor]:
        def product(x: Tensor) -> Tensor:
            rows_given.append(x.numel() // SIZE)
            return module(x)  # type: ignore[no-any-return]

        return product

    generator = torch.Generator().manual_seed(2)
    blocks_FSBB = torch.randn(2, 1, 4, SIZE // 4, SIZE // 4, generator=generator)
    scale_O = torch.randn(SIZE, generator=generator)
    turns = [Rotation("input", blocks_FSBB[0], (2,), scale_O), Rotation("input", blocks_FSBB[1], (2,))]
    network = nn.ModuleDict({"o": nn.Linear(SIZE, SIZE)})
    adapted = AdaptedModel(network, [LinearGroup(("o",))], Arithmetic(counted))
    weight_OI, bias_O = network["o"].weight.detach(), network["o"].bias.detach()
    for slot, part in enumerate(turns):
        adapted.put(slot, AdapterProgram({"o": (part,)}))
    x_TI = torch.randn(4, SIZE, generator=generator)

    adapted.set_rows(RowTable([Span(2), Span(1, ((0, 1.0),)), Span(1, ((0, 0.5), (1, 2.0)))]), RowTable([]))
    with torch.inference_mode():
        out = network["o"](x_TI)

    assert rows_given == [4, 2]
    first, second = (weight_OI @ torch.block_diag(*blocks[0]) for blocks in blocks_FSBB)
    first = scale_O[:, None] * first
    mixed = weight_OI + 0.5 * (first - weight_OI) + 2 * (second - weight_OI)
    torch.testing.assert_close(out[:2], x_TI[:2] @ weight_OI.T + bias_O)
    torch.testing.assert_close(out[2], first @ x_TI[2] + bias_O)
    torch.testing.assert_close(out[3], mixed @ x_TI[3] + bias_O)


def test_members_of_a_group_may_be_called_in_any_order_and_more_than_once() -> None:
    model, adapted = adapted_network({"q": (low_rank(1),), "k": (low_rank(2),)})
    x = torch.randn(1, 3, SIZE)
    table = RowTable([Span(3, ((0, 1.0),))])
    adapted.set_rows(table, table)
    with torch.inference_mode():
        q_first, k_second = model.q(x), model.k(x)
        k_first, q_second, q_again = model.k(x), model.q(x), model.q(x)
    torch.testing.assert_close((q_first, k_second), (q_second, k_first))
    torch.testing.assert_close(q_first, q_again)
    adapted.clear_rows()


def test_a_forward_that_failed_half_way_leaves_nothing_to_the_next() -> None:
    model, adapted = adapted_network({"q": (low_rank(1),), "k": (low_rank(2),)})
    x = torch.randn(1, 3, SIZE)
    table = RowTable([Span(3, ((0, 1.0),))])
    adapted.set_rows(table, table)
    with torch.inference_mode():
        model.q(x)  # and k is never called
        adapted.clear_rows()
        assert torch.equal(model.k(x), nn.functional.linear(x, model.k.weight))


def test_a_slot_that_changed_hands_serves_the_new_adapter() -> None:
    model, adapted = adapted_network({"q": (low_rank(1),)})
    x_TI, spans = torch.randn(2, SIZE), [Span(2, ((0, 1.0),))]
    first = run(model, adapted, spans, x_TI, [0, 1])
    adapted.drop(0)
    adapted.put(0, AdapterProgram({"q": (low_rank(9),)}))
    second = run(model, adapted, spans, x_TI, [0, 1])
    assert not torch.allclose(first, second)
    torch.testing.assert_close(second, run(*adapted_network({"q": (low_rank(9),)}), spans, x_TI, [0, 1]))


def test_what_is_prepared_for_a_table_is_used_again_while_steps_repeat_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    binds: list[int] = []
    bind = LowRankOperator.bind

    def counted(self: LowRankOperator, uses: Uses[LowRank], table: RowTable) -> Bound:
        binds.append(table.num_rows)
        return bind(self, uses, table)

    monkeypatch.setattr(LowRankOperator, "bind", counted)
    model, adapted = adapted_network({"q": (low_rank(1),)})
    x_TI = torch.randn(3, SIZE)
    for spans in ([Span(2, ((0, 1.0),))], [Span(2, ((0, 1.0),))], [Span(2)], [Span(2, ((0, 1.0),))]):
        run(model, adapted, spans, x_TI[:2], [0, 1])
    run(model, adapted, [Span(3, ((0, 1.0),))], x_TI, [0])
    assert binds == [2, 3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rounds_the_sum_once_and_leaves_base_rows_alone(dtype: torch.dtype) -> None:
    model = Network(dtype)
    adapted = AdaptedModel(model, GROUPS)
    adapted.put(0, AdapterProgram({"q": (low_rank(1),)}))
    x = torch.randn(1, 4, SIZE).to(dtype)
    table = RowTable([Span(2, ((0, 1.0),)), Span(2)])
    with torch.inference_mode():
        base = model.q(x)
        adapted.set_rows(table, table)
        y = model.q(x)
        adapted.clear_rows()
    assert y.dtype == dtype
    assert torch.equal(y[:, 2:], base[:, 2:])
    expected = (base[:, :2].float() + x[:, :2].float() @ dense_delta(low_rank(1)).T).to(dtype)
    torch.testing.assert_close(y[:, :2], expected)
