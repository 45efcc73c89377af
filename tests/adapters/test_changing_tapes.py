"""Tapes of layers whose rows and adapters come and go: what is played gives what is run.

Legend: T rows, I in.
"""

from __future__ import annotations

import gc
import random
import sys
import weakref
from functools import partial

import pytest
import torch
from random_parts import IN, KINDS, PATHS, SIZES, numbers, program, spectral
from torch import Tensor, nn

from timbre_methods.program import AdapterProgram, owned_tensors
from timbre_server.adapters import adapted_group
from timbre_server.adapters.adapted_model import AdaptedModel, Arithmetic
from timbre_server.adapters.groups import LinearGroup, LoneLayer
from timbre_server.engine.fused_norm import norm_of
from timbre_server.engine.packed_linear import LinearPacker
from timbre_server.native.arena import Arena
from timbre_server.native.recording import Recording
from timbre_server.native.rows import Rows
from timbre_server.native.tape import Choice, Tape
from timbre_server.operators.live_rows import LiveRows
from timbre_server.operators.native.spectral import NativeSpectral
from timbre_server.operators.row_table import Pairs, RowTable, Span

pytestmark = pytest.mark.cpp

NUM_SLOTS = 12
ROWS = (1, 5, 24, 90)
TAPES = (29, 131)
"""The numbers of rows that are written down: steps have fewer. Of many rows some kernels are other ones."""


class Model:
    """A norm, and two layers that read what it gives."""

    def __init__(self, base: nn.ModuleDict, dtype: torch.dtype) -> None:
        self._base = nn.ModuleDict({name: type_of(module) for name, module in base.items()})
        self._base.load_state_dict(base.state_dict())
        self._base.to(dtype)
        packer = LinearPacker(dtype, torch.device("cpu"), native=True)
        arithmetic = Arithmetic(packer.product_of, "native", partial(norm_of, native=True))
        self.adapted = AdaptedModel(
            self._base, [LinearGroup(PATHS)], arithmetic, lone=[LoneLayer("norm", "norm")]
        )
        self._dtype = dtype
        self._arena = Arena()
        self.tapes: dict[int, tuple[Tape, Rows, Rows]] = {}
        """By how many rows were written down, with what they read and give."""

    def put(self, slot: int, own: AdapterProgram) -> None:
        """Prepared beforehand, or when a row uses it."""
        self.adapted.put(slot, own, self.adapted.prepared(own) if random.random() < 0.5 else None)

    def merge(self, pairs: Pairs) -> None:
        """Of other weights than the base's: what adapters make of them does not matter here."""
        if pairs:
            layers = dict(self.adapted.linear_layers())
            self.adapted.merge(
                pairs, {path: lambda x, layer=layer: layer(x) + 2 for path, layer in layers.items()}
            )
        else:
            self.adapted.unmerge()

    def run(self, table: RowTable, x_TI: Tensor) -> Tensor:
        self.adapted.set_rows(table, table)
        y = self._forward(x_TI)
        self.adapted.clear_rows()
        return y

    def play(self, table: RowTable, x_TI: Tensor) -> Tensor:
        """On any tape that has room for the rows."""
        self.adapted.set_rows(table, table)
        num_rows = random.choice([rows for rows in TAPES if rows >= table.num_rows])
        if num_rows not in self.tapes:
            own_x = torch.empty(num_rows, IN)
            tape, y = Recording.of(partial(self._forward, own_x), self._arena, num_rows)
            self.tapes[num_rows] = tape, Rows(own_x, num_rows), y
        tape, own_x, y = self.tapes[num_rows]
        own_x(table.num_rows).copy_(x_TI)
        tape(table.num_rows)
        self.adapted.clear_rows()
        return y(table.num_rows).clone()

    def _forward(self, x_TI: Tensor) -> Tensor:
        h_1TI = self._base["norm"](x_TI.to(self._dtype).unsqueeze(0))
        return torch.cat([self._base[path](h_1TI) for path in PATHS], dim=-1) + 1


def type_of(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.Linear):
        return nn.Linear(module.in_features, module.out_features)
    return nn.RMSNorm(IN, 1e-6)


def base_model() -> nn.ModuleDict:
    return nn.ModuleDict(
        {"norm": nn.RMSNorm(IN, 1e-6), **{path: nn.Linear(IN, size) for path, size in SIZES.items()}}
    )


def any_table(slots: list[int], num_rows: int) -> RowTable:
    """Of so many rows: base rows, single ones, several of one adapter, and mixes; or base rows alone."""
    spans: list[Span] = []
    left = num_rows
    is_base = random.random() < 0.15
    while left:
        rows = min(left, random.choice([1, 1, 1, 9]))
        own = [] if is_base else random.sample(slots, random.choice([0, 1, 1, 1, 1, 2]))
        spans.append(Span(rows, tuple((slot, random.choice([1.0, 1.0, 0.25])) for slot in own)))
        left -= rows
    return RowTable(spans)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_what_is_played_has_the_bits_of_a_model_that_runs_and_never_saw_another_step(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    random.seed(kind)
    # Little is known again where little is kept: by the one, by the other, or by both.
    monkeypatch.setattr(adapted_group, "_MAX_BEHAVIOURS", random.choice([1, 2, 32]))
    monkeypatch.setattr(Choice, "_MAX_KNOWN", random.choice([1, 2, 16]))
    torch.manual_seed(len(kind))
    base = base_model()
    programs: dict[int, AdapterProgram] = {}
    model, merged, table = Model(base, dtype), Pairs(), None
    for _ in range(80):
        slots = list(range(NUM_SLOTS))
        for slot in slots if not programs else random.sample(slots, random.choice([0, 0, 1, 3])):
            if slot in programs and slot not in [own for own, _ in merged]:
                model.adapted.drop(slot)
                del programs[slot]
            if slot not in programs:
                programs[slot] = program(KINDS[kind])
                model.put(slot, programs[slot])
        if random.random() < 0.1:
            merged = random.choice([(), ((0, 1.0),)])
            model.merge(merged)
        if table is None or random.random() < 0.7:
            num_rows = random.choice(ROWS)
            is_merged = merged and random.random() < 0.3
            table = RowTable([Span(num_rows, merged)]) if is_merged else any_table(slots, num_rows)
        x_TI = numbers(table.num_rows, IN)
        new = Model(base, dtype)
        for slot, own in programs.items():
            new.put(slot, own)
        new.merge(merged)
        assert torch.equal(model.play(table, x_TI), new.run(table, x_TI))


OUTLASTING = [
    "low rank",
    "sparse",
    "gains",
    "rotations",
    "rotations with scales",
    "spectral",
    "spectral of any transform",
    "circulant",
    "shared basis",
    "dense cores",
    "sparse cores",
    "kronecker",
    "blocks",
]


@pytest.mark.parametrize("kind", OUTLASTING)
@torch.inference_mode()
def test_layers_are_not_asked_while_the_adapters_stay(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [0]
    choose = Choice.__call__

    def counted(self: Choice, num_rows: int) -> int:
        chosen[0] += 1
        return choose(self, num_rows)

    monkeypatch.setattr(Choice, "__call__", counted)
    monkeypatch.setattr(sys.modules[__name__], "TAPES", TAPES[:1])
    random.seed(kind)
    model = Model(base_model(), torch.float32)
    for slot in range(4):
        parts = {path: (KINDS[kind][0](SIZES[path]),) for path in PATHS}
        model.put(slot, AdapterProgram(parts))
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 0, 1], [1, 3, 2, 0, 0]):
        table, x_TI = RowTable([Span(1, ((slot, 1.0),)) for slot in order]), numbers(len(order), IN)
        model.play(table, x_TI)
        if order == [0, 1, 2, 3]:
            chosen[0] = 0
    assert chosen[0] == 0
    for order in ([], [1, 2], [], [3]):
        table = RowTable([*(Span(1, ((slot, 1.0),)) for slot in order), Span(4)])
        model.play(table, numbers(table.num_rows, IN))
    assert chosen[0] == len(PATHS), "once for base rows alone"


@pytest.mark.parametrize("kind", [*OUTLASTING, "mixtures"])
@torch.inference_mode()
def test_a_layer_that_nothing_changed_is_changed_by_the_next_adapter(kind: str) -> None:
    random.seed(kind)
    torch.manual_seed(len(kind))
    model, x_TI = Model(base_model(), torch.float32), numbers(2, IN)
    make = KINDS[kind][0]
    model.put(0, AdapterProgram({"q": (make(SIZES["q"]),)}))
    table = RowTable([Span(2, ((0, 1.0),))])
    before = model.play(table, x_TI)
    assert torch.equal(model.run(table, x_TI), before)
    model.put(1, AdapterProgram({path: (make(size),) for path, size in SIZES.items()}))
    table = RowTable([Span(1, ((0, 1.0),)), Span(1, ((1, 1.0),))])
    after = model.play(table, x_TI)
    is_same_TO = (after == before)[0]
    assert is_same_TO[0].all()
    # A sparse change may leave some outputs as they were.
    assert not is_same_TO[1, : SIZES["q"]].all()
    assert not is_same_TO[1, SIZES["q"] :].all()
    assert torch.equal(model.run(table, x_TI), after)


@pytest.mark.parametrize(
    "kind",
    [
        "low rank",
        "sparse",
        "rotations",
        "rotations with scales",
        "spectral",
        "spectral of two seeds",
        "circulant",
        "circulant of any size",
        "shared bases",
        "cores of any form",
        "kronecker",
        "blocks",
        "mixtures",
        "all",
    ],
)
@torch.inference_mode()
def test_tapes_keep_nothing_of_an_adapter_that_left(kind: str) -> None:
    random.seed(kind)
    model = Model(base_model(), torch.float32)
    for slot in range(8):
        model.put(
            slot, AdapterProgram({path: (make(SIZES[path]),) for path in PATHS for make in KINDS[kind]})
        )
    parts = {part for slot in range(8) for own in model.adapted.program(slot).sites.values() for part in own}
    values = [weakref.ref(tensor) for part in parts for tensor in owned_tensors(part)]
    model.play(any_table(list(range(8)), 24), numbers(24, IN))
    for slot in range(8):
        model.adapted.drop(slot)
    del parts
    gc.collect()
    assert not any(own() is not None for own in values)


@torch.inference_mode()
def test_spectra_that_are_written_down_have_room_for_those_of_any_rows() -> None:
    """A step of as many rows may put them into more groups."""
    part, x_TI = spectral(SIZES["q"]), numbers(24, IN)
    operator = NativeSpectral()
    standing = operator.standing(LiveRows())
    standing.admit(0, operator.prepared([[part]]))
    bound = standing.bound(RowTable([Span(1, ((0, 1.0),)), Span(23, ())]))
    assert len(bound.source(x_TI)) == 1
    found: list[Tensor] = []
    Recording.of_kernels(lambda: found.append(bound.source(x_TI)), len(x_TI))
    assert len(found[0]) == 24
