"""Adapted embeddings and norms: what they ask of a module, and who gets what."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm, Gemma2TextScaledWordEmbedding
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from timbre_methods.program import AdapterProgram, Diagonal, Part, Sparse, TokenRows
from timbre_server.adapters.adapted_embedding import scale_of
from timbre_server.adapters.adapted_model import AdaptedModel
from timbre_server.adapters.adapted_norm import is_norm_of
from timbre_server.adapters.groups import LoneLayer
from timbre_server.operators.row_table import RowTable, Span

SIZE, VOCABULARY = 6, 9
NORMS = {
    "rms": lambda: LlamaRMSNorm(SIZE),
    "gemma": lambda: Gemma2RMSNorm(SIZE),
    "layer": lambda: nn.LayerNorm(SIZE),
}


class Network(nn.Module):
    """An embedding, scaled by 4, a norm of its rows and a norm of each of two halves of a row."""

    def __init__(self, norm: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = Gemma2TextScaledWordEmbedding(VOCABULARY, SIZE, 0, embed_scale=4.0)
        self.norm = norm
        self.halves = nn.LayerNorm(SIZE // 2)
        for parameter in self.parameters():
            nn.init.normal_(parameter)
        self.to(dtype)

    def forward(self, ids_1T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        embedded = self.embed(ids_1T)
        normed = self.norm(embedded)
        return embedded, normed, self.halves(normed.view(1, -1, 2, SIZE // 2))


LONE = [LoneLayer("embed", "embedding"), LoneLayer("norm", "norm"), LoneLayer("halves", "norm", 2)]


def new_weight(weight_D: Tensor) -> tuple[Tensor, Part]:
    """Another weight of a norm, and the part that makes it."""
    change_D = torch.linspace(-1, 1, len(weight_D))
    ends = torch.arange(len(weight_D) + 1)
    return weight_D + change_D, Sparse(ends, ends[:-1].int(), change_D, len(weight_D))


@pytest.mark.parametrize("name", NORMS)
def test_each_row_gets_its_own_layers_and_base_rows_keep_every_bit(name: str) -> None:
    base, model, changed = Network(NORMS[name]()), Network(NORMS[name]()), Network(NORMS[name]())
    adapted = AdaptedModel(model, [], lone=LONE)
    row_K = torch.arange(float(SIZE))
    shift = Diagonal("output", torch.ones(SIZE // 2), torch.full((SIZE // 2,), 0.5))
    parts: dict[str, tuple[Part, ...]] = {
        "embed": (TokenRows(torch.tensor([3, 5]), torch.stack([row_K, -row_K])),)
    }
    with torch.inference_mode():
        changed.embed.weight[[3, 5]] += torch.stack([row_K, -row_K])
        for path in ("norm", "halves"):
            weight, part = new_weight(base.get_parameter(f"{path}.weight"))
            changed.get_parameter(f"{path}.weight").copy_(weight)
            parts[path] = (part, shift) if path == "halves" else (part,)
        changed.halves.bias += 0.5
        adapted.put(0, AdapterProgram(parts))
        ids_1T = torch.tensor([[3, 1, 5, 3, 3]])
        table = RowTable([Span(1), Span(3, ((0, 1.0),)), Span(1)])
        adapted.set_rows(table, table)
        outputs, as_base, as_changed = model(ids_1T), base(ids_1T), changed(ids_1T)
        adapted.clear_rows()
        assert all(torch.equal(y, b) for y, b in zip(model(ids_1T), as_base, strict=True))
    for y, b, c in zip(outputs, as_base, as_changed, strict=True):
        assert torch.equal(y[0, [0, 4]], b[0, [0, 4]])
        torch.testing.assert_close(y[0, 1:4], c[0, 1:4], atol=1e-5, rtol=1e-5)
        assert (y[0, [1, 3]] - b[0, [1, 3]]).abs().max() > 0.1


def test_half_precision_rounds_the_sum_once() -> None:
    model, base = Network(LlamaRMSNorm(SIZE), torch.bfloat16), Network(LlamaRMSNorm(SIZE), torch.bfloat16)
    adapted = AdaptedModel(model, [], lone=LONE)
    rows_KO = torch.randn(1, SIZE)
    adapted.put(0, AdapterProgram({"embed": (TokenRows(torch.tensor([3]), rows_KO),)}))
    table = RowTable([Span(1, ((0, 1.0),)), Span(1)])
    ids_1T = torch.tensor([[3, 3]])
    with torch.inference_mode():
        adapted.set_rows(table, table)
        y, expected = model.embed(ids_1T)[0], base.embed(ids_1T)[0]
        adapted.clear_rows()
    assert torch.equal(y[1], expected[1])
    assert torch.equal(y[0], (expected[0].float() + 4 * rows_KO[0]).bfloat16())


def test_a_module_is_asked_for_its_scale() -> None:
    assert scale_of(nn.Embedding(5, 4)) == 1.0
    assert scale_of(nn.Embedding(5, 4, padding_idx=2)) == 1.0
    assert scale_of(Gemma2TextScaledWordEmbedding(5, 4, 0, embed_scale=3.5)) == 3.5
    assert scale_of(Gemma2TextScaledWordEmbedding(5, 4, 0, embed_scale=3.5).bfloat16()) == 3.5


class Gated(nn.Module):
    """Linear in w only where x is positive: no norm, whatever its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(SIZE))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.weight * x).sigmoid()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_norm_is_known_by_what_it_does(dtype: torch.dtype) -> None:
    x = torch.randn(1, 7, SIZE).to(dtype)
    for make in NORMS.values():
        norm = make()
        nn.init.normal_(norm.weight)
        assert is_norm_of(norm.to(dtype), x)
    others = [Gated(), nn.PReLU(SIZE), nn.LayerNorm(SIZE, elementwise_affine=False), nn.Linear(SIZE, SIZE)]
    assert not any(is_norm_of(module.to(dtype), x) for module in others)
    assert not is_norm_of(nn.LayerNorm(3).to(dtype), x)
