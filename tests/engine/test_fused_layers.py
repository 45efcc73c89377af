"""Which models have modules replaced, and by what means, is chosen once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from timbre_server.engine.attention import install_attention
from timbre_server.engine.fused_layers import fuse_layers
from timbre_server.engine.probe import probe
from timbre_server.native import library as native

TinyModel = Callable[[str], PreTrainedModel]


def is_changed(model: PreTrainedModel, kernels: str) -> bool:
    install_attention(model)
    layers = probe(model).layers
    before = [type(module) for module in model.modules()]
    fuse_layers(model, layers, kernels)
    return [type(module) for module in model.modules()] != before


@pytest.mark.cpp
def test_a_model_on_a_cpu_is_served_by_cpp_alone(tiny_model: TinyModel) -> None:
    assert is_changed(tiny_model("llama"), "native")
    assert is_changed(tiny_model("llama").bfloat16(), "native")
    assert not is_changed(tiny_model("llama").half(), "native")
    assert not is_changed(tiny_model("llama"), "torch")
    assert not is_changed(tiny_model("llama"), "triton"), "which runs on GPUs"


def test_without_a_compiler_nothing_is_replaced(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_kernel(*args: object) -> None:
        raise native.LibraryUnavailable("no C++ compiler was found")

    monkeypatch.setattr("timbre_server.engine.layer_kernels.kernel", no_kernel)
    assert not is_changed(tiny_model("llama"), "native")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu_triton_serves_every_type(dtype: torch.dtype, tiny_model: TinyModel) -> None:
    pytest.importorskip("triton")
    assert is_changed(tiny_model("llama").to("cuda", dtype), "triton")
    assert not is_changed(tiny_model("llama").to("cuda", dtype), "torch")
