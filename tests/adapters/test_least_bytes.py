"""An adapter is refused at upload only where it could never be in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from timbre_methods.contract import Site
from timbre_methods.least_bytes import least_bytes
from timbre_methods.program import AdapterProgram, LowRank, Sparse, owned_tensors
from timbre_methods.routing import Routed, Router, Rule
from timbre_server.adapters.loader import AdapterLoader
from timbre_server.inspection import inspector
from timbre_server.operators.sliced_ellpack import slices_of
from timbre_store.errors import InvalidAdapter
from timbre_store.limits import StoreLimits
from timbre_store.records import AdapterRecord
from timbre_store.store import Store

BASE = "sha256:" + "a" * 64
SITES = {"q": Site("q", torch.ones(12, 12), None)}
KEPT = 2 * (4 * 12 + 12 * 4)


def stored(store: Store) -> AdapterRecord:
    """A LoRA of 16 bits, with a scale that keeps them exact."""
    shapes = {"A": (4, 12), "B": (12, 4)}
    tensors = {
        f"base_model.model.q.lora_{key}.weight": torch.randn(shape).half() for key, shape in shapes.items()
    }
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q"]}
    digests = []
    with store.begin_upload() as upload:
        for content in (json.dumps(config).encode(), save(tensors)):
            with upload.begin_blob() as writer:
                writer.write(content)
                digests.append(writer.commit())
        return store.register("x", *digests, BASE)


@pytest.mark.parametrize("budget_bytes", [KEPT, KEPT - 1])
def test_what_fits_in_16_bits_is_not_refused_for_what_it_would_take_in_more(
    budget_bytes: int, tmp_path: Path
) -> None:
    inspect = inspector(SITES, budget_bytes=budget_bytes, derive=lambda *_: None)
    with Store(tmp_path, inspect=inspect, limits=StoreLimits()) as store:
        if budget_bytes < KEPT:
            with pytest.raises(InvalidAdapter, match=f"takes {KEPT} bytes of memory, or more"):
                stored(store)
        else:
            loaded = AdapterLoader(store.root, BASE, SITES).load(stored(store).digest)
            assert loaded.prepared_bytes == KEPT


def test_slices_without_gaps_are_the_least_that_a_sparse_matrix_takes() -> None:
    columns_N = torch.arange(12, dtype=torch.int32).repeat(16)
    sparse = Sparse(torch.arange(0, 12 * 17, 12), columns_N, torch.ones(12 * 16), 12)
    slices = slices_of(sparse)
    kept = sum(tensor.nbytes for tensor in owned_tensors(slices))
    assert 0 <= kept - least_bytes(AdapterProgram({"q": (sparse,)})) <= 2 * len(slices.lengths_S)


def test_experts_are_counted_as_if_they_were_alone() -> None:
    expert = LowRank(torch.ones(4, 12), torch.ones(12, 4))
    router = Router(torch.ones(2, 12), Rule(top_k=1))
    program = AdapterProgram({"q": (Routed(experts=((expert,), (expert,)), router=router),)})
    assert least_bytes(program) == program.prepared_bytes - 2 * KEPT
