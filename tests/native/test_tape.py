"""What was recorded gives what the function gives, for numbers that it never saw."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from timbre_server.native.arena import Arena
from timbre_server.native.recording import NotRepeatable, Recording, either, recording, repeated
from timbre_server.native.rounding import round_into, widen_into
from timbre_server.native.sums import sum_into
from timbre_server.native.tape import Choice, State, Tape


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


@pytest.mark.cpp
def test_kernels_that_follow_each_other_are_one_call_with_what_is_chosen_between() -> None:
    state, chosen = State(), [0]
    sources = torch.randn(40), torch.randn(40)
    sums, narrow, wide = torch.empty(40), torch.empty(40, dtype=torch.bfloat16), torch.empty(40)

    def choose() -> Tape:
        source = sources[chosen[0]]
        chosen[0] += 1
        return Recording.of_kernels(lambda: sum_into(sums, source, source))

    def function() -> Tensor:
        repeated(Choice(state, choose))
        return widen_into(wide, round_into(narrow, sums)).view(8, 5)

    tape, y = recorded(function)
    assert len(tape._steps) == 1
    for number, source in enumerate(sources):
        for _ in range(2):
            source.normal_()
            tape()
            assert torch.equal(y, (2 * source).bfloat16().float().view(8, 5))
        assert chosen == [number + 1]
        state.change()


@pytest.mark.cpp
def test_a_tape_keeps_what_it_sums() -> None:
    own = [torch.randn(40)]
    tape, y = recorded(lambda: own[0] + own[0])
    is_there, expected = weakref.ref(own[0]), own[0] * 2
    own.clear()
    y.zero_()
    tape()
    assert is_there() is not None
    assert torch.equal(y, expected)


@pytest.mark.cpp
def test_what_is_chosen_and_is_not_kernels_alone_is_called_each_time() -> None:
    state, x = State(), torch.randn(40)
    tape, y = recorded(lambda: either(state, lambda: False, lambda v: v + 1, torch.sin, x))
    for _ in range(3):
        x.normal_()
        tape()
        assert torch.equal(y, x.sin())


@pytest.mark.cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 5, 48)])
def test_sums_have_pytorchs_bits(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    a, b = (torch.randn(shape).mul(10.0**k).to(dtype) for k in (0, 2))
    a.view(-1)[0] = torch.inf
    y = torch.empty_like(a)
    assert sum_into(y, a, b)
    assert torch.equal(y, a + b)


@pytest.mark.cpp
@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.ones(3, 4), 2.0),
        (torch.ones(3, 4), torch.ones(4)),
        (torch.ones(4, 3).T, torch.ones(3, 4)),
        (torch.ones(3, 4), torch.ones(3, 4).double()),
        (torch.ones(3, 4).half(), torch.ones(3, 4).half()),
    ],
    ids=["number", "broadcast", "strided", "types", "half"],
)
def test_other_sums_are_left_to_pytorch(a: Tensor, b: Tensor | float) -> None:
    y = torch.zeros(3, 4, dtype=a.dtype)
    assert not sum_into(y, a, b)
    assert not y.any()
    tape, found = recorded(lambda: a + b)
    tape()
    assert torch.equal(found, a + b)


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
