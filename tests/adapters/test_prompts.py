"""Prompt adapters on their way from a store into a step's rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

from timbre_methods.contract import Site
from timbre_methods.program import AdapterProgram, owned_tensors
from timbre_methods.prompt_contract import AttentionLayer, Frame
from timbre_methods.prompt_parts import AttentionPrompt, PromptEmbeddings, PromptEntries
from timbre_methods.registry import prompt_methods
from timbre_server.adapters.adapted_model import AdaptedModel
from timbre_server.adapters.derivation import write_derived
from timbre_server.adapters.loader import AdapterLoader
from timbre_server.errors import AdapterLoadFailed
from timbre_server.inspection import inspector
from timbre_server.operators.row_table import RowTable, Span
from timbre_store.errors import InvalidAdapter
from timbre_store.limits import StoreLimits
from timbre_store.records import AdapterRecord
from timbre_store.store import Store

BASE = "sha256:" + "a" * 64
FRAME = Frame(12, tuple(AttentionLayer(f"layers.{at}.attn", 4, 2, 3, 3) for at in range(2)))
SHAPES = {"q_proj": (12, 12), "k_proj": (6, 12), "v_proj": (6, 12), "o_proj": (12, 12)}


def sites() -> dict[str, Site]:
    generator = torch.Generator().manual_seed(1)
    return {
        f"{layer.path}.{name}": Site(
            f"{layer.path}.{name}", torch.randn(shape, generator=generator), torch.ones(shape[0])
        )
        for layer in FRAME.attention
        for name, shape in SHAPES.items()
    }


def inspector_of(max_model_len: int = 64) -> Any:
    derive = partial(write_derived, sites=sites())
    return inspector(sites(), budget_bytes=1 << 20, derive=derive, frame=FRAME, max_model_len=max_model_len)


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[Callable[..., Store]]:
    opened: list[Store] = []

    def open_(inspect: Any) -> Store:
        opened.append(Store(tmp_path / f"store{len(opened)}", inspect=inspect, limits=StoreLimits()))
        return opened[-1]

    yield open_
    for store in opened:
        store.close()


def upload(store: Store, method: str) -> AdapterRecord:
    config, tensors = prompt_methods()[method].example(sites(), FRAME, torch.Generator().manual_seed(2))
    with store.begin_upload() as together:
        digests = []
        for content in (json.dumps(config).encode(), save(tensors)):
            with together.begin_blob() as writer:
                writer.write(content)
                digests.append(writer.commit())
        return store.register(method, *digests, BASE)


@pytest.mark.parametrize("method", prompt_methods())
def test_an_adapter_is_loaded_as_its_manifest_says(method: str, open_store: Callable[..., Store]) -> None:
    store = open_store(inspector_of())
    record = upload(store, method)
    loaded = AdapterLoader(store.root, BASE, sites(), frame=FRAME).load(record.digest)
    assert loaded.method == record.manifest.method == method
    assert loaded.program.prepared_bytes == record.manifest.prepared_bytes
    assert loaded.program.virtual_tokens == record.manifest.virtual_tokens
    tensors = [t for _, part in loaded.program.placed_parts() for t in owned_tensors(part)]
    assert all(tensor.is_contiguous() for tensor in tensors)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    assert sum(storages.values()) == loaded.prepared_bytes == record.manifest.prepared_bytes


def test_a_manifest_that_promises_other_rows_is_not_loaded(open_store: Callable[..., Store]) -> None:
    def forgetful(*given: Any) -> Any:
        return replace(inspector_of()(*given), virtual_tokens=0)

    store = open_store(forgetful)
    record = upload(store, "prefix_tuning")
    with pytest.raises(AdapterLoadFailed, match="says 0 virtual tokens"):
        AdapterLoader(store.root, BASE, sites(), frame=FRAME).load(record.digest)


def test_more_virtual_tokens_than_the_context_holds_are_refused_at_upload(
    open_store: Callable[..., Store],
) -> None:
    count = upload(open_store(inspector_of()), "prompt_tuning").manifest.virtual_tokens
    assert upload(open_store(inspector_of(count + 2)), "prompt_tuning").manifest.virtual_tokens == count
    with pytest.raises(InvalidAdapter, match=f"{count} virtual tokens .* holds {count + 1} tokens"):
        upload(open_store(inspector_of(count + 1)), "prompt_tuning")


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(7, 4)
        self.adapted = AdaptedModel(self, [], embedding=self.embedding)
        self.rows_VD = torch.randn(3, 4)
        self.adapted.put(0, AdapterProgram({}, prompt=PromptEmbeddings(self.rows_VD)))
        keys_AVGE, values_AVGE = torch.randn(2, 2, 3, 1, 4)
        self.entries = PromptEntries(keys_AVGE, values_AVGE)
        self.adapted.put(1, AdapterProgram({}, prompt=self.entries))
        keys_GLD, values_GLE = torch.randn(2, 2, 5, 4)
        self.prompt = AttentionPrompt(keys_GLD, values_GLE)
        self.adapted.put(2, AdapterProgram({}, attention={1: self.prompt}))

    def run(self, *spans: Span) -> Tensor:
        table = RowTable(spans)
        self.adapted.set_rows(table, table)
        with torch.inference_mode():
            return self.embedding(torch.zeros(1, table.num_rows, dtype=torch.int64))[0]  # type: ignore[no-any-return]


VIRTUAL = Span(2, ((0, 1.0),), virtual_from=1)
BEFORE = Span(2, ((1, 1.0),), virtual_from=0)


def test_virtual_rows_alone_are_embedded_anew() -> None:
    model = Embedded()
    base_D = model.embedding.weight.detach()[0]
    out_TD = model.run(Span(1), VIRTUAL, Span(1, ((0, 1.0),)))
    assert torch.equal(out_TD[1:3], model.rows_VD[1:3])
    assert torch.equal(out_TD[[0, 3]], base_D.expand(2, -1))
    model.adapted.clear_rows()
    assert torch.equal(model.embedding(torch.tensor([0]))[0], base_D)
    assert model.adapted.attention_prompts is None


def test_virtual_rows_alone_are_kept_with_other_keys_and_values() -> None:
    model = Embedded()
    model.run(Span(1), VIRTUAL, BEFORE, Span(1, ((1, 1.0),)))
    prompts = model.adapted.attention_prompts
    assert prompts is not None
    k_GTE, v_GTE = torch.randn(2, 1, 6, 4)
    given = k_GTE.clone(), v_GTE.clone()
    k, v = prompts.entries(1, k_GTE, v_GTE)
    assert torch.equal(k[0, 3:5], model.entries.keys_AVGE[1, :2, 0])
    assert torch.equal(v[0, 3:5], model.entries.values_AVGE[1, :2, 0])
    assert torch.equal(k[:, [0, 1, 2, 5]], k_GTE[:, [0, 1, 2, 5]])
    assert torch.equal(k_GTE, given[0])
    assert torch.equal(v_GTE, given[1])


def test_attention_is_added_to_by_weight_where_an_adapter_does_so() -> None:
    model = Embedded()
    model.run(Span(2), Span(2, ((2, 0.5),)))
    prompts = model.adapted.attention_prompts
    assert prompts is not None
    q_HTE, out_THE = torch.randn(4, 4, 4), torch.randn(4, 4, 4)
    before = out_THE.clone()
    assert torch.equal(prompts.attended(0, q_HTE, out_THE), before)
    after = prompts.attended(1, q_HTE, out_THE)
    assert torch.equal(after[:2], before[:2])
    for head in range(4):
        keys, values = model.prompt.keys_GLD[head // 2], model.prompt.values_GLE[head // 2]
        added = torch.softmax(q_HTE[head, 2:] @ keys.T / 2.0, dim=-1) @ values
        torch.testing.assert_close(after[2:, head], before[2:, head] + 0.5 * added)
