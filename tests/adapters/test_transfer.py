"""Tensors on their way to the device: whole, in their own storage, and never overtaken on the way."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from timbre_server.adapters.transfer import (
    STAGING_BYTES,
    StreamTransfer,
    Transfer,
    copy_staged,
    step_aside,
    transfer_to,
)
from timbre_server.engine.decode_graphs import CudaRecord

CPU, GPU = torch.device("cpu"), torch.device("cuda")

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "flat": lambda x: x.flatten()[3:],
    "turned": lambda x: x.transpose(0, 2),
    "with gaps": lambda x: x[:, :, ::2],
    "expanded": lambda x: x[:, :1].expand(-1, 5, -1),
    "empty": lambda x: x[:0],
    "one number": lambda x: x[1, 2, 3],
}
DTYPES = (torch.float32, torch.bfloat16, torch.complex64, torch.int64, torch.int32, torch.bool, torch.uint8)


def drawn(layout: str, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return LAYOUTS[layout](torch.randint(0, 100, (7, 5, 11), generator=generator).to(dtype))


class Late(TorchDispatchMode):
    """A copy that need not block is done when it is waited for, and not before."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self.num_copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        blocks = len(args) < 3 or not args[2]
        if func is torch.ops.aten.copy_.default and not blocks:
            self._waiting.append(args[:2])
            self.num_copies += 1
            return args[0]
        return func(*args, **(kwargs or {}))

    def wait(self) -> None:
        for there, tensor in self._waiting:
            there.copy_(tensor)
        self._waiting.clear()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_goes_through_a_small_buffer_arrives_whole_and_in_its_layout(
    layout: str, dtype: torch.dtype
) -> None:
    tensor = drawn(layout, dtype)
    there = torch.empty_like(tensor)
    staging_B = torch.empty(64, dtype=torch.uint8)
    with torch.inference_mode(), Late() as late:
        copy_staged(there, tensor, staging_B, late.wait)
    assert torch.equal(there, tensor)
    assert late.num_copies == max(1, -(-tensor.numel() * tensor.itemsize // 64))
    assert there.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize


def test_on_a_processor_nothing_is_copied() -> None:
    tensor = drawn("turned", torch.float32)
    transfer = transfer_to(CPU)
    assert type(transfer) is Transfer
    with transfer.aside():
        assert transfer.moved(tensor) is tensor


@pytest.mark.usefixtures("two_threads")
def test_a_thread_that_stepped_aside_computes_alone() -> None:
    with ThreadPoolExecutor(1, initializer=step_aside, initargs=(CPU,)) as aside:
        assert aside.submit(torch.get_num_threads).result() == 1
    assert torch.get_num_threads() == 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_arrives_on_a_gpu_is_what_was_sent(layout: str, dtype: torch.dtype) -> None:
    tensor = drawn(layout, dtype)
    transfer = transfer_to(GPU)
    assert type(transfer) is StreamTransfer
    there = transfer.moved(tensor)
    assert torch.equal(there.cpu(), tensor)
    assert there.stride() == torch.empty_like(tensor).stride()
    assert transfer.moved(there) is there


@pytest.mark.gpu
def test_memory_that_a_step_still_reads_is_not_given_out_again() -> None:
    transfer, other = StreamTransfer(GPU), torch.full((1 << 20,), 7.0)
    there = transfer.moved(torch.ones(1 << 20))
    place = there.data_ptr()
    torch.cuda._sleep(1 << 28)
    seen = there * 2
    del there
    later = transfer.moved(other)
    assert later.data_ptr() != place
    assert torch.equal(seen.cpu(), torch.full((1 << 20,), 2.0))
    assert torch.equal(later.cpu(), other)


@pytest.mark.gpu
def test_tensors_arrive_while_steps_are_recorded_and_replayed() -> None:
    transfer, record, done = StreamTransfer(GPU), CudaRecord(), Event()
    adapter = transfer.moved(torch.arange(1024.0))
    x = torch.ones(1024, device=GPU)
    sent = [torch.full((STAGING_BYTES // 4 + number,), float(number)) for number in range(4)]
    wrong: list[int] = []

    def load() -> None:
        while not done.is_set():
            there = [transfer.moved(tensor) for tensor in sent]
            wrong.extend(n for n, tensor in enumerate(there) if not torch.equal(tensor.cpu(), sent[n]))

    thread = Thread(target=load)
    thread.start()
    try:
        for number in range(8):
            x.fill_(number)
            replay = record(lambda: adapter * x + 1)
            for _ in range(4):
                assert torch.equal(replay().cpu(), torch.arange(1024.0) * number + 1)
    finally:
        done.set()
        thread.join()
    assert wrong == []
