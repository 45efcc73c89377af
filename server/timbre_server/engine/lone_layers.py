"""What counts as an embedding or a norm of the base model that adapters may change, by what it does.

An embedding looks the step's token ids up; a table of positions reads other numbers. A norm computes
``w ∘ x̂ + b`` of the one tensor that it is given, row by row.

Legend: T rows, V vocabulary, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from timbre_server.adapters.adapted_embedding import scale_of
from timbre_server.adapters.adapted_norm import is_norm_of
from timbre_server.adapters.groups import LoneLayer
from timbre_server.engine.linears import bias_of
from timbre_server.engine.messages import SiteShape


def may_be_lone(module: nn.Module) -> bool:
    """Whether it is worth looking at what a module reads."""
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.Embedding) or (isinstance(weight, nn.Parameter) and weight.ndim == 1)


def lone_layer(path: str, module: nn.Module, x: Tensor, token_ids_T: Tensor) -> LoneLayer | None:
    """What a module is that read ``x`` when the model was given these tokens, all different."""
    if isinstance(module, nn.Embedding):
        reads_tokens = module.max_norm is None and torch.equal(x.flatten(), token_ids_T)
        return LoneLayer(path, "embedding") if reads_tokens else None
    rows = _rows_per_token(x, len(token_ids_T))
    return LoneLayer(path, "norm", rows) if rows and is_norm_of(module, x) else None


def lone_shape(layer: LoneLayer, module: nn.Module) -> SiteShape:
    weight = lone_weight_of(module)
    is_embedding = layer.kind == "embedding"
    return SiteShape(
        layer.path,
        weight.shape[0],
        weight.shape[-1],
        bias_of(module) is not None,
        kind=layer.kind,
        is_transposed=is_embedding,
        scale=scale_of(module) if is_embedding else 1.0,
    )


def lone_weight_of(module: nn.Module) -> Tensor:
    """Of an embedding the transposed table [D, V], of a norm its weight [D]: views of the module's own."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if weight.ndim == 2 else weight


def _rows_per_token(x: Tensor, num_tokens: int) -> int:
    """How many consecutive rows of x belong to each token; 0 where the rows are in another order."""
    if x.ndim == 2 and x.shape[0] == num_tokens:
        return 1
    if x.ndim < 3 or x.shape[:2] != (1, num_tokens) or num_tokens in x.shape[2:-1]:
        return 0
    return x.shape[2:-1].numel()
