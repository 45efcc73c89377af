from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import BOFTConfig
from peft.tuners.boft import layer as peft_layer
from torch import Tensor, nn

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidConfig, InvalidTensors
from timbre_methods.registry import check_adapter, method_for

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FROM_HIDDEN = ["q_proj", "k_proj", "v_proj", "gate_proj"]

OPTIONS = {
    "block size": {"boft_block_size": 2},
    "odd blocks": {"boft_block_size": 3, "target_modules": FROM_HIDDEN},
    "number of blocks": {"boft_block_size": 0, "boft_block_num": 2},
    "one block": {"boft_block_size": 0, "boft_block_num": 1, "target_modules": ["q_proj"]},
    "factors of which one is trained": {"boft_block_size": 2, "boft_n_butterfly_factor": 2},
}

FACTORS = {
    "two": {"boft_block_size": 4, "boft_n_butterfly_factor": 2},
    "three": {"boft_block_size": 4, "boft_n_butterfly_factor": 3},
    "four by number": {"boft_block_size": 0, "boft_block_num": 8, "boft_n_butterfly_factor": 4},
}


class CompiledExtension:
    """What PEFT's CUDA extension computes: blocks [F, S, B, B] laid along diagonals."""

    def forward(self, blocks_FSBB: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*factor) for factor in blocks_FSBB])]


@pytest.fixture
def without_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a CUDA compiler, which is not even looked for."""
    monkeypatch.setattr(peft_layer, "get_fbd_cuda", lambda: None)


@pytest.mark.usefixtures("without_extension")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_boft_gives_the_logits_of_peft(
    llama: nn.Module, agrees_with_peft: Callable[..., None], options: dict[str, Any]
) -> None:
    agrees_with_peft(llama, BOFTConfig(**{"target_modules": LAYERS, **options}), std=0.3)


@pytest.mark.parametrize("options", FACTORS.values(), ids=FACTORS)
def test_butterflies_give_the_logits_of_peft_with_its_extension(
    llama: nn.Module,
    agrees_with_peft: Callable[..., None],
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(peft_layer, "get_fbd_cuda", CompiledExtension)
    agrees_with_peft(llama, BOFTConfig(target_modules=FROM_HIDDEN, **options), std=0.3)


@pytest.mark.usefixtures("without_extension")
def test_boft_on_a_bf16_base_is_as_near_as_peft(
    llama: nn.Module, agrees_in_bf16: Callable[..., None]
) -> None:
    agrees_in_bf16(llama, BOFTConfig(boft_block_size=2, target_modules=LAYERS), std=0.1)


RAW = {"peft_type": "BOFT", "boft_block_size": 2, "boft_n_butterfly_factor": 2}
STEM = "base_model.model.model.layers.0.self_attn.q_proj"


def compiled(raw: dict[str, Any], free_FSBB: Tensor, base: Site) -> Any:
    method = method_for(raw)
    given = {f"{STEM}.boft_R": free_FSBB, f"{STEM}.boft_s": torch.full((base.out_features, 1), 3.0)}
    return method.compile(method.parse(raw), given, {base.path: base}).sites[base.path]


def test_the_bases_bias_is_not_scaled(site: Callable[..., Site], evaluate: Any) -> None:
    base, free_FSBB = site(bias=True, in_features=8), torch.zeros(2, 4, 2, 2)
    x_TI = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    y_TO = evaluate.run_parts(base, compiled(RAW, free_FSBB, base), x_TI)
    torch.testing.assert_close(y_TO, 3 * x_TI @ base.weight_OI.T + base.bias_O)


def test_the_symmetric_half_of_a_block_means_nothing(site: Callable[..., Site]) -> None:
    base, free_FSBB = site(in_features=8), torch.randn(2, 4, 2, 2)
    [part], [same] = (
        compiled(RAW, free, base) for free in (free_FSBB, free_FSBB + torch.ones(2, 2) + 7 * torch.eye(2))
    )
    torch.testing.assert_close(part.blocks_FSBB, same.blocks_FSBB)


def test_what_does_not_fit_is_refused(site: Callable[..., Site]) -> None:
    base = site(in_features=6)
    with pytest.raises(InvalidTensors, match=r"found 3 factors, expected 1 or the config's 2"):
        compiled(RAW, torch.zeros(3, 3, 2, 2), base)
    with pytest.raises(InvalidTensors, match=r"found 2 factors of blocks of 2, expected .* divides the 6"):
        compiled(RAW, torch.zeros(2, 3, 2, 2), base)
    with pytest.raises(InvalidTensors, match=r"found 2 factors of blocks of 3, expected an even size"):
        compiled({**RAW, "boft_block_size": 3}, torch.zeros(2, 2, 3, 3), base)
    with pytest.raises(InvalidTensors, match=r"found 6 inputs, expected a multiple of .*boft_block_size 4"):
        compiled({**RAW, "boft_block_size": 4}, torch.zeros(1, 1, 4, 4), base)
    with pytest.raises(InvalidConfig, match="boft_block_num=3, expected one of them to be 0"):
        method_for(RAW).parse({**RAW, "boft_block_num": 3})


def test_values_that_no_rotation_can_be_solved_for_are_refused(site: Callable[..., Site]) -> None:
    base, raw = site(in_features=6), {"peft_type": "BOFT", "boft_block_size": 3}
    given = {f"{STEM}.boft_s": torch.ones(6, 1), f"{STEM}.boft_R": torch.full((1, 2, 3, 3), 2e20).triu()}
    with pytest.raises(InvalidTensors, match=r"boft_R: found values up to 1e\+20, too large for a rotation"):
        check_adapter(raw, given, {base.path: base})
    check_adapter(raw, {**given, f"{STEM}.boft_R": torch.ones(1, 2, 3, 3).triu()}, {base.path: base})
