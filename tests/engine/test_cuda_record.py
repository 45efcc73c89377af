"""Recordings on a GPU: they come and go in one pool of memory."""

from __future__ import annotations

import pytest
import torch

from timbre_server.engine.decode_graphs import CudaRecord

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_one_is_made_after_all_others_are_gone() -> None:
    record = CudaRecord()
    x = torch.arange(4.0, device="cuda")

    def run() -> torch.Tensor:
        return x * 2

    for _ in range(3):
        replay = record(run)
        x += 1
        assert torch.equal(replay(), x * 2)
        del replay
