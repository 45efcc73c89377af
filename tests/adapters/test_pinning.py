"""A pin changes what a step costs and nothing else: whole requests, on the real engine, before and after."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from timbre_methods.registry import methods, prompt_methods
from timbre_server.engine.messages import AdapterUse, UnloadAdapter
from timbre_server.engine.pin_messages import PinAdapter, UnpinAdapter

METHODS_TESTS = Path(__file__).parent.parent / "methods"
PROMPT = [7, 3, 20, 41, 30, 2, 11, 5, 9]
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
BASE: tuple[AdapterUse, ...] = ()
PINNED, OTHER = (AdapterUse("pinned"),), (AdapterUse("other"),)
MIX = (AdapterUse("other", 0.4), AdapterUse("pinned", 0.5))
HALF = (AdapterUse("pinned", 0.5),)
LATER = (AdapterUse("pinned", from_position=5),)
CROWD = tuple(
    (PROMPT[at:] + PROMPT[:at], mix) for at, mix in enumerate((BASE, PINNED, OTHER, MIX, HALF, LATER))
)
ALONE = tuple((PROMPT[at:], PINNED) for at in range(4))

LoadModule = Callable[[Path], ModuleType]


@pytest.fixture(scope="module")
def tiny_models(load_module: LoadModule) -> ModuleType:
    return load_module(METHODS_TESTS / "tiny_models.py")


@pytest.fixture(scope="module")
def start(load_module: LoadModule) -> Callable[..., Any]:
    """An engine around a model, with two adapters stored."""
    bench = load_module(METHODS_TESTS / "engine_bench.py")
    pinned_engine = load_module(Path(__file__).with_name("pinned_engine.py"))

    def started(model: nn.Module, budget_bytes: int = 1 << 30, **by_method: str) -> Any:
        engine = pinned_engine.PinnedEngine(bench, model, budget_bytes)
        for seed, (digest, method) in enumerate(
            ({"pinned": "lora", "other": "fourierft"} | by_method).items()
        ):
            engine.store(digest, *an_adapter(engine, method, seed))
            engine.bring_in(digest)
        return engine

    return started


@pytest.fixture
def engine(start: Callable[..., Any], tiny_models: ModuleType) -> Any:
    return start(tiny_models.llama())


def an_adapter(
    engine: Any, method: str, seed: int = 0, *, everywhere: bool = False
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A random one, on linear layers alone or wherever its method has it."""
    generator = torch.Generator().manual_seed(seed)
    if method in prompt_methods():
        return prompt_methods()[method].example(engine.sites, engine.frame, generator)
    read = methods()[method]
    kinds = read.kinds if everywhere else {"linear"}
    return read.example({path: s for path, s in engine.sites.items() if s.kind in kinds}, generator)


def bits_of(model: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in (*model.parameters(), *model.buffers())]


def check_same(found: list[Any], expected: list[Any], **tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.token_ids == other.token_ids
        torch.testing.assert_close(one.logprobs, other.logprobs, **(tolerance or CLOSE))


@pytest.mark.parametrize(
    ("method", "family"),
    [
        ("lora", "llama"),
        ("lora", "tied_llama"),
        ("lora", "gpt2"),
        *((method, "llama") for method in ("loha", "lokr", "shira", "s2ft", "fourierft", "c3a", "vera")),
    ],
)
def test_every_row_says_the_same_while_an_adapter_is_pinned_and_after(
    start: Callable[..., Any], tiny_models: ModuleType, method: str, family: str
) -> None:
    engine = start(getattr(tiny_models, family)(), pinned=method)
    before = [engine.answers(*asked, prompt_logprobs=0) for asked in (CROWD, ALONE)]
    weights = bits_of(engine.model)

    answer = engine.pin("pinned")
    assert answer.pinned is not None
    assert answer.pinned.num_sites == len(engine.programs["pinned"].sites)
    assert engine.answers(*CROWD, prompt_logprobs=0) == before[0], "bit for bit: on the base's own weights"
    assert engine.products.rows == 0
    alone = engine.answers(*ALONE, prompt_logprobs=0)
    assert engine.products.rows > 0
    check_same(alone, before[1])

    assert engine.unpin("pinned").error_code is None
    assert all(map(torch.equal, bits_of(engine.model), weights))
    after = [engine.answers(*asked, prompt_logprobs=0) for asked in (CROWD, ALONE)]
    assert after == before, "bit for bit"


@pytest.mark.usefixtures("two_threads")
def test_a_named_mix_runs_merged_and_its_adapters_alone_do_not(engine: Any) -> None:
    asked = [(PROMPT[at:], MIX) for at in range(3)]
    before = engine.answers(*asked, prompt_logprobs=0)
    answer = engine.pin("a mix", (("pinned", 0.5), ("other", 0.4)))
    assert (answer.digest, answer.error_code) == ("a mix", None)
    check_same(engine.answers(*asked, prompt_logprobs=0), before)
    rows = engine.products.rows
    assert rows > 0
    engine.answers((PROMPT, PINNED), (PROMPT, OTHER))
    engine.answers((PROMPT, HALF))
    assert engine.products.rows == rows
    assert engine.products.threads == 1, "steps have the others"


def test_an_adapter_that_begins_within_the_prompt_runs_merged_from_there_on(engine: Any) -> None:
    before = engine.answers((PROMPT, LATER), prompt_logprobs=0)
    engine.pin("pinned")
    check_same(engine.answers((PROMPT, LATER), prompt_logprobs=0), before)
    assert engine.products.rows > 0


def test_a_bias_is_merged_with_the_weight(start: Callable[..., Any], tiny_models: ModuleType) -> None:
    engine = start(tiny_models.gpt2(), pinned="hydra", other="beft")
    for digest in ("pinned", "other"):
        asked = [(PROMPT[at:], (AdapterUse(digest),)) for at in range(3)]
        before = engine.answers(*asked, prompt_logprobs=0)
        engine.pin(digest)
        check_same(engine.answers(*asked, prompt_logprobs=0), before)
        engine.unpin(digest)
    assert engine.products.rows > 0


def test_in_16_bits_merged_weights_are_the_sum_rounded_once(
    start: Callable[..., Any], tiny_models: ModuleType
) -> None:
    engine = start(tiny_models.llama().bfloat16())
    before = engine.answers(*ALONE, prompt_logprobs=0, max_tokens=1)
    engine.pin("pinned")
    for one, other in zip(engine.answers(*ALONE, prompt_logprobs=0, max_tokens=1), before, strict=True):
        chances = [torch.tensor(answer.logprobs[:-1]).exp() for answer in (one, other)]
        torch.testing.assert_close(*chances, atol=0.03, rtol=0.1)


def test_what_was_cached_before_a_pin_is_read_after_it_and_again_when_it_ends(engine: Any) -> None:
    before = engine.answers(*ALONE)
    for change in (engine.pin, engine.unpin):
        change("pinned")
        after = engine.answers(*ALONE)
        assert [answer.cached_tokens for answer in after] == [8, 4, 4, 4]
        check_same(after, before)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("ia3", "has a Diagonal part"),
        ("oft", "has a Rotation part"),
        ("dora", "has a Diagonal part"),
        ("ln_tuning", "no plain linear layer"),
        ("trainable_tokens", "no plain linear layer"),
        ("molora", "has a Routed part"),
        ("mixlora", "has a Routed part"),
        ("prompt_tuning", "virtual tokens"),
        ("adaption_prompt", "attention"),
    ],
)
def test_what_is_more_than_a_change_of_weights_is_refused(engine: Any, method: str, words: str) -> None:
    engine.store("strange", *an_adapter(engine, method, everywhere=True))
    answer = engine.pin("strange")
    assert (answer.error_code, answer.pinned) == ("pin_not_served", None)
    assert "adapter strange cannot be merged" in answer.error_message
    assert words in answer.error_message
    assert engine.pin("pinned").error_code is None, "nothing of it is left"


def test_an_adapter_that_cannot_be_loaded_cannot_be_pinned(engine: Any) -> None:
    answer = engine.pin("nobody")
    assert (answer.error_code, answer.error_message) == ("adapter_load_failed", "nobody is not there")
    assert engine.pin("pinned").error_code is None


def test_one_is_pinned_at_a_time_and_a_second_time_changes_nothing(engine: Any) -> None:
    first = engine.pin("pinned")
    assert engine.pin("pinned") == first
    second = engine.pin("other")
    assert (second.error_code, "pinned is pinned" in second.error_message) == ("pin_conflict", True)
    wrong = engine.unpin("other")
    assert (wrong.error_code, wrong.error_message) == ("pin_conflict", "other is not pinned; pinned is")
    assert engine.core.step().stats.pinned == first.pinned
    engine.unpin("pinned")
    assert engine.core.step().stats.pinned is None
    assert engine.unpin("pinned").error_message == "pinned is not pinned; nothing is"


def test_who_waits_for_a_merge_hears_of_its_end(engine: Any) -> None:
    engine.core.take(PinAdapter("pinned", (("pinned", 1.0),)))
    engine.core.take(UnpinAdapter("pinned"))
    pins = engine.core.step().pins
    assert [(answer.asked, answer.error_code) for answer in pins] == [
        ("pin", "pin_conflict"),
        ("unpin", None),
    ]
    assert engine.pin("other").error_code is None


def test_a_request_in_flight_goes_on_through_a_pin_and_its_end(engine: Any) -> None:
    (expected,) = engine.answers((PROMPT, PINNED), max_tokens=40)
    answer = engine.ask(PROMPT, PINNED, max_tokens=40)
    lengths = []
    for change in (lambda: engine.turn(), lambda: engine.pin("pinned"), lambda: engine.unpin("pinned")):
        change()
        lengths.append(len(answer.token_ids))
        engine.turn()
        engine.turn()
    while engine.core.has_work:
        engine.turn()
    assert 0 < lengths[0] < lengths[1] < lengths[2] < 40
    assert engine.products.rows > 0
    check_same([answer], [expected])


def test_the_base_s_own_weights_are_read_while_another_is_merged(
    start: Callable[..., Any], tiny_models: ModuleType
) -> None:
    engine, fresh = start(tiny_models.llama()), start(tiny_models.llama())
    assert engine.pin("pinned").error_code is None
    engine.answers(*ALONE)
    for method in ("dora", "hira", "pissa", "svft"):  # They read W where they are made, or when they load.
        asked = [(PROMPT[at:], (AdapterUse(method),)) for at in range(2)]
        for each in (engine, fresh):
            each.store(method, *an_adapter(engine, method))
        assert engine.answers(*asked, prompt_logprobs=0) == fresh.answers(*asked, prompt_logprobs=0)


def test_a_deleted_adapter_is_unpinned_and_leaves(engine: Any) -> None:
    engine.pin("a mix", (("other", 0.4), ("pinned", 0.5)))
    engine.core.take(UnloadAdapter("pinned"))
    output = engine.core.step()
    assert output.stats.pinned is None
    assert [(gone.digest, gone.reason) for gone in output.unloaded] == [("pinned", "unloaded")]
    assert engine.adapters.resident == ("other",)
    assert engine.pin("other").error_code is None


def test_a_pin_goes_with_the_name_of_its_mix(engine: Any) -> None:
    engine.pin("a mix", (("other", 0.4), ("pinned", 0.5)))
    engine.core.take(UnloadAdapter("a mix"))
    assert engine.core.step().stats.pinned is None
    assert set(engine.adapters.resident) == {"other", "pinned"}


def test_an_adapter_that_is_being_deleted_is_not_pinned(engine: Any) -> None:
    engine.ask(PROMPT, PINNED, max_tokens=20)
    engine.turn()
    engine.core.take(UnloadAdapter("pinned"))
    answer = engine.pin("pinned")
    assert (answer.error_code, answer.error_message) == ("pin_conflict", "pinned is being deleted")
    gone = engine.turn_until(lambda output: bool(output.unloaded)).unloaded
    assert [each.digest for each in gone] == ["pinned"]


def test_merged_weights_take_their_room_of_the_budget(
    start: Callable[..., Any], tiny_models: ModuleType
) -> None:
    model = tiny_models.llama()
    roomy = start(model)
    merged_bytes = roomy.pin("pinned").pinned.merged_bytes
    sizes = {digest: program.prepared_bytes for digest, program in roomy.programs.items()}
    own = sizes["pinned"]

    cramped = start(model, merged_bytes + own - 1)
    answer = cramped.pin("pinned")
    assert answer.error_code == "pin_not_served"
    assert f"take {merged_bytes} bytes" in answer.error_message
    assert f"budget of {merged_bytes + own - 1} bytes" in answer.error_message
    assert set(cramped.adapters.resident) == {"pinned", "other"}, "nobody has left for nothing"

    exact = start(model, merged_bytes + own)
    assert exact.pin("pinned").error_code is None
    assert exact.adapters.resident == ("pinned",), "the idle one left; the pinned one cannot"
    why = exact.bring_in("other") or ""
    assert ("with what is pinned there" in why, why.endswith("or unpin that")) == (True, True)
    assert exact.adapters.resident == ("pinned",)
    exact.unpin("pinned")
    assert exact.bring_in("other") is None
