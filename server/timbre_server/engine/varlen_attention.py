"""Attention of one step as one product of sequences of any lengths: PyTorch's own `varlen_attn`, on a GPU.

Decodes and prefill chunks go to the device in one call a layer. Where the cache's blocks are of a size that
the kernel reads itself, it gets the block tables; else the keys and values are gathered to one ragged row of
sequences first. Soft caps, sinks, and keys and values of different sizes are left to `paged_attention`, whose
meaning this is. It is used only where `step_for` found at start that the two agree on this device.

Checked against `paged_attention` with a twin of the kernel, in its documented meaning, on the CPU; not yet
run on a GPU: PyTorch 2.11, which was at hand on one, reads no block tables.

Legend: T rows, L keys of all sequences together, S slots, N sequences, H query heads, G KV heads, D dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from timbre_server.engine.context import AttentionCall
from timbre_server.engine.kv_cache import KVCache
from timbre_server.engine.paged_attention import PagedStep, SequenceRows, needs_exact, visible_keys

PAGE_SIZE = 256
"""FlashAttention 2 reads blocks where they are if their size is a multiple of this."""
MAX_DIM = 256


@dataclass(frozen=True, slots=True)
class _Ragged:
    """Where the keys are, under one window: the slots of all sequences, or their blocks."""

    ends_of_keys: Tensor
    most_keys: int
    slots_L: Tensor | None
    blocks_NB: Tensor | None
    num_keys_N: Tensor | None


class VarlenStep(PagedStep):
    """A `PagedStep` whose plain products are the kernel's."""

    kernel: Callable[..., Tensor] = staticmethod(varlen_attn)  # type: ignore[assignment]

    def __init__(self, cache: KVCache, sequences: Sequence[SequenceRows]) -> None:
        super().__init__(cache, sequences)
        self._ordered = sorted(sequences, key=lambda s: s.first_row)
        self._ends_of_rows = self._ends(s.num_rows for s in self._ordered)
        self._most_rows = max(s.num_rows for s in self._ordered)
        self._ragged_by_window: dict[int | None, _Ragged] = {}

    def attend(self, call: AttentionCall) -> Tensor:
        dim, is_one_size = call.q_HTD.shape[2], call.k_GTD.shape == call.v_GTE.shape
        if needs_exact(call) or not is_one_size or dim > MAX_DIM or dim % 8:
            return super().attend(call)
        self.write(call)
        ragged = self._ragged(call.window)
        if ragged.slots_L is None:
            size = self._cache.block_size
            k, v = (pool.view(-1, size, *pool.shape[1:]) for pool in self._cache.pools(call.layer))
        else:
            k, v = self._cache.read(call.layer, ragged.slots_L)
        return self.kernel(
            call.q_HTD.transpose(0, 1).contiguous(),
            k,
            v,
            self._ends_of_rows,
            ragged.ends_of_keys,
            self._most_rows,
            ragged.most_keys,
            scale=call.scale,
            window_size=(-1 if call.window is None else call.window - 1, 0),
            enable_gqa=call.q_HTD.shape[0] != call.k_GTD.shape[0],
            seqused_k=ragged.num_keys_N,
            block_table=ragged.blocks_NB,
        )

    def _ragged(self, window: int | None) -> _Ragged:
        found = self._ragged_by_window.get(window)
        if found is None:
            is_paged = self._cache.block_size % PAGE_SIZE == 0
            found = self._blocks() if is_paged else self._gathered(window)
            self._ragged_by_window[window] = found
        return found

    def _gathered(self, window: int | None) -> _Ragged:
        """The keys that the first row of each sequence sees, and those after them."""
        keys = [visible_keys(s, None if window is None else window + s.num_rows - 1) for s in self._ordered]
        slots = [
            self._slots[s.first_row][s.end - count :] for s, count in zip(self._ordered, keys, strict=True)
        ]
        return _Ragged(self._ends(keys), max(keys), torch.cat(slots).to(self._cache.device), None, None)

    def _blocks(self) -> _Ragged:
        keys = [s.end for s in self._ordered]
        device, width = self._cache.device, max(len(s.block_table) for s in self._ordered)
        tables = [(*s.block_table, *(0,) * (width - len(s.block_table))) for s in self._ordered]
        return _Ragged(
            self._ends(keys),
            max(keys),
            None,
            torch.tensor(tables, dtype=torch.int32, device=device),
            torch.tensor(keys, dtype=torch.int32, device=device),
        )

    def _ends(self, counts: Iterable[int]) -> Tensor:
        return torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=self._cache.device)
