"""A module with bare parameters whose rows use different adapters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from timbre_methods.program import AdapterProgram, SlicedLowRank
from timbre_server.adapters import adapted_parameters
from timbre_server.adapters.adapted_model import AdaptedModel
from timbre_server.adapters.groups import ParameterModule
from timbre_server.operators.row_table import RowTable, Span

SLICES, SIZE = 3, 8


class Experts(nn.Module):
    """Each row through the expert that it names, twice; says which, too. Rows stand in axis 1 of x."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.size = SIZE
        self.up = nn.Parameter(torch.randn(SLICES, SIZE, SIZE, dtype=dtype))
        self.down = nn.Parameter(torch.randn(SLICES, SIZE, SIZE, dtype=dtype))
        self.shift = nn.Parameter(torch.randn(SLICES, SIZE, dtype=dtype))

    def forward(self, x_1TD: Tensor, scale: float, *, expert_T: Tensor) -> tuple[Tensor, Tensor]:
        y_TD = torch.zeros_like(x_1TD[0])
        for expert in range(SLICES):
            rows = (expert_T == expert).nonzero()[:, 0]
            inner = (x_1TD[0, rows] @ self.up[expert].T).relu()
            y_TD[rows] = inner @ self.down[expert].T * scale + self.shift[expert]
        return y_TD, expert_T


FACTS = ParameterModule("experts", ("up", "down", "shift"), (1, None, 0), (0, 0))
EXPERT_T = torch.tensor([0, 1, 2, 0, 1, 2, 2])
SPANS = [
    Span(1),
    Span(2, ((0, 1.0),)),
    Span(1),
    Span(2, ((1, 0.5), (0, -2.0))),
    Span(1, ((2, 1.0),)),
]
"""Adapter 2 has nothing here."""


def part(seed: int, slices: int = SLICES, rows: int = SIZE) -> SlicedLowRank:
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randn(slices, *shape, generator=generator) for shape in ((2, SIZE), (rows, 2)))
    return SlicedLowRank(*draws)


PROGRAMS = [
    {"experts.up": (part(1),), "experts.shift": (part(2, 1, SLICES),)},
    {"experts.up": (part(3), part(4)), "experts.down": (part(5),)},
    {"another": (part(6),)},
]


def network(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module, AdaptedModel]:
    """The base module, the network around its adapted form, and the adapted model."""
    torch.manual_seed(0)
    net = nn.Module()
    net.experts = Experts(dtype)
    base = copy.deepcopy(net.experts)
    adapted = AdaptedModel(net, (), parameters=[FACTS])
    for slot, sites in enumerate(PROGRAMS):
        adapted.put(slot, AdapterProgram(sites))
    return base, net, adapted


def run(net: nn.Module, adapted: AdaptedModel, spans: list[Span], x_TD: Tensor) -> tuple[Tensor, Tensor]:
    table = RowTable(spans)
    adapted.set_rows(table, table)
    try:
        with torch.inference_mode():
            return net.experts(x_TD.unsqueeze(0), 0.5, expert_T=EXPERT_T)  # type: ignore[no-any-return]
    finally:
        adapted.clear_rows()


@torch.no_grad()
def merged(base: nn.Module, weights: dict[int, float]) -> nn.Module:
    """The base with ``W + Σ w B A`` written into it."""
    changed = copy.deepcopy(base)
    for slot, weight in weights.items():
        for path, parts in PROGRAMS[slot].items():
            for each in parts if path != "another" else ():
                parameter = changed.get_parameter(path.removeprefix("experts."))
                delta = torch.stack([b @ a for a, b in zip(each.a_ERI, each.b_EOR, strict=True)])
                parameter += weight * delta.view_as(parameter)
    return changed


def test_each_row_gets_its_own_mix_and_keeps_its_place() -> None:
    base, net, adapted = network()
    x_TD = torch.randn(7, SIZE)

    y_TD, expert_T = run(net, adapted, SPANS, x_TD)

    assert torch.equal(expert_T, EXPERT_T)
    row = 0
    for span in SPANS:
        rows = slice(row, row + span.num_rows)
        with torch.no_grad():
            expected, _ = merged(base, dict(span.pairs))(x_TD[None], 0.5, expert_T=EXPERT_T)
        torch.testing.assert_close(y_TD[rows], expected[rows], atol=1e-4, rtol=1e-5)
        row += span.num_rows


def test_rows_of_no_adapter_here_keep_every_bit_and_the_base_its_values() -> None:
    base, net, adapted = network(torch.bfloat16)
    x_TD = torch.randn(7, SIZE, dtype=torch.bfloat16)
    with torch.no_grad():
        plain, _ = base(x_TD[None], 0.5, expert_T=EXPERT_T)

    y_TD, _ = run(net, adapted, SPANS, x_TD)

    untouched = [0, 3, 6]
    assert torch.equal(y_TD[untouched], plain[untouched])
    assert not torch.equal(y_TD[1], plain[1])
    for name, parameter in base.named_parameters():
        assert torch.equal(net.experts.base.get_parameter(name), parameter)
    assert torch.equal(run(net, adapted, [Span(7)], x_TD)[0], plain)
    assert torch.equal(run(net, adapted, [Span(7, ((2, 1.0),))], x_TD)[0], plain)


def test_one_mix_for_all_rows_is_one_call() -> None:
    base, net, adapted = network()
    x_TD = torch.randn(7, SIZE)
    calls: list[int] = []
    net.experts.base.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[1]))

    y_TD, _ = run(net, adapted, [Span(4, ((0, 1.0), (1, 0.5))), Span(3, ((1, 0.5), (0, 1.0)))], x_TD)

    assert calls == [7]
    with torch.no_grad():
        expected, _ = merged(base, {0: 1.0, 1: 0.5})(x_TD[None], 0.5, expert_T=EXPERT_T)
    torch.testing.assert_close(y_TD, expected, atol=1e-4, rtol=1e-5)


def test_a_slot_that_changes_hands_is_noticed() -> None:
    base, net, adapted = network()
    x_TD = torch.randn(7, SIZE)
    spans = [Span(7, ((2, 1.0),))]
    before, _ = run(net, adapted, spans, x_TD)
    adapted.drop(2)
    adapted.put(2, AdapterProgram(PROGRAMS[0]))

    after, _ = run(net, adapted, spans, x_TD)

    with torch.no_grad():
        expected, _ = merged(base, {0: 1.0})(x_TD[None], 0.5, expert_T=EXPERT_T)
    torch.testing.assert_close(after, expected, atol=1e-4, rtol=1e-5)
    assert not torch.allclose(before, after)


def test_slices_are_summed_piece_by_piece_to_the_same_values(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(SLICES, SIZE, SIZE)
    parts = [(part(1), 0.5), (part(2), -1.0)]
    at_once = adapted_parameters.changed(weight, parts)
    monkeypatch.setattr(adapted_parameters, "CELLS_AT_ONCE", 1)
    assert torch.equal(adapted_parameters.changed(weight, parts), at_once)
    expected = weight + sum(w * each.b_EOR @ each.a_ERI for each, w in parts)
    torch.testing.assert_close(at_once, expected)


def test_what_a_model_asks_of_the_module_is_the_bases() -> None:
    _, net, _ = network()
    assert net.experts.size == SIZE
    assert net.experts.up.shape == (SLICES, SIZE, SIZE)
    with pytest.raises(AttributeError, match="no attribute 'gate'"):
        _ = net.experts.gate
