"""Adapters as they lie in memory: the same numbers in fewer objects."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import fields

import pytest
import torch
from torch import Tensor, nn

from timbre_methods.contract import Site
from timbre_methods.places import fourier_places
from timbre_methods.program import AdapterProgram, Part, Places, Spectral
from timbre_methods.registry import compile_adapter, derive, methods, sites_of
from timbre_server.adapters.adapted_model import AdaptedModel
from timbre_server.adapters.loader import LoadedAdapter
from timbre_server.adapters.packed_sites import PackedSites, may_be_packed, packed
from timbre_server.adapters.slot_programs import MAX_IDLE_OPEN, SlotPrograms
from timbre_server.adapters.transfer import Transfer

CPU = torch.device("cpu")
TRANSFER = Transfer(CPU)
NUM_SITES, COEFFICIENTS = 50, 12
PATHS = tuple(f"layers.{layer}.q_proj" for layer in range(NUM_SITES))


def example_of(name: str) -> AdapterProgram:
    """An adapter of a method as compiled, on a base of three layers."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"mlp.up_proj": (18, 12), "mlp.gate_proj": (18, 12), "mlp.down_proj": (12, 18)}
    sites = {
        path: Site(path, torch.randn(shape, generator=generator), None) for path, shape in shapes.items()
    }
    config, tensors = methods()[name].example(sites_of(methods()[name], sites), generator)
    return compile_adapter(config, {**tensors, **derive(config, tensors, sites)}, sites)


def spectral(seed: int) -> dict[str, tuple[Part, ...]]:
    """FourierFT on many layers, places shared."""
    generator = torch.Generator().manual_seed(seed)
    places = fourier_places(7, 16, 16, COEFFICIENTS, CPU)
    return {path: (Spectral(torch.randn(COEFFICIENTS, generator=generator), places),) for path in PATHS}


def values_of(sites: Mapping[str, tuple[Part, ...]]) -> list[object]:
    return [getattr(p, f.name) for parts in sites.values() for p in parts for f in fields(p)]


@pytest.mark.parametrize("name", ["sdctft", "molora", "lora"])
def test_what_operators_know_by_identity_or_bind_as_it_lies_is_not_packed(name: str) -> None:
    assert not may_be_packed(example_of(name).sites)


@pytest.mark.parametrize(
    "name", ["fourierft", "waveft", "c3a", "shira", "s2ft", "ia3", "oft", "vera", "lokr"]
)
def test_packed_parts_are_the_compiled_ones_number_for_number(name: str) -> None:
    program = example_of(name)
    found = packed(program.sites, TRANSFER)
    assert list(found) == list(program.sites)
    for own, expected in zip(values_of(found), values_of(program.sites), strict=True):
        if isinstance(expected, Tensor):
            assert isinstance(own, Tensor)
            assert (own.dtype, own.shape, own.is_contiguous()) == (expected.dtype, expected.shape, True)
            assert torch.equal(own, expected)
        else:
            assert own is expected
    loaded = LoadedAdapter("d", name, AdapterProgram(found), {})
    as_compiled = AdapterProgram(program.sites)
    assert (loaded.prepared_bytes, loaded.shared_bytes) == (
        as_compiled.prepared_bytes,
        as_compiled.shared_bytes,
    )


def test_a_spectral_adapter_takes_its_coefficients_and_no_object_for_a_site() -> None:
    layout_keeper = packed(spectral(0), TRANSFER)
    gc.collect()
    before = len(gc.get_objects())
    bank = [packed(spectral(seed), TRANSFER) for seed in range(1, 21)]
    gc.collect()
    objects = (len(gc.get_objects()) - before) / len(bank)
    assert objects < NUM_SITES / 5
    assert all(each.prepared_bytes == 4 * NUM_SITES * COEFFICIENTS for each in bank)
    assert all(each.shared_bytes is layout_keeper.shared_bytes for each in bank)


def test_equal_shapes_with_other_places_are_not_mixed_up() -> None:
    places: list[Places] = [fourier_places(seed, 16, 16, COEFFICIENTS, CPU) for seed in (1, 2)]
    first, second = (packed({"q": (Spectral(torch.ones(COEFFICIENTS), own),)}, TRANSFER) for own in places)
    assert [part.places for part in (*first["q"], *second["q"]) if isinstance(part, Spectral)] == places


def test_only_the_adapters_of_the_step_and_some_idle_ones_have_their_parts_made() -> None:
    programs = SlotPrograms()
    for slot in range(200):
        programs.put(slot, AdapterProgram(packed(spectral(slot), TRANSFER)))
    closed: list[int] = []
    for start in range(0, 200, 20):
        used = range(start, start + 20)
        closed += programs.use(used)
        parts = [programs[slot].sites[PATHS[0]] for slot in used]
        assert all(programs[slot].sites[PATHS[0]] is own for slot, own in zip(used, parts, strict=True))
    assert closed == list(range(200 - 20 - MAX_IDLE_OPEN))


def test_a_step_of_more_adapters_than_stay_open_makes_the_parts_of_each_once() -> None:
    programs = SlotPrograms()
    slots = range(MAX_IDLE_OPEN + 36)
    for slot in slots:
        programs.put(slot, AdapterProgram(packed(spectral(slot), TRANSFER)))
    programs.use(slots)
    opened = [programs[slot] for slot in slots]
    programs.use(slots)
    assert all(programs[slot] is program for slot, program in zip(slots, opened, strict=True))


def test_a_slot_that_changes_hands_gives_the_new_adapter() -> None:
    model = AdaptedModel(nn.Module(), [])
    sites = [packed(spectral(seed), TRANSFER) for seed in (1, 2)]
    assert all(isinstance(each, PackedSites) for each in sites)
    programs = SlotPrograms()
    for each in sites:
        model.put(0, AdapterProgram(each))
        model.drop(0)
        programs.put(0, AdapterProgram(each))
        (part,) = programs[0].sites[PATHS[0]]
        assert isinstance(part, Spectral)
        (expected,) = each[PATHS[0]]
        assert isinstance(expected, Spectral)
        assert torch.equal(part.c_N, expected.c_N)
        programs.pop(0)
        with pytest.raises(KeyError):
            programs[0]
