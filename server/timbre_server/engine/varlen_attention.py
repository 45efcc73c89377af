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

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from timbre_server.engine.context import AttentionCall, AttentionContext
from timbre_server.engine.kv_cache import KVCache, LayerShape
from timbre_server.engine.native_attention import NUMBERS, NativeStep
from timbre_server.engine.paged_attention import PagedStep, SequenceRows, needs_exact, visible_keys
from timbre_server.native.library import LibraryUnavailable

_log = logging.getLogger(__name__)

PAGE_SIZE = 256
"""FlashAttention 2 reads blocks where they are if their size is a multiple of this."""
MAX_DIM = 256
_TOLERANCES = {2: 2e-2, 4: 1e-4}
"""Of values around 1, by bytes of one."""
_CHECKED = ((21, 21), (1, 18), (1, 3), (6, 19), (1, 1))
"""Rows and keys of the sequences that `agrees` compares."""

StepKind = Callable[[KVCache, Sequence[SequenceRows]], AttentionContext]


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


def step_for(cache: KVCache, shapes: Sequence[LayerShape], *, native: bool = False) -> StepKind:
    """The fastest kind of step that gives on this device what `PagedStep` gives.

    ``native``: C++ may be used on a CPU.
    """
    if native and cache.device.type == "cpu" and cache.dtype in NUMBERS:
        return _native_or_padded(cache, shapes)
    if cache.device.type != "cuda" or cache.dtype.itemsize != 2:
        return PagedStep
    try:
        agree = agrees(VarlenStep, cache, shapes)
    except TypeError:
        _log.info("attention: padded groups (PyTorch %s reads no block tables)", torch.__version__)
        return PagedStep
    except (RuntimeError, ValueError):  # No such kernel for this device.
        _log.warning("PyTorch's variable-length attention does not run here", exc_info=True)
        agree = False
    _log.info("attention: %s", "variable-length kernel" if agree else "padded groups")
    return VarlenStep if agree else PagedStep


def _native_or_padded(cache: KVCache, shapes: Sequence[LayerShape]) -> StepKind:
    try:
        why_not = "" if agrees(NativeStep, cache, shapes) else "C++ computes something else than PyTorch here"
    except LibraryUnavailable as error:
        why_not = str(error)
    if why_not:
        _log.warning("attention: padded groups (%s)", why_not)
        return PagedStep
    _log.info("attention: single rows in C++")
    return NativeStep


@torch.inference_mode()
def agrees(
    kind: StepKind,
    cache: KVCache,
    shapes: Sequence[LayerShape],
    checked: Sequence[tuple[int, int]] = _CHECKED,
) -> bool:
    """Whether a kind of step computes what `PagedStep` does, with and without a window, for a cache of this
    block size, dtype and device. Works on a small cache of its own, with sequences of so many rows and keys
    as ``checked`` says."""
    size, tolerance = cache.block_size, _TOLERANCES[cache.dtype.itemsize]
    sequences, first_row, next_block = [], 0, 1
    for num_rows, num_keys in checked:
        blocks = tuple(range(next_block, next_block + -(-num_keys // size)))
        sequences.append(SequenceRows(first_row, num_rows, num_keys - num_rows, blocks))
        first_row, next_block = first_row + num_rows, next_block + len(blocks)
    own = KVCache(shapes, num_blocks=next_block, block_size=size, dtype=cache.dtype, device=cache.device)
    for shape in {(s.num_kv_heads, s.key_dim, s.value_dim): s for s in shapes}.values():
        for pool in own.pools(shape.layer):
            pool.normal_()
        for window in (None, 5):
            call = _random_call(shape, first_row, window, own)
            want, got = (each(own, sequences).attend(call) for each in (PagedStep, kind))
            if not torch.allclose(got.float(), want.float(), atol=tolerance, rtol=tolerance):
                return False
    return True


def _random_call(shape: LayerShape, num_rows: int, window: int | None, cache: KVCache) -> AttentionCall:
    def random(heads: int, dim: int) -> Tensor:
        return torch.randn(heads, num_rows, dim, dtype=cache.dtype, device=cache.device)

    heads = shape.num_kv_heads
    return AttentionCall(
        shape.layer,
        random(2 * heads, shape.key_dim),
        random(heads, shape.key_dim),
        random(heads, shape.value_dim),
        scale=shape.key_dim**-0.5,
        window=window,
    )
