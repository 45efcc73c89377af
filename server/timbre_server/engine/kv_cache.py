"""The paged KV cache's memory: for each layer one pool of keys and one of values.

A *slot* is the place of one token's key and value: block ``b`` of size K holds slots ``b*K .. b*K+K-1``.
Which sequence owns which block is the block pool's business (`kv_blocks.py`); here are only tensors.
Pools are not initialised: a slot is read only after it was written. Block 0 is never given to a sequence.

Legend: S slots, N rows, G KV heads, D key dim, E value dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer stores for each token. Keys and values may differ in size, and so may layers."""

    layer: int
    num_kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def elements_per_token(self) -> int:
        return self.num_kv_heads * (self.key_dim + self.value_dim)


def bytes_per_block(shapes: Sequence[LayerShape], block_size: int, dtype: torch.dtype) -> int:
    """Memory of one block over all layers."""
    return sum(shape.elements_per_token for shape in shapes) * block_size * dtype.itemsize


class KVCache:
    """Pools for ``num_blocks`` blocks, and the reused scratch that rows are gathered into."""

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.device = device
        num_slots = num_blocks * block_size
        self._keys = {s.layer: self._pool(num_slots, s.num_kv_heads, s.key_dim) for s in shapes}
        self._values = {s.layer: self._pool(num_slots, s.num_kv_heads, s.value_dim) for s in shapes}
        self._scratch: dict[str, Tensor] = {}

    def _pool(self, num_slots: int, num_kv_heads: int, dim: int) -> Tensor:
        return torch.empty(num_slots, num_kv_heads, dim, dtype=self.dtype, device=self.device)

    @property
    def num_bytes(self) -> int:
        return sum(pool.nbytes for pool in (*self._keys.values(), *self._values.values()))

    def pools(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys [S, G, D] and values [S, G, E] of a layer, themselves."""
        return self._keys[layer], self._values[layer]

    def write(self, layer: int, slots_N: Tensor, k_NGD: Tensor, v_NGE: Tensor) -> None:
        """Store rows at their slots; slots are distinct."""
        self._keys[layer].index_copy_(0, slots_N, k_NGD)
        self._values[layer].index_copy_(0, slots_N, v_NGE)

    def read(self, layer: int, slots_N: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [N, G, D] and values [N, G, E] at the slots, in scratch: valid until the next `read`.

        Scratch is reused over layers and steps because fresh buffers of this size page-fault each time.
        """
        return (
            self._gather("keys", self._keys[layer], slots_N),
            self._gather("values", self._values[layer], slots_N),
        )

    def _gather(self, name: str, pool_SGD: Tensor, slots_N: Tensor) -> Tensor:
        shape = (slots_N.shape[0], *pool_SGD.shape[1:])
        numel = slots_N.shape[0] * pool_SGD.shape[1] * pool_SGD.shape[2]
        scratch = self._scratch.get(name)
        if scratch is None or scratch.numel() < numel:
            scratch = torch.empty(numel + numel // 4, dtype=self.dtype, device=self.device)
            self._scratch[name] = scratch
        out_NGD = scratch[:numel].view(shape)
        return torch.index_select(pool_SGD, 0, slots_N, out=out_NGD)
