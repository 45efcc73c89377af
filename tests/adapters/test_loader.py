"""Adapters on their way from a real store to memory."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from timbre_methods.contract import Site
from timbre_methods.program import AdapterProgram, LowRank, Projected, owned_tensors, pattern_bytes
from timbre_methods.registry import check_adapter, compile_adapter, methods, sites_of
from timbre_methods.sliced_ellpack import SlicedEllpack
from timbre_server.adapters.active_rows import ActiveRows
from timbre_server.adapters.adapted_group import AdaptedGroup
from timbre_server.adapters.adapted_model import AdaptedModel
from timbre_server.adapters.derivation import write_derived
from timbre_server.adapters.groups import LinearGroup
from timbre_server.adapters.loader import AdapterLoader
from timbre_server.adapters.placement import Layout
from timbre_server.errors import AdapterLoadFailed
from timbre_server.inspection import inspector
from timbre_server.native.formats import FORMATS
from timbre_server.operators.catalogue import Kernels, all_operators, why_not
from timbre_server.operators.row_table import RowTable, Span
from timbre_server.operators.step_routing import StepRouting
from timbre_store.limits import StoreLimits
from timbre_store.reader import open_adapter
from timbre_store.records import AdapterRecord
from timbre_store.store import Store

BASE, OTHER_BASE = "sha256:" + "a" * 64, "sha256:" + "b" * 64
SHAPES = {
    "layers.0.self_attn.q_proj": (12, 12),
    "layers.0.self_attn.k_proj": (6, 12),
    "layers.0.mlp.up_proj": (17, 12),
    "layers.0.mlp.down_proj": (12, 17),
}

KERNELS: tuple[Kernels, ...] = ("torch", "native")
Upload = Callable[[str], AdapterRecord]


def sites() -> dict[str, Site]:
    generator = torch.Generator().manual_seed(1)
    linear = {
        path: Site(path, torch.randn(shape, generator=generator), torch.randn(shape[0], generator=generator))
        for path, shape in SHAPES.items()
    }
    table = Site("embed", torch.randn(12, 20, generator=generator), None, "embedding", is_transposed=True)
    return {
        "embed": table,
        **linear,
        "norm": Site("norm", torch.randn(12, generator=generator), None, "norm"),
        "layers.0.mlp": Site("layers.0.mlp", torch.empty(12, 12, device="meta"), None, "block"),
    }


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    inspect = inspector(sites(), budget_bytes=1 << 20, derive=partial(write_derived, sites=sites()))
    with Store(tmp_path / "store", inspect=inspect, limits=StoreLimits()) as opened:
        yield opened


@pytest.fixture
def upload(store: Store) -> Upload:
    """Stores an example adapter of a method, checked as at any upload."""

    def put(method: str) -> AdapterRecord:
        own_sites = sites_of(methods()[method], sites())
        config, tensors = methods()[method].example(own_sites, torch.Generator().manual_seed(2))
        return stored(store, method, config, tensors)

    return put


def stored(store: Store, name: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> AdapterRecord:
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with store.begin_upload() as together:
        digests = []
        for content in (json.dumps(config).encode(), save(contiguous)):
            with together.begin_blob() as writer:
                writer.write(content)
                digests.append(writer.commit())
        return store.register(name, *digests, BASE)


def loader_of(store: Store, base: str = BASE) -> AdapterLoader:
    return AdapterLoader(store.root, base, sites(), layout=Layout(in_slices=True))


def saved_bytes(program: AdapterProgram) -> int:
    """By how parts lie: the manifest counts factors in float32, and sparse matrices in CSR."""
    slices = [part for _, part in program.placed_parts() if isinstance(part, SlicedEllpack)]
    csr = sum(8 * (len(part.ranks_O) + 1 + int(part.values_KC.count_nonzero())) for part in slices)
    in_slices = [tensor for part in slices for tensor in owned_tensors(part)]
    narrow = [tensor for tensor in all_tensors(program) if tensor.dtype in FORMATS[1:]]
    return sum(t.nbytes for t in narrow) + csr - sum(t.nbytes for t in in_slices)


def all_tensors(program: AdapterProgram) -> list[Tensor]:
    return [t for _, part in program.placed_parts() for t in owned_tensors(part)]


@pytest.mark.parametrize("method", methods())
def test_an_adapter_is_loaded_as_its_manifest_says(method: str, store: Store, upload: Upload) -> None:
    record = upload(method)
    loaded = loader_of(store).load(record.digest)
    assert (loaded.digest, loaded.method) == (record.digest, method)
    assert tuple(loaded.program.sites) == record.manifest.sites
    assert loaded.program.prepared_bytes + saved_bytes(loaded.program) == record.manifest.prepared_bytes
    files = open_adapter(store.root, record.digest)
    found = check_adapter(files.config, load_file(files.tensors_path), sites())
    assert found.least_bytes <= loaded.prepared_bytes <= found.prepared_bytes
    assert set(loaded.seconds_by_phase) == {"verify", "compile", "place"}


@pytest.mark.parametrize("method", methods())
def test_a_loaded_adapter_holds_exactly_its_own_bytes_and_needs_its_file_no_more(
    method: str, store: Store, upload: Upload
) -> None:
    record = upload(method)
    loader = loader_of(store)
    program = loader.load(record.digest).program
    tensors = all_tensors(program)
    before = [tensor.clone() for tensor in tensors]
    (room,) = loader._rooms  # That the next load reads into.
    room[:] = bytes(len(room))

    path = store.blob_path(record.manifest.tensors_digest)
    path.chmod(0o600)
    path.write_bytes(bytes(path.stat().st_size))
    path.unlink()

    assert all(torch.equal(tensor, kept) for tensor, kept in zip(tensors, before, strict=True))
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    patterns = sum(pattern_bytes(part) for _, part in program.placed_parts())
    held = sum(storages.values()) + patterns
    assert held == program.prepared_bytes == record.manifest.prepared_bytes - saved_bytes(program)


def test_a_file_is_read_where_a_larger_one_was(store: Store, upload: Upload) -> None:
    digests = [upload(method).digest for method in ("lora", "ia3", "lora")]
    loader = loader_of(store)
    rooms = []
    for digest in digests:
        program = loader.load(digest).program
        expected = loader_of(store).load(digest).program
        assert all(map(torch.equal, all_tensors(program), all_tensors(expected)))
        rooms += map(id, loader._rooms)
    assert len(rooms) == 3
    assert len(set(rooms)) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_lora_uploaded_in_16_bits_is_held_in_half_and_changes_the_same_bits(
    dtype: torch.dtype, store: Store
) -> None:
    """Its scale is a power of two; trained in float32, it stays as it is."""
    own_sites = {path: sites()[path] for path in SHAPES}
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for path, (out_features, in_features) in SHAPES.items():
        for key, shape in (("A", (4, in_features)), ("B", (out_features, 4))):
            name = f"base_model.model.{path}.lora_{key}.weight"
            tensors[name] = torch.randn(shape, generator=generator).to(dtype)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": sorted(SHAPES)}
    record = stored(store, "own", config, tensors)

    loaded = AdapterLoader(store.root, BASE, sites(), groups=GROUPS).load(record.digest)

    assert {tensor.dtype for tensor in all_tensors(loaded.program)} == {dtype}
    halves = 1 if dtype == torch.float32 else 2
    assert loaded.prepared_bytes * halves == record.manifest.prepared_bytes
    compiled, parts = compile_adapter(config, tensors, own_sites).sites, loaded.program.sites
    whole = {path: tuple(LowRank(p.a_RI.float(), p.b_OR.float()) for p in parts[path]) for path in parts}
    for path, (part,) in whole.items():
        assert all(map(torch.equal, owned_tensors(part), owned_tensors(compiled[path][0])))
    for kernels in [name for name in KERNELS if why_not(name) is None]:
        found, expected = (changes_of(each, kernels) for each in (loaded.program, AdapterProgram(whole)))
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def changes_of(program: AdapterProgram, kernels: Kernels) -> list[Tensor]:
    """What it adds for a decode row and for a prompt, at each group."""
    operators = {operator.part: operator for operator in all_operators(StepRouting(), kernels)}
    found = []
    for num_rows, paths in product((1, 5), [*GROUPS, ("layers.0.mlp.down_proj",)]):
        rows = ActiveRows()
        rows.begin(RowTable([Span(num_rows, ((0, 1.0),))]))
        generator = torch.Generator().manual_seed(num_rows)
        x_TI = torch.randn(num_rows, SHAPES[paths[0]][1], generator=generator)
        sums = [b.sums(x_TI) for b in AdaptedGroup(paths, rows, {0: program}, operators).bound()]
        for of_members in sums:
            found += [change.values_NO for changes in of_members for change in changes]
    return found


GROUPS = [("layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj"), ("layers.0.mlp.up_proj",)]


def test_an_unloaded_mixture_leaves_nothing_in_memory(store: Store, upload: Upload) -> None:
    model = nn.Module()
    for path, (out_features, in_features) in SHAPES.items():
        model.register_module(path.replace(".", "_"), nn.Linear(in_features, out_features))
    groups = [tuple(path.replace(".", "_") for path in paths) for paths in GROUPS]
    adapted = AdaptedModel(model, [LinearGroup(paths) for paths in groups])
    loaded = AdapterLoader(store.root, BASE, sites(), groups=GROUPS).load(upload("arrow").digest)
    program = replace(
        loaded.program,
        sites={path.replace(".", "_"): parts for path, parts in loaded.program.sites.items()},
    )
    kept = [weakref.ref(tensor.untyped_storage()) for tensor in all_tensors(program)]
    adapted.put(0, program)
    del loaded, program
    table = RowTable([Span(5, ((0, 1.0),))])
    adapted.set_rows(table, table)
    x_1TI = torch.ones(1, 5, 12)
    with torch.inference_mode():
        outputs = [model.get_submodule(path)(x_1TI) for paths in groups for path in paths]
    adapted.clear_rows()
    assert len(outputs) == 3
    assert all(storage() is not None for storage in kept)
    adapted.drop(0)
    gc.collect()
    assert [storage for storage in kept if storage() is not None] == []


@pytest.mark.parametrize("method", ["vera", "pvera", "randlora", "lorta"])
def test_adapters_in_one_basis_hold_it_once_on_the_device(method: str, store: Store, upload: Upload) -> None:
    digest = upload(method).digest
    for device in ("cpu", "meta"):
        loader = AdapterLoader(store.root, BASE, sites(), device)
        first, second = loader.load(digest).program, loader.load(digest).program
        for path, (part,) in first.sites.items():
            (other,) = second.sites[path]
            assert isinstance(part, Projected)
            assert isinstance(other, Projected)
            assert part.core is not other.core
            assert part.basis is other.basis
            assert part.basis.p_NPI.device.type == device


@pytest.mark.parametrize(
    ("method", "blob"), [("lora", "tensors_digest"), ("pissa", "tensors_digest"), ("pissa", "derived_digest")]
)
def test_a_damaged_file_is_refused_by_name(method: str, blob: str, store: Store, upload: Upload) -> None:
    record = upload(method)
    digest = getattr(record.manifest, blob)
    path = store.blob_path(digest)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.chmod(0o600)
    path.write_bytes(content)
    with pytest.raises(AdapterLoadFailed) as refusal:
        loader_of(store).load(record.digest)
    assert record.digest in str(refusal.value)
    assert digest in str(refusal.value)


@pytest.mark.parametrize("blob", ["config_digest", "tensors_digest", "derived_digest"])
def test_an_adapter_whose_files_are_gone_is_refused(blob: str, store: Store, upload: Upload) -> None:
    record = upload("pissa")
    store.blob_path(getattr(record.manifest, blob)).unlink()
    with pytest.raises(AdapterLoadFailed, match=f"adapter {record.digest} could not be loaded"):
        loader_of(store).load(record.digest)


def test_an_adapter_that_was_never_stored_is_refused(store: Store) -> None:
    with pytest.raises(AdapterLoadFailed, match="never uploaded"):
        loader_of(store).load("sha256:" + "0" * 64)


def test_an_adapter_of_another_base_is_refused_with_both_bases(store: Store, upload: Upload) -> None:
    record = upload("lora")
    with pytest.raises(AdapterLoadFailed) as refusal:
        loader_of(store, OTHER_BASE).load(record.digest)
    assert BASE in str(refusal.value)
    assert OTHER_BASE in str(refusal.value)
