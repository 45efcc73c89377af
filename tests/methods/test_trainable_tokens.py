from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, TrainableTokensConfig
from torch import Tensor, nn

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidConfig, InvalidTensors
from timbre_methods.program import Block, TokenRows
from timbre_methods.registry import compile_adapter, method_for

TOKENS = [9, 3, 40, 17, 26, 8, 55, 1, 60]
TABLE = torch.arange(28.0).view(7, 4)
SITES = {
    "embed": Site("embed", TABLE.T, None, "embedding", is_transposed=True),
    "head": Site("head", TABLE, None, tied_to="embed"),
    "c_proj": Site("c_proj", TABLE.T, None, is_transposed=True),
}
RAW = {"peft_type": "TRAINABLE_TOKENS", "token_indices": [5, 2]}
KEY = "base_model.model.{}.trainable_tokens_delta"


@pytest.mark.parametrize("base", ["llama", "tied_llama", "gemma2"])
def test_trained_tokens_give_the_logits_of_peft(
    base: str, request: pytest.FixtureRequest, agrees_with_peft: Callable[..., None]
) -> None:
    agrees_with_peft(request.getfixturevalue(base), TrainableTokensConfig(token_indices=TOKENS))


def test_trained_tokens_of_gpt2_give_the_logits_of_peft(
    gpt2: nn.Module, agrees_with_peft: Callable[..., None]
) -> None:
    agrees_with_peft(gpt2, TrainableTokensConfig(token_indices=TOKENS, target_modules=["wte"]))


def test_trained_tokens_of_embedding_and_head_give_the_logits_of_peft(
    llama: nn.Module, agrees_with_peft: Callable[..., None]
) -> None:
    names = ["embed_tokens", "lm_head"]
    agrees_with_peft(llama, TrainableTokensConfig(token_indices=TOKENS, target_modules=names))


def test_trained_tokens_on_a_bf16_base_are_as_near_as_peft(
    tied_llama: nn.Module, agrees_in_bf16: Callable[..., None]
) -> None:
    agrees_in_bf16(tied_llama, TrainableTokensConfig(token_indices=TOKENS))


@pytest.mark.parametrize("base", ["llama", "tied_llama", "gemma2"])
@pytest.mark.parametrize(
    "indices", [TOKENS, {"embed_tokens": TOKENS[:4], "lm_head": TOKENS[2:]}], ids=["one list", "two lists"]
)
def test_tokens_trained_beside_lora_give_the_logits_of_peft(
    base: str, indices: Any, request: pytest.FixtureRequest, agrees_with_peft: Callable[..., None]
) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=indices)
    agrees_with_peft(request.getfixturevalue(base), config)


def compiled(tensors: dict[str, Tensor], **options: Any) -> Any:
    return compile_adapter({**RAW, **options}, tensors, SITES).sites


def test_rows_come_in_the_order_of_the_list_and_are_kept_by_token() -> None:
    rows_KO = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    parts = compiled({KEY.format("embed"): rows_KO})
    (embed,), (head,) = parts["embed"], parts["head"]
    assert isinstance(embed, TokenRows)
    assert embed.tokens_K.tolist() == [2, 5]
    assert torch.equal(embed.rows_KO, rows_KO.flip(0) - TABLE[[2, 5]])
    assert isinstance(head, Block)
    assert (head.side, head.index_N.tolist(), head.out_features) == ("output", [2, 5], 7)
    assert torch.equal(head.block, embed.rows_KO)


def test_rows_of_the_heads_own_come_before_those_of_its_embedding() -> None:
    parts = compiled({KEY.format("embed"): torch.zeros(2, 4), KEY.format("head"): torch.ones(2, 4)})
    assert torch.equal(parts["head"][0].block, 1 - TABLE[[2, 5]])
    assert list(compiled({KEY.format("head"): torch.ones(2, 4)})) == ["head"]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([5, 5], "a token is listed twice"),
        ([5, 7], "found the token 7, expected 0 to 6"),
        ([5, 2, 1], r"found shape \[2, 4\], expected \[3, 4\]"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(tokens: list[int], message: str) -> None:
    with pytest.raises(InvalidTensors, match=message):
        compiled({KEY.format("embed"): torch.zeros(2, 4)}, token_indices=tokens)


def test_a_layer_without_a_row_for_each_token_is_refused() -> None:
    with pytest.raises(InvalidTensors, match=r"c_proj\.trainable_tokens_delta is surplus"):
        compiled({KEY.format("c_proj"): torch.zeros(2, 4)})


@pytest.mark.parametrize("tokens", [None, [], [-1], [1.0], ["1"], [2**40], "3"])
def test_a_list_of_anything_but_tokens_is_refused(tokens: object) -> None:
    with pytest.raises(InvalidConfig, match="token_indices"):
        method_for(RAW).parse({**RAW, "token_indices": tokens})
