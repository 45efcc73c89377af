"""SoRA, IncreLoRA, Block-LoRA and TLoRA against dense matrices that are written out here."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidTensors
from timbre_methods.program import Dense, LowRank
from timbre_methods.registry import inspect_adapter, method_for

STEM = "base_model.model.model.layers.0.self_attn.q_proj"
A = torch.tensor([[1.0, 0.0, 2.0, -1.0], [0.0, 3.0, 1.0, 1.0]])
TRANSFORM = {"peft_type": "TLORA", "transform": True, "residual": False}
RESIDUAL = {"peft_type": "TLORA", "transform": False, "residual": True}
B = torch.tensor([[1.0, 2.0], [0.0, -1.0], [2.0, 0.5]])


def delta(raw: dict[str, Any], keyed: dict[str, Tensor], base: Site) -> Tensor:
    """The sum of the parts' dense matrices."""
    method = method_for(raw)
    given = {f"{STEM}.{key}": tensor for key, tensor in keyed.items()}
    parts = method.compile(method.parse(raw), given, {base.path: base}).sites[base.path]
    total = torch.zeros(base.out_features, base.in_features)
    for part in parts:
        assert isinstance(part, (LowRank, Dense))
        total = total + (part.delta_OI if isinstance(part, Dense) else part.b_OR @ part.a_RI)
    return total


@pytest.fixture
def base(site: Callable[..., Site]) -> Site:
    return site(out_features=3, in_features=4)


def test_sora_keeps_the_rank_of_before_pruning(base: Site) -> None:
    raw = {"peft_type": "SORA", "r": 8, "lora_alpha": 16}
    found = delta(raw, {"lora_A": A, "lora_B": B, "gate": torch.tensor([[0.5, 2.0]])}, base)
    torch.testing.assert_close(
        found, 2.0 * (0.5 * torch.outer(B[:, 0], A[0]) + 2 * torch.outer(B[:, 1], A[1]))
    )
    with pytest.raises(InvalidTensors, match="found rank 2, expected at most the config's r, 1"):
        delta({**raw, "r": 1}, {"lora_A": A, "lora_B": B, "gate": torch.ones(1, 2)}, base)


def test_increlora_divides_by_the_layers_own_rank(base: Site) -> None:
    raw = {"peft_type": "INCRELORA", "lora_alpha": 6, "init_r": 1, "target_r": 4}
    found = delta(raw, {"lora_A": A, "lora_B": B, "lora_E": torch.tensor([[1.0], [-1.0]])}, base)
    expected = (torch.outer(B[:, 0], A[0]) - torch.outer(B[:, 1], A[1])) * (6 / 2.00001)
    torch.testing.assert_close(found, expected)


def test_block_lora_repeats_its_a(base: Site) -> None:
    blocks = torch.stack([B, 2 * B, B - 1])
    raw = {"peft_type": "BLOCK_LORA", "r": 6, "lora_alpha": 3}
    wide_b, tall_a = torch.cat(list(blocks), dim=1), torch.cat([A, A, A])
    torch.testing.assert_close(
        delta(raw, {"blocklora_A": A, "blocklora_B": blocks}, base), 0.5 * wide_b @ tall_a
    )
    with pytest.raises(InvalidTensors, match="found 3 blocks of rank 2, expected a product of 5"):
        delta({**raw, "r": 5}, {"blocklora_A": A, "blocklora_B": blocks}, base)


def test_tlora_of_ring_rank_one_is_a_kronecker_product(base: Site) -> None:
    """The first digit runs fastest, so it is the right factor of the product."""
    first, second = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    keyed = {
        "tlora_transform.0": first[:, :, None, None],
        "tlora_transform.1": second[:, :, None, None],
    }
    expected = base.weight_OI @ (torch.kron(second, first) - torch.eye(4))
    torch.testing.assert_close(delta(TRANSFORM, keyed, base), expected)


def test_tloras_residual_is_the_trace_of_its_ring(base: Site) -> None:
    generator = torch.Generator().manual_seed(2)
    out, one, two = (torch.randn(n, 2, 2, generator=generator) for n in (3, 2, 2))
    found = delta(RESIDUAL, {"tlora_out.0": out, "tlora_in.0": one, "tlora_in.1": two}, base)
    for o in range(3):
        for i in range(4):
            torch.testing.assert_close(found[o, i], (out[o] @ one[i % 2] @ two[i // 2]).trace())


@pytest.mark.parametrize(
    ("keyed", "reason"),
    [
        (
            {"tlora_transform.0": torch.ones(3, 3, 1, 1)},
            r"found digits \[\[3, 3\]\], expected a product of 4",
        ),
        ({"tlora_out.0": torch.ones(3, 2, 2)}, "tlora_in.0 is missing"),
        ({"tlora_transform.1": torch.ones(4, 4, 1, 1)}, "is missing: found"),
        (
            {"tlora_out.0": torch.ones(3, 2, 2), "tlora_in.0": torch.ones(4, 1, 1)},
            "found ring rank 1, expected 2",
        ),
    ],
)
def test_rings_that_do_not_close_are_refused(base: Site, keyed: dict[str, Tensor], reason: str) -> None:
    with pytest.raises(InvalidTensors, match=reason):
        delta(TRANSFORM if "tlora_out.0" not in keyed else RESIDUAL, keyed, base)


def test_three_digits_are_split_with_the_first_fastest(site: Callable[..., Site]) -> None:
    wide, generator = site(out_features=3, in_features=12), torch.Generator().manual_seed(3)
    cores = [torch.randn(n, n, 2, 2, generator=generator) for n in (2, 3, 2)]
    expected = torch.empty(12, 12)
    for i in range(12):
        for j in range(12):
            one, two, three = (
                cores[0][i % 2, j % 2],
                cores[1][i // 2 % 3, j // 2 % 3],
                cores[2][i // 6, j // 6],
            )
            expected[i, j] = (one @ two @ three).trace()
    found = delta(TRANSFORM, {f"tlora_transform.{d}": core for d, core in enumerate(cores)}, wide)
    torch.testing.assert_close(found, wide.weight_OI @ expected - wide.weight_OI, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("last", [1, 2])
def test_a_transforms_rows_are_made_some_at_a_time(
    last: int, site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("timbre_methods.low_rank.tlora.ROWS_AT_ONCE", 5)
    wide, generator = site(out_features=3, in_features=8 * last), torch.Generator().manual_seed(4)
    keyed = {"tlora_transform.0": torch.randn(8, 8, 1, 1, generator=generator)}
    second = torch.ones(1, 1)
    if last > 1:
        keyed["tlora_transform.1"] = torch.randn(last, last, 1, 1, generator=generator)
        second = keyed["tlora_transform.1"][:, :, 0, 0]
    transform = torch.kron(second, keyed["tlora_transform.0"][:, :, 0, 0])
    torch.testing.assert_close(delta(TRANSFORM, keyed, wide), wide.weight_OI @ transform - wide.weight_OI)


@pytest.mark.parametrize(
    ("raw", "keyed", "reason"),
    [
        (TRANSFORM, {"transform": (64, 64, 1)}, r"found digits .*\[1, 1\].*expected each to be 2 at least"),
        (RESIDUAL, {"out": (4096, 1), "in": (4096,)}, r"out: found digits .*expected each to be 2 at least"),
        (TRANSFORM, {"transform": (16, 16, 16)}, r"product has 268435456 numbers, expected at most 67108864"),
        (
            RESIDUAL,
            {"out": (64, 64, 32), "in": (64, 64)},
            r"tlora_out: found cores whose product has 536870912",
        ),
        (
            RESIDUAL,
            {"out": (64, 64), "in": (64, 64, 32)},
            r"tlora_in: found cores whose product has 536870912",
        ),
    ],
)
def test_small_cores_of_a_huge_product_are_refused_unseen(
    raw: dict[str, Any], keyed: dict[str, tuple[int, ...]], reason: str
) -> None:
    sizes = {key: math.prod(digits) for key, digits in keyed.items()}
    weight_OI = torch.empty(sizes.get("out", 8), sizes.get("in", 4096), device="meta")
    base, header = Site("q_proj", weight_OI, None), {}
    for key, digits in keyed.items():
        for d, n in enumerate(digits):
            shape = (n, n, 64, 64) if key == "transform" else (n, 64, 64)
            header[f"base_model.model.q_proj.tlora_{key}.{d}"] = ("F32", shape)
    with pytest.raises(InvalidTensors, match=reason):
        inspect_adapter(raw, header, {base.path: base})


def test_a_last_digit_of_two_costs_no_more_than_the_file() -> None:
    """The cut goes where the halves are near each other, not before the last digit."""
    weight_OI = torch.empty(8, 4096, device="meta")
    base = Site("q_proj", weight_OI, None)
    header = {
        f"base_model.model.q_proj.tlora_transform.{d}": ("F32", (n, n, 64, 64))
        for d, n in enumerate((64, 32, 2))
    }
    assert inspect_adapter(TRANSFORM, header, {base.path: base}).prepared_bytes == 4 * 8 * 4096
