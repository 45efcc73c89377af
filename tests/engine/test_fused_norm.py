"""PyTorch's `rms_norm`, and C++, take a norm's place only where they do what the norm does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from timbre_server.engine import fused_norm
from timbre_server.native import library as native

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NATIVE_DTYPES = DTYPES[:2]
EPSILON = 1e-6


def random_norm(kind: type[nn.Module], dtype: torch.dtype, size: int = 48) -> nn.Module:
    norm = kind(size).to(dtype)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(size, generator=torch.Generator().manual_seed(1)))
    return norm


def random_rows(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2)).to(dtype)


def fused_in_pytorch(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """As on a GPU."""
    return fused_norm._checked(fused_norm._in_pytorch(norm.weight, EPSILON), norm, norm.weight)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_of_mean_squares_is_one_launch_with_the_same_result(dtype: torch.dtype) -> None:
    norm = random_norm(LlamaRMSNorm, dtype)
    x_TD = random_rows(5, 48, dtype=dtype)
    fused = fused_in_pytorch(norm)
    assert fused is not norm
    rounding = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(fused(x_TD), norm(x_TD), rtol=rounding, atol=rounding)


@pytest.mark.cpp
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
@pytest.mark.parametrize("size", [1, 8, 31, 64, 100, 576])
def test_in_cpp_the_result_is_the_norm_s(dtype: torch.dtype, size: int) -> None:
    norm = random_norm(LlamaRMSNorm, dtype, size)
    fused = fused_norm.norm_of(norm, native=True)
    assert fused is not norm
    x = random_rows(1, 7, 3, size, dtype=dtype)
    rounding = 4 * torch.finfo(dtype).eps
    for rows in (x, x[:, :0], x.transpose(1, 2), 1000 * x, 1e-3 * x):
        got, want = fused(rows), norm(rows)
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        torch.testing.assert_close(got, want, rtol=rounding, atol=rounding)


@pytest.mark.cpp
def test_in_cpp_a_row_is_the_same_whatever_its_neighbours_and_threads(two_threads: None) -> None:
    fused = fused_norm.norm_of(random_norm(LlamaRMSNorm, torch.float32, 256), native=True)
    x_TD = random_rows(901, 256)
    assert x_TD.numel() > native.least_work().value
    y_TD = fused(x_TD)
    for row in (0, 1, 449, 450, 451, 900):
        assert torch.equal(y_TD[row], fused(x_TD[row : row + 1])[0]), row


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [GemmaRMSNorm, nn.LayerNorm])
def test_other_norms_go_on_themselves(kind: type[nn.Module], dtype: torch.dtype) -> None:
    norm = random_norm(kind, dtype)
    assert fused_in_pytorch(norm) is norm
    assert fused_norm.norm_of(norm, native=True) is norm


def test_another_epsilon_is_seen() -> None:
    norm = random_norm(LlamaRMSNorm, torch.float32)
    norm.variance_epsilon = 1e-4
    norm.forward = lambda x: nn.functional.rms_norm(x, (48,), norm.weight, EPSILON)
    fused = fused_norm._in_pytorch(norm.weight, 1e-4)
    assert fused_norm._checked(fused, norm, norm.weight) is norm
    assert fused_norm.norm_of(norm, native=True) is norm


def test_rows_of_another_type_get_what_the_module_gives() -> None:
    norm = random_norm(LlamaRMSNorm, torch.float32)
    x_TD = random_rows(5, 48, dtype=torch.bfloat16)
    for fused in (fused_in_pytorch(norm), fused_norm.norm_of(norm, native=True)):
        assert torch.equal(fused(x_TD), norm(x_TD))


def test_on_a_cpu_without_cpp_the_module_itself_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = random_norm(LlamaRMSNorm, torch.float32)
    assert fused_norm.norm_of(norm) is norm
    half = random_norm(LlamaRMSNorm, torch.float16)
    assert fused_norm.norm_of(half, native=True) is half, "there is no C++ for it"

    def no_kernel(*args: object) -> None:
        raise native.LibraryUnavailable("no C++ compiler was found")

    monkeypatch.setattr(fused_norm, "kernel", no_kernel)
    assert fused_norm.norm_of(norm, native=True) is norm


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_is_fused() -> None:
    norm = random_norm(LlamaRMSNorm, torch.bfloat16).to("cuda")
    assert fused_norm.norm_of(norm) is not norm
