"""What was recorded gives what the function gives, for numbers that it never saw."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from timbre_server.native.arena import Arena
from timbre_server.native.recording import NotRepeatable, Recording, either, recording, repeated
from timbre_server.native.rounding import round_into
from timbre_server.native.tape import State, Tape


@pytest.fixture(autouse=True)
def inference() -> object:
    with torch.inference_mode():
        yield


def recorded(function: Callable[[], Tensor], arena: Arena | None = None) -> tuple[Tape, Tensor]:
    return Recording.of(function, arena or Arena())


def test_all_kinds_of_operations_are_played() -> None:
    x = torch.randn(3, 8)
    weight = torch.randn(8, 8)
    layer = nn.Linear(8, 8)

    def function() -> Tensor:
        places = torch.empty_like(x)
        places.copy_(x).mul_(2)
        halves = torch.cat(places.view(3, 2, 4).transpose(0, 1).unbind(0), dim=-1)
        values, _ = torch.max(halves, dim=-1, keepdim=True)
        y = layer(halves.bfloat16().float()) @ weight + values + torch.arange(8)
        return y.reshape(4, 6).contiguous()

    tape, y = recorded(function)
    assert torch.equal(y, function())
    x.normal_()
    assert not torch.equal(y, function())
    tape()
    assert torch.equal(y, function())


@pytest.mark.cpp
def test_kernels_are_played() -> None:
    x = torch.randn(5, 20)

    def function() -> Tensor:
        sums = x * 3
        return round_into(torch.empty_like(sums, dtype=torch.bfloat16), sums)

    tape, y = recorded(function)
    x.normal_()
    tape()
    assert torch.equal(y, (x * 3).bfloat16())


@pytest.mark.cpp
def test_a_dry_branch_has_its_kernels_written_down_only() -> None:
    sums, branches = torch.randn(20), []

    def function() -> Tensor:
        own = recording()
        assert own is not None
        y = torch.zeros(20, dtype=torch.bfloat16)
        branches.append(own.branch(round_into, y, sums, is_dry=True)[0])
        return y

    _, y = recorded(function)
    assert not y.any()
    branches[0]()
    assert torch.equal(y, sums.bfloat16())


@pytest.mark.parametrize(
    "reads",
    [
        lambda x: x * float(x[0]),
        lambda x: x if x[0] > 0 else -x,
        lambda x: torch.tensor(x.tolist()),
        lambda x: torch.from_numpy(x.numpy()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
    ],
    ids=["float", "bool", "tolist", "numpy", "mask", "nonzero"],
)
def test_what_reads_numbers_is_refused(reads: Callable[[Tensor], Tensor]) -> None:
    x = torch.ones(4)
    with pytest.raises(NotRepeatable, match="reads numbers"):
        recorded(lambda: reads(x))
    assert recording() is None
    assert torch.equal(recorded(lambda: x + 1)[1], x + 1)


def test_a_tensor_that_has_died_gives_its_place_to_the_next() -> None:
    arena, x = Arena(), torch.randn(1000)

    def function() -> Tensor:
        y = x
        for _ in range(50):
            y = y + x
        return y

    tape, y = recorded(function, arena)
    assert arena.num_bytes <= 3 * 4096
    x.normal_()
    tape()
    assert torch.equal(y, function())


def test_tapes_of_one_arena_use_the_same_memory() -> None:
    arena, x = Arena(), torch.randn(600)
    first, one = recorded(lambda: x * 2, arena)
    before = arena.num_bytes
    second, two = recorded(lambda: x[:590] * 3, arena)
    assert arena.num_bytes == before
    for tape, y, want in ((first, one, x * 2), (second, two, x[:590] * 3), (first, one, x * 2)):
        tape()
        assert torch.equal(y, want)


def test_a_tensor_without_numbers() -> None:
    x = torch.ones(0, 3)
    tape, y = recorded(lambda: x + 1)
    tape()
    assert y.shape == (0, 3)


def test_what_is_repeated_is_called_each_time_and_nothing_of_it_is_written_down() -> None:
    calls, x = [], torch.zeros(1)

    def call() -> None:
        assert recording() is None
        calls.append(float(x))
        x.add_(1)

    def function() -> Tensor:
        repeated(call)
        return x * 10

    tape, y = recorded(function)
    tape()
    assert calls == [0, 1]
    assert y == 20


def test_either_is_decided_when_the_state_is_another() -> None:
    x, is_plain, state = torch.ones(2), [True], State()

    def choice() -> bool:
        return is_plain[0]

    def function() -> Tensor:
        return either(state, choice, lambda v: v + 1, lambda v: torch.tensor([v.sum().item()] * 2), x) * 10

    tape, y = recorded(function)
    assert y.tolist() == [20, 20]
    is_plain[0] = False
    state.change()
    x.fill_(4)
    tape()
    assert y.tolist() == [80, 80]
    assert function().tolist() == [80, 80]
    is_plain[0] = True
    tape()
    assert y.tolist() == [80, 80]
    state.change()
    tape()
    assert y.tolist() == [50, 50]
