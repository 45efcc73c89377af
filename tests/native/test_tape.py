"""What was recorded gives what the function gives, for numbers that it never saw and for fewer rows."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from timbre_server.native.arena import Arena
from timbre_server.native.recording import Recording, either, recording, repeated
from timbre_server.native.rounding import round_into, widen_into
from timbre_server.native.rows import NotRepeatable, Rows
from timbre_server.native.sums import sum_into
from timbre_server.native.tape import Choice, State, Tape

MOST = 13
"""Rows of what is recorded: it divides no other size here."""
PLAYED = (MOST, 1, 5, 5, 12)


@pytest.fixture(autouse=True)
def inference() -> object:
    with torch.inference_mode():
        yield


def recorded(function: Callable[[], Tensor], arena: Arena | None = None) -> tuple[Tape, Rows]:
    return Recording.of(function, arena or Arena(), MOST)


def agrees(function: Callable[[Tensor], Tensor], x: Tensor, most: int = MOST) -> bool:
    """Whether a tape gives, of the first rows of x, what the function gives of them."""
    tape, y = Recording.of(lambda: function(x), Arena(), most)
    rows = Rows(x, most)
    for count in (most, *(min(count, most) for count in PLAYED)):
        x.normal_()
        tape(count)
        if not torch.equal(y(count), function(rows(count))):
            return False
    return True


def test_all_kinds_of_operations_are_played() -> None:
    weight, layer = torch.randn(8, 8), nn.Linear(8, 8)

    def function(x: Tensor) -> Tensor:
        places = torch.empty_like(x)
        places.copy_(x).mul_(2)
        halves = torch.cat(places.view(-1, 2, 4).transpose(0, 1).unbind(0), dim=-1)
        values, _ = torch.max(halves, dim=-1, keepdim=True)
        y = layer(halves.bfloat16().float()) @ weight + values + torch.arange(8)
        return y.view(1, -1, 2, 4).transpose(1, 2).contiguous()

    assert agrees(function, torch.randn(MOST, 8))


def test_sizes_that_count_rows_are_those_of_the_rows() -> None:
    def function(x: Tensor) -> Tensor:
        numbers = torch.arange(len(x)) + torch.full((len(x),), 3)
        return x + numbers.unsqueeze(1) + x.new_zeros(x.shape[0], 1)

    assert agrees(function, torch.randn(MOST, 8))


def test_rows_that_are_not_outermost() -> None:
    assert agrees(lambda x: x.transpose(0, 1).contiguous() + x.T.contiguous() * 2, torch.randn(MOST, 8))


@pytest.mark.parametrize(
    "looks",
    [lambda x: x[-1:], lambda x: x[0], lambda x: x[1:], lambda x: torch.cat(x.split(4)), lambda x: x @ x.T],
    ids=["last", "first", "others", "pieces", "pairs"],
)
def test_what_looks_at_some_of_the_rows_is_refused(looks: Callable[[Tensor], Tensor]) -> None:
    x = torch.ones(MOST, 8)
    with pytest.raises(NotRepeatable, match="rows"):
        recorded(lambda: looks(x))
    assert recording() is None


@pytest.mark.cpp
def test_kernels_are_played() -> None:
    def function(x: Tensor) -> Tensor:
        sums = x * 3
        return round_into(torch.empty_like(sums, dtype=torch.bfloat16), sums)

    assert agrees(function, torch.randn(MOST, 20))


@pytest.mark.cpp
def test_kernels_of_a_branch_are_on_a_tape_of_their_own() -> None:
    sums, branches = torch.randn(MOST, 20), []

    def function() -> Tensor:
        own = recording()
        assert own is not None
        y = torch.zeros(MOST, 20, dtype=torch.bfloat16)
        branches.append(own.branch(round_into, y, sums)[0])
        return y

    tape, y = recorded(function)
    tape(MOST)
    assert not y.whole.any()
    branches[0](4)
    assert torch.equal(y(4), sums[:4].bfloat16())
    assert not y.whole[4:].any()


@pytest.mark.parametrize(
    "reads",
    [
        lambda x: x * float(x[0, 0]),
        lambda x: x if (x > 0).all() else -x,
        lambda x: torch.tensor(x.tolist()),
        lambda x: torch.from_numpy(x.numpy()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
    ],
    ids=["float", "bool", "tolist", "numpy", "mask", "nonzero"],
)
def test_what_reads_numbers_is_refused(reads: Callable[[Tensor], Tensor]) -> None:
    x = torch.ones(1, MOST)
    with pytest.raises(NotRepeatable, match=r"reads numbers|some of the rows"):
        recorded(lambda: reads(x))
    assert recording() is None
    tape, y = recorded(lambda: x + 1)
    tape(3)
    assert torch.equal(y(3), x[:, :3] + 1)


def test_a_tensor_that_has_died_gives_its_place_to_the_next() -> None:
    arena, x = Arena(), torch.randn(MOST, 70)

    def function() -> Tensor:
        y = x
        for _ in range(50):
            y = y + x
        return y

    tape, y = recorded(function, arena)
    assert arena.num_bytes <= 3 * 4096
    x.normal_()
    tape(MOST)
    assert torch.equal(y.whole, function())


def test_tapes_of_one_arena_use_the_same_memory() -> None:
    arena, x = Arena(), torch.randn(MOST, 54)
    first, one = recorded(lambda: x * 2, arena)
    before = arena.num_bytes
    second, two = recorded(lambda: x[:, :53] * 3, arena)
    assert arena.num_bytes == before
    for tape, y, want in ((first, one, x * 2), (second, two, x[:, :53] * 3), (first, one, x * 2)):
        tape(MOST)
        assert torch.equal(y.whole, want)


def test_a_tensor_without_numbers() -> None:
    x = torch.ones(0, 3)
    tape, y = recorded(lambda: x + 1)
    tape(2)
    assert y(2).shape == (0, 3)


@pytest.mark.cpp
def test_a_tape_in_a_recorded_function_is_written_down_or_played() -> None:
    sums, narrow = torch.randn(MOST, 4), torch.zeros(MOST, 4, dtype=torch.bfloat16)
    inner = Recording.of_kernels(lambda: round_into(narrow, sums), MOST)
    repeated(inner, 3)
    assert torch.equal(narrow[:3], sums[:3].bfloat16())
    assert not narrow[3:].any()
    outer = Recording.of_kernels(lambda: repeated(inner, MOST), MOST)
    sums.normal_()
    outer(5)
    assert torch.equal(narrow[:5], sums[:5].bfloat16())
    assert not narrow[5:].any()


@pytest.mark.cpp
def test_kernels_that_follow_each_other_are_one_call_with_what_is_chosen_between() -> None:
    state, chosen = State(), [0]
    sources = torch.randn(MOST, 40), torch.randn(MOST, 40)
    sums, wide = torch.empty(MOST, 40), torch.empty(MOST, 40)
    narrow = torch.empty(MOST, 40, dtype=torch.bfloat16)

    def choose() -> Tape:
        source = sources[chosen[0]]
        chosen[0] += 1
        return Recording.of_kernels(lambda: sum_into(sums, source, source), MOST)

    def function() -> Tensor:
        own = recording()
        assert own is not None
        own.note(Choice(state, choose))
        return widen_into(wide, round_into(narrow, sums)).view(MOST, 8, 5)

    tape, y = recorded(function)
    assert len(tape._steps) == 1
    for number, source in enumerate(sources):
        for count in PLAYED:
            source.normal_()
            tape(count)
            want = (2 * source[:count]).bfloat16().float().view(count, 8, 5)
            assert torch.equal(y(count), want)
        assert chosen == [number + 1]
        state.change()


@pytest.mark.cpp
def test_a_tape_keeps_what_it_sums() -> None:
    own = [torch.randn(MOST, 40)]
    tape, y = recorded(lambda: own[0] + own[0])
    is_there, expected = weakref.ref(own[0]), own[0] * 2
    own.clear()
    tape(MOST)
    assert is_there() is not None
    assert torch.equal(y.whole, expected)


@pytest.mark.cpp
def test_what_is_chosen_and_is_not_kernels_alone_is_called_each_time() -> None:
    state = State()

    def function(x: Tensor) -> Tensor:
        return either(state, lambda: False, lambda v: v + 1, torch.sin, x)

    assert agrees(function, torch.randn(MOST, 40))


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
        (torch.ones(MOST, 4), 2.0),
        (torch.ones(MOST, 4), torch.ones(4)),
        (torch.ones(4, MOST).T, torch.ones(MOST, 4)),
        (torch.ones(MOST, 4), torch.ones(MOST, 4).double()),
        (torch.ones(MOST, 4).half(), torch.ones(MOST, 4).half()),
    ],
    ids=["number", "broadcast", "strided", "types", "half"],
)
def test_other_sums_are_left_to_pytorch(a: Tensor, b: Tensor | float) -> None:
    y = torch.zeros(MOST, 4, dtype=a.dtype)
    assert not sum_into(y, a, b)
    assert not y.any()
    tape, found = recorded(lambda: a + b)
    tape(MOST)
    assert torch.equal(found.whole, a + b)


def test_either_is_decided_when_the_state_is_another() -> None:
    x, is_plain, state = torch.ones(MOST), [True], State()

    def other(v: Tensor) -> Tensor:
        return torch.full_like(v, v.sum().item())

    def function() -> Tensor:
        return either(state, lambda: is_plain[0], lambda v: v + 1, other, x) * 10

    tape, y = recorded(function)
    tape(2)
    assert y(2).tolist() == [20, 20]
    is_plain[0] = False
    state.change()
    x.fill_(4)
    tape(2)
    assert y(2).tolist() == [80, 80]
    is_plain[0] = True
    tape(3)
    assert y(3).tolist() == [120, 120, 120]
    state.change()
    tape(2)
    assert y(2).tolist() == [50, 50]
