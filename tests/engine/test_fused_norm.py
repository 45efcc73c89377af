"""PyTorch's `rms_norm` takes a norm's place only where it does what the norm does."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from timbre_server.engine import fused_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_norm(kind: type[nn.Module], dtype: torch.dtype) -> nn.Module:
    norm = kind(48).to(dtype)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(48, generator=torch.Generator().manual_seed(1)))
    return norm


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_norm_of_mean_squares_is_one_launch_with_the_same_result(dtype: torch.dtype) -> None:
    norm = random_norm(LlamaRMSNorm, dtype)
    x_TD = torch.randn(5, 48, generator=torch.Generator().manual_seed(2)).to(dtype)
    fused = fused_norm._fused(norm, norm.weight)
    assert fused is not None
    rounding = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(fused(x_TD), norm(x_TD), rtol=rounding, atol=rounding)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [GemmaRMSNorm, nn.LayerNorm])
def test_other_norms_go_on_themselves(kind: type[nn.Module], dtype: torch.dtype) -> None:
    norm = random_norm(kind, dtype)
    assert fused_norm._fused(norm, norm.weight) is None


def test_another_epsilon_is_seen() -> None:
    norm = random_norm(LlamaRMSNorm, torch.float32)
    norm.eps = norm.variance_epsilon
    norm.variance_epsilon = 1e-4
    norm.forward = lambda x: nn.functional.rms_norm(x, (48,), norm.weight, norm.eps)
    assert fused_norm._fused(norm, norm.weight) is None


def test_rows_of_another_type_get_what_the_module_gives() -> None:
    norm = random_norm(LlamaRMSNorm, torch.float32)
    fused = fused_norm._fused(norm, norm.weight)
    assert fused is not None
    x_TD = torch.randn(5, 48, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert torch.equal(fused(x_TD), norm(x_TD))


def test_on_a_cpu_the_module_itself_is_taken() -> None:
    norm = random_norm(LlamaRMSNorm, torch.float32)
    assert fused_norm.norm_of(norm) is norm


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_is_fused() -> None:
    norm = random_norm(LlamaRMSNorm, torch.bfloat16).to("cuda")
    assert fused_norm.norm_of(norm) is not norm
