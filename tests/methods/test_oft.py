from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import OFTConfig
from torch import Tensor, nn

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidConfig, InvalidTensors, UnsupportedMethod
from timbre_methods.registry import check_adapter, method_for

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

OPTIONS = {
    "series": {"oft_block_size": 8},
    "two terms": {"oft_block_size": 4, "num_cayley_neumann_terms": 2},
    "three terms": {"oft_block_size": 4, "num_cayley_neumann_terms": 3},
    "four terms": {"oft_block_size": 4, "num_cayley_neumann_terms": 4},
    "eight terms": {"oft_block_size": 4, "num_cayley_neumann_terms": 8},
    "exact": {"oft_block_size": 8, "use_cayley_neumann": False},
    "number of blocks": {"oft_block_size": 0, "r": 6},
    "one block": {"oft_block_size": 0, "r": 1, "target_modules": ["q_proj"]},
    "shared": {"oft_block_size": 6, "block_share": True},
    "constrained": {"oft_block_size": 4, "coft": True, "eps": 0.6},
    "constrained and shared": {"oft_block_size": 4, "coft": True, "eps": 0.3, "block_share": True},
}


@pytest.mark.filterwarnings("ignore:Invalid `.*`.*Adjusted:UserWarning")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_oft_gives_the_logits_of_peft(
    llama: nn.Module, agrees_with_peft: Callable[..., None], options: dict[str, Any]
) -> None:
    agrees_with_peft(llama, OFTConfig(**{"target_modules": LAYERS, **options}), std=0.15)


@pytest.mark.parametrize("base", ["llama", "tied_llama", "gemma2"])
@pytest.mark.parametrize(
    "options",
    [{"block_share": True}, {"coft": True, "eps": 0.6, "use_cayley_neumann": False}],
    ids=["shared", "constrained"],
)
def test_oft_on_an_embedding_gives_the_logits_of_peft(
    base: str,
    options: dict[str, Any],
    request: pytest.FixtureRequest,
    agrees_with_peft: Callable[..., None],
) -> None:
    config = OFTConfig(oft_block_size=4, target_modules=["embed_tokens", "v_proj"], **options)
    agrees_with_peft(request.getfixturevalue(base), config, std=0.15)


def test_oft_on_a_bf16_base_is_as_near_as_peft(llama: nn.Module, agrees_in_bf16: Callable[..., None]) -> None:
    agrees_in_bf16(llama, OFTConfig(oft_block_size=2, target_modules=LAYERS), std=0.1)


RAW = {"peft_type": "OFT", "peft_version": "0.21.2", "oft_block_size": 2}
NAME = "base_model.model.model.layers.0.self_attn.q_proj.oft_R.weight"


def blocks(raw: dict[str, Any], entries_NE: Tensor, base: Site) -> Tensor:
    method = method_for(raw)
    [part] = method.compile(method.parse(raw), {NAME: entries_NE}, {base.path: base}).sites[base.path]
    return part.blocks_FSBB


def test_the_series_turns_against_the_exact_rotation(site: Callable[..., Site]) -> None:
    base, entries_NE = site(in_features=2), torch.tensor([[0.01]])
    series = blocks(RAW, entries_NE, base)[0, 0]
    exact = blocks({**RAW, "use_cayley_neumann": False}, entries_NE, base)[0, 0]
    torch.testing.assert_close(series @ exact, torch.eye(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(series, torch.tensor([[0.9998, -0.02], [0.02, 0.9998]]), atol=1e-5, rtol=0)


def test_a_block_of_zeros_is_no_rotation_even_when_constrained(site: Callable[..., Site]) -> None:
    raw = {**RAW, "coft": True, "eps": 0.0}
    assert torch.equal(blocks(raw, torch.zeros(2, 1), site(in_features=4)), torch.eye(2).expand(1, 2, 2, 2))


@pytest.mark.parametrize("version", [None, "0.17.1", "0.9.0", "0.18.0.dev0", "newest", 18])
def test_the_series_of_older_pefts_is_refused(version: object) -> None:
    raw = {**RAW, "peft_version": version}
    with pytest.raises(UnsupportedMethod, match=r"before 0\.18 the series was another one"):
        method_for(raw).parse(raw)
    method_for(raw).parse({**raw, "use_cayley_neumann": False})


@pytest.mark.parametrize("version", ["0.18.0", "0.18.1", "0.21.2", "1.0", "0.18.0@abc"])
def test_the_series_since_is_read(version: str) -> None:
    assert method_for(RAW).parse({**RAW, "peft_version": version}).num_cayley_neumann_terms == 5


def test_what_oft_does_not_have_is_refused(site: Callable[..., Site]) -> None:
    base = site(in_features=6)
    with pytest.raises(InvalidConfig, match="num_cayley_neumann_terms"):
        method_for(RAW).parse({**RAW, "num_cayley_neumann_terms": 10**6})
    for shape in [(3, 2), (2, 6), (2, 1), (1, 1)]:
        with pytest.raises(InvalidTensors, match=r"found shape .*expected .* divides 6, each"):
            blocks(RAW, torch.zeros(shape), base)
    with pytest.raises(InvalidTensors, match=r"divides 6, shared by all"):
        blocks({**RAW, "block_share": True}, torch.zeros(3, 1), base)
    both = {NAME: torch.zeros(3, 1), NAME.replace("oft_R", "oft_embedding_R"): torch.zeros(3, 1)}
    with pytest.raises(InvalidTensors, match=r"oft_embedding_R\.weight is surplus: a linear layer has oft_R"):
        method_for(RAW).compile(method_for(RAW).parse(RAW), both, {base.path: base})


def test_values_that_no_rotation_can_be_solved_for_are_refused(site: Callable[..., Site]) -> None:
    """At 1e20 the I of I + S is rounded away, and a skew-symmetric matrix of three rows has no inverse."""
    base = site(in_features=6)
    raw = {**RAW, "use_cayley_neumann": False}
    given = {NAME: torch.full((2, 3), 1e20)}
    with pytest.raises(
        InvalidTensors, match=r"oft_R\.weight: found values up to 1e\+20, too large for a rot"
    ):
        check_adapter(raw, given, {base.path: base})
    check_adapter(raw, {NAME: torch.ones(2, 3)}, {base.path: base})
