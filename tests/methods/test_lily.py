from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft import LilyConfig
from torch import Tensor, nn

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidConfig, InvalidTensors
from timbre_methods.registry import check_adapter, compile_adapter

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4},
    "shared A": {"r": 3, "stride_A": 2, "num_B": 4, "scaling": 0.4},
    "every layer": {"r": 2, "num_B": 3, "target_modules": ["q_proj", "k_proj", "o_proj", "up_proj"]},
}


@torch.no_grad()
def token_by_token(model: nn.Module, folder: Any, token_ids: Tensor, quiet: Any) -> Tensor:
    """PEFT's logits when each forward sees one token of one sequence, and a cache holds the others."""
    with quiet():
        wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()
        rows = []
        for row in token_ids:
            cache, logits = None, []
            for token in row:
                found = wrapped(token.view(1, 1), past_key_values=cache, use_cache=True)
                cache = found.past_key_values
                logits.append(found.logits[0, 0])
            rows.append(torch.stack(logits))
    return torch.stack(rows)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_lily_gives_the_logits_of_peft_token_by_token(
    llama: nn.Module,
    write_with_peft: Callable[..., Any],
    timbre_logits: Callable[..., Tensor],
    token_ids: Tensor,
    quiet: Any,
    options: dict[str, Any],
) -> None:
    """Two sequences in one forward of ours, each token for itself."""
    config = LilyConfig(task_type="CAUSAL_LM", **{"target_modules": ["q_proj", "v_proj"], **options})
    written = write_with_peft(llama, config)
    expected = token_by_token(llama, written.folder, token_ids, quiet)
    assert (expected - llama(token_ids).logits).abs().max() > 0.05

    actual = timbre_logits(llama, written, token_ids)

    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_a_forward_of_many_tokens_is_not_what_is_served(
    llama: nn.Module,
    write_with_peft: Callable[..., Any],
    peft_logits: Callable[..., Tensor],
    timbre_logits: Callable[..., Tensor],
    token_ids: Tensor,
) -> None:
    """PEFT averages over them, neighbours included: adding a neighbour changes its answer, not ours."""
    written = write_with_peft(llama, LilyConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))
    of_peft = [peft_logits(llama, written.folder, ids)[0] for ids in (token_ids, token_ids[:1])]
    ours = [timbre_logits(llama, written, ids)[0] for ids in (token_ids, token_ids[:1])]
    assert (of_peft[0] - of_peft[1]).abs().max() > 1e-3
    torch.testing.assert_close(ours[0], ours[1], rtol=0, atol=1e-5)


def test_what_does_not_fit_is_refused(site: Callable[..., Site]) -> None:
    base, stem = site(), "base_model.model.model.layers.0.self_attn.q_proj.lily_"
    raw = {"peft_type": "LILY", "r": 2, "num_B": 3}
    given = {
        stem + "A.weight": torch.ones(2, 5),
        stem + "B.weight": torch.ones(6, 6),
        stem + "router.weight": torch.ones(3, 2),
    }
    assert compile_adapter(raw, given, {base.path: base}).sites.keys() == {base.path}
    with pytest.raises(InvalidTensors, match=r"lily_B\.weight: found shape \[6, 6\], expected \[8, 6\]"):
        check_adapter({**raw, "num_B": 4}, given, {base.path: base})
    with pytest.raises(InvalidTensors, match=r"router\.weight: found shape \[2, 2\], expected \[3, 2\]"):
        check_adapter(raw, {**given, stem + "router.weight": torch.ones(2, 2)}, {base.path: base})
    with pytest.raises(InvalidConfig, match=r"num_B: .*less than or equal to 256"):
        check_adapter({**raw, "num_B": 257}, given, {base.path: base})
