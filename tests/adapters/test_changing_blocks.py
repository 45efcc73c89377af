"""Blocks in which routers choose, while rows and adapters come and go: what is played gives what a model
gives that runs and never saw another step.

Legend: T rows, D features.
"""

from __future__ import annotations

import random
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from timbre_methods.program import AdapterProgram, Diagonal, LowRank, Part
from timbre_methods.routing import Routed, RoutedBlock, Router, Rule
from timbre_server.adapters.adapted_group import AdaptedGroup
from timbre_server.adapters.adapted_model import AdaptedModel, Arithmetic
from timbre_server.adapters.groups import Block, LinearGroup
from timbre_server.engine.packed_linear import LinearPacker
from timbre_server.native.arena import Arena
from timbre_server.native.recording import Recording
from timbre_server.native.rows import Rows
from timbre_server.native.tape import Tape
from timbre_server.operators.row_table import RowTable, Span

pytestmark = pytest.mark.cpp

D, INNER = 16, 24
SITES = {
    f"{block}.{name}": size
    for block in "ab"
    for name, size in (("gate", (INNER, D)), ("up", (INNER, D)), ("down", (D, INNER)))
    if (block, name) != ("b", "gate")
}
GROUPS = (("a.gate", "a.up"), ("a.down",), ("b.up",), ("b.down",), ("after",))
RULES = (
    Rule(keep="top_k", top_k=2, gate="renormalised"),
    Rule(keep="top_k", gate="one"),
    Rule(),
    Rule(keep="top_p", top_p=0.6),
)
NUM_SLOTS = 8
MOST_ROWS = 11


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(D, INNER), nn.Linear(D, INNER), nn.Linear(INNER, D)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(silu(self.gate(x)) * self.up(x))
        return y


class OfKernelsAlone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, INNER), nn.Linear(INNER, D)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.up(x))
        return y


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.after = Gated(), OfKernelsAlone(), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x)
        y: Tensor = self.after(x + self.b(x))
        return y


class Model:
    def __init__(self, weights: dict[str, Tensor]) -> None:
        self._net = Net()
        self._net.load_state_dict(weights)
        packer = LinearPacker(torch.float32, torch.device("cpu"), native=True)
        self.adapted = AdaptedModel(
            self._net,
            [LinearGroup(paths) for paths in GROUPS],
            Arithmetic(packer.product_of, "native"),
            blocks=[Block("a", D, "a.down"), Block("b", D, "b.down")],
        )
        self._tape: tuple[Tape, Rows, Rows] | None = None
        """With what it reads and gives."""

    def run(self, table: RowTable, x_TD: Tensor) -> tuple[Tensor, dict[int, list[int]]]:
        """Also how often each expert acted."""
        self.adapted.set_rows(table, table)
        y_TD = self._net(x_TD.unsqueeze(0))[0]
        counts = self.adapted.expert_tokens()
        self.adapted.clear_rows()
        return y_TD, counts

    def play(self, table: RowTable, x_TD: Tensor) -> tuple[Tensor, dict[int, list[int]]]:
        self.adapted.set_rows(table, table)
        if self._tape is None:
            own_x = torch.empty(1, MOST_ROWS, D)
            tape, y = Recording.of(partial(self._net, own_x), Arena(), MOST_ROWS)
            self._tape = tape, Rows(own_x, MOST_ROWS), y
            self.adapted.forget_forward()
        tape, own_x, y = self._tape
        own_x(table.num_rows)[0] = x_TD
        tape(table.num_rows)
        counts = self.adapted.expert_tokens()
        self.adapted.clear_rows()
        return y(table.num_rows)[0].clone(), counts


def low_rank(path: str) -> LowRank:
    out, inner = SITES[path]
    rank = random.randint(1, 3)
    return LowRank(torch.randn(rank, inner) / 4, torch.randn(out, rank) / 4)


def experts(path: str, count: int) -> tuple[tuple[LowRank | Diagonal, ...], ...]:
    """The first does something, and now and then scales the output; others may do nothing."""
    first: tuple[LowRank | Diagonal, ...] = (low_rank(path),)
    if random.random() < 0.2:
        first = (*first, Diagonal("output", torch.randn(SITES[path][0]), None))
    others = [(low_rank(path),) if random.random() < 0.8 else () for _ in range(count - 1)]
    return (first, *others)


def program() -> AdapterProgram:
    """In each block: nothing, plain parts, mixtures of the layers' own, or those that the block's router
    chooses from."""
    sites: dict[str, tuple[Part, ...]] = {}
    for block in "ab":
        kind = random.choice(["nothing", "plain", "own routers", "block", "block", "sites"])
        paths = [path for path in SITES if path.startswith(block)]
        count = random.randint(2, 4)
        router = Router(torch.randn(count, D), random.choice(RULES))
        if kind in ("block", "sites"):
            sites[block] = (RoutedBlock(router, "block" if kind == "block" else "sites"),)
        for path in paths if kind != "nothing" else ():
            if kind == "plain":
                sites[path] = (low_rank(path),)
            elif kind == "own routers":
                own = Router(torch.randn(count, SITES[path][1]), random.choice(RULES))
                sites[path] = (Routed(experts(path, count), own),)
            else:
                sites[path] = (Routed(experts(path, count), router, from_block=True),)
    return AdapterProgram(sites)


def any_table(num_rows: int) -> RowTable:
    spans: list[Span] = []
    left, is_base = num_rows, random.random() < 0.15
    while left:
        rows = min(left, random.choice([1, 1, 4]))
        own = [] if is_base else random.sample(range(NUM_SLOTS), random.choice([0, 1, 1, 1, 2]))
        spans.append(Span(rows, tuple((slot, random.choice([1.0, 0.5])) for slot in own)))
        left -= rows
    return RowTable(spans)


@pytest.mark.parametrize("seed", range(4))
@torch.inference_mode()
def test_blocks_are_played_as_they_run(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
    weights = {name: 0.3 * tensor for name, tensor in Net().state_dict().items()}
    model, table, programs = Model(weights), None, dict[int, AdapterProgram]()
    for _ in range(60):
        for slot in (
            range(NUM_SLOTS) if not programs else random.sample(range(NUM_SLOTS), random.choice([0, 0, 2]))
        ):
            if slot in programs:
                model.adapted.drop(slot)
            own = programs[slot] = program()
            model.adapted.put(slot, own, model.adapted.prepared(own) if random.random() < 0.5 else None)
        if table is None or random.random() < 0.7:
            table = any_table(random.choice([1, 4, 9]))
        x_TD, new = torch.randn(table.num_rows, D), Model(weights)
        for slot, own in programs.items():
            new.adapted.put(slot, own)
        (got_TD, got_counts), (want_TD, want_counts) = model.play(table, x_TD), new.run(table, x_TD)
        assert torch.equal(got_TD, want_TD)
        assert got_counts == want_counts


@torch.inference_mode()
def test_a_step_after_one_whose_bind_failed_is_bound_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups that were bound before it failed have its table, and those after have not."""
    torch.manual_seed(0)
    weights = Net().state_dict()
    model, new = Model(weights), Model(weights)
    for slot in range(2):
        own = AdapterProgram({path: (low_rank(path),) for path in SITES})
        model.adapted.put(slot, own)
        new.adapted.put(slot, own)
    one, other = (RowTable([Span(1, ((slot, 1.0),)) for slot in slots]) for slots in ((0, 0), (0, 1)))
    x_TD = torch.randn(2, D)
    model.play(one, x_TD)
    bind = AdaptedGroup._bind

    def fail(group: AdaptedGroup, table: RowTable) -> object:
        if group.paths == ("b.up",):
            raise MemoryError("this once")
        return bind(group, table)

    with monkeypatch.context() as failing:
        failing.setattr(AdaptedGroup, "_bind", fail)
        with pytest.raises(MemoryError):
            model.play(other, x_TD)
        model.adapted.clear_rows()
    assert torch.equal(model.play(other, x_TD)[0], new.run(other, x_TD)[0])


@torch.inference_mode()
def test_a_step_after_one_that_failed_in_a_block_sees_its_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each row there were two in the block, and layers after it stay bound to the table."""
    torch.manual_seed(0)
    weights = Net().state_dict()
    router = Router(torch.randn(3, D), RULES[0])
    sites: dict[str, tuple[Part, ...]] = {"a": (RoutedBlock(router, "block"),)}
    sites["a.down"] = (Routed(experts("a.down", 3), router, from_block=True),)
    sites["after"] = (LowRank(torch.randn(2, D), torch.randn(D, 2)),)
    model, new = Model(weights), Model(weights)
    for each in (model, new):
        each.adapted.put(0, AdapterProgram(sites))
    table, x_TD = RowTable([Span(2), Span(2, ((0, 1.0),))]), torch.randn(4, D)
    expected, _ = new.run(table, x_TD)
    assert torch.equal(model.run(table, x_TD)[0], expected)
    bound = AdaptedGroup.bound

    def fail(group: AdaptedGroup) -> object:
        if group.paths == ("a.down",):
            raise MemoryError("this once")
        return bound(group)

    with monkeypatch.context() as failing:
        failing.setattr(AdaptedGroup, "bound", fail)
        with pytest.raises(MemoryError):
            model.run(table, x_TD)
        model.adapted.clear_rows()
    assert torch.equal(model.run(table, x_TD)[0], expected)
