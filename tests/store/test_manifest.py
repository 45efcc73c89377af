from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from timbre_store.digests import digest_of_bytes
from timbre_store.errors import DigestMismatch, UnsafeFile
from timbre_store.manifest import Manifest
from timbre_store.recipe import Parent, Recipe

DIGEST = "sha256:" + "0a" * 32
WRITTEN = (
    b'{"base_model_digest":null,"config_digest":"' + DIGEST.encode() + b'","format":1,"method":"lora",'
    b'"parameters":12,"peft_type":"LORA","prepared_bytes":48,"sites":["q_proj","v_proj"],"stored_bytes":160,'
    b'"tensors_digest":"' + DIGEST.encode() + b'"}'
)
DIGESTS = st.binary(min_size=32, max_size=32).map(lambda raw: f"sha256:{raw.hex()}")
COUNTS = st.integers(min_value=0, max_value=2**63)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
RECIPES = st.builds(
    Recipe,
    kind=st.text(),
    parents=st.lists(st.builds(Parent, DIGESTS, NUMBERS), min_size=1, max_size=3).map(tuple),
    rank=st.none() | COUNTS,
    density=st.none() | NUMBERS,
    seed=st.none() | COUNTS,
    member=st.none() | DIGESTS,
    top_k=st.none() | COUNTS,
    temperature=st.none() | NUMBERS,
    renormalised=st.none() | st.booleans(),
    router=st.none() | DIGESTS,
    general=st.lists(DIGESTS, max_size=3).map(tuple),
)
MANIFESTS = st.builds(
    Manifest,
    method=st.text(),
    peft_type=st.none() | st.text(),
    base_model_digest=st.none() | st.text(),
    sites=st.lists(st.text(), max_size=4).map(tuple),
    parameters=COUNTS,
    stored_bytes=COUNTS,
    prepared_bytes=COUNTS,
    config_digest=DIGESTS,
    tensors_digest=DIGESTS,
    derivation=st.just(1) | COUNTS,
    virtual_tokens=st.just(0) | COUNTS,
    invocation_tokens=st.lists(COUNTS, max_size=3).map(tuple),
    row_copies=st.just(1) | COUNTS,
    scouts=st.booleans(),
    recipe=st.none() | RECIPES,
)


def test_a_manifest_is_written_in_one_way() -> None:
    manifest = Manifest("lora", "LORA", None, ("q_proj", "v_proj"), 12, 160, 48, DIGEST, DIGEST)
    assert manifest.to_bytes() == WRITTEN
    assert manifest.digest == "sha256:" + hashlib.sha256(WRITTEN).hexdigest()


def test_a_later_field_is_left_out_where_it_says_nothing() -> None:
    assert Manifest.from_bytes(WRITTEN).virtual_tokens == 0
    said = WRITTEN[:-1] + b',"virtual_tokens":7}'
    assert Manifest.from_bytes(said).virtual_tokens == 7
    with pytest.raises(UnsafeFile, match="canonical"):
        Manifest.from_bytes(WRITTEN[:-1] + b',"virtual_tokens":0}')
    with pytest.raises(UnsafeFile, match="canonical"):
        Manifest.from_bytes(WRITTEN.replace(b'"method"', b'"invocation_tokens":[],"method"'))


@given(MANIFESTS)
def test_a_manifest_is_read_back_as_it_was_written(manifest: Manifest) -> None:
    content = manifest.to_bytes()
    assert Manifest.from_bytes(content) == manifest
    assert Manifest.from_bytes(content).to_bytes() == content
    assert Manifest.of_digest(content, manifest.digest) == manifest


@given(st.integers(0, len(WRITTEN) - 1), st.integers(1, 255))
def test_changed_bytes_are_refused_or_are_another_manifest_in_canonical_form(place: int, change: int) -> None:
    content = bytearray(WRITTEN)
    content[place] ^= change
    try:
        manifest = Manifest.from_bytes(bytes(content))
    except UnsafeFile:
        return
    assert manifest.to_bytes() == content
    assert manifest != Manifest.from_bytes(WRITTEN)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", 2),
        ("format", True),
        ("format", 1.0),
        ("method", None),
        ("peft_type", 3),
        ("base_model_digest", []),
        ("sites", "q_proj"),
        ("sites", [1]),
        ("parameters", -1),
        ("parameters", 1.5),
        ("prepared_bytes", True),
        ("stored_bytes", "160"),
        ("config_digest", "0a" * 32),
        ("tensors_digest", None),
        ("surplus", 1),
        ("scouts", 1),
        ("invocation_tokens", 5),
        ("invocation_tokens", [True]),
        ("invocation_tokens", [-1]),
        ("virtual_tokens", -1),
        ("virtual_tokens", True),
        ("virtual_tokens", None),
    ],
)
def test_a_field_of_the_wrong_kind_is_refused_by_name(field: str, value: Any) -> None:
    raw = {**json.loads(WRITTEN), field: value}
    content = json.dumps(raw, sort_keys=True, separators=(",", ":")).encode()
    with pytest.raises(UnsafeFile, match=field):
        Manifest.from_bytes(content)


@pytest.mark.parametrize("field", sorted(json.loads(WRITTEN)))
def test_a_missing_field_is_refused_by_name(field: str) -> None:
    raw = {name: value for name, value in json.loads(WRITTEN).items() if name != field}
    with pytest.raises(UnsafeFile, match=field):
        Manifest.from_bytes(json.dumps(raw, sort_keys=True, separators=(",", ":")).encode())


@pytest.mark.parametrize("content", [WRITTEN + b"\n", b" " + WRITTEN, WRITTEN.replace(b'":', b'": ')])
def test_another_spelling_of_a_manifest_is_refused(content: bytes) -> None:
    with pytest.raises(UnsafeFile, match="canonical"):
        Manifest.from_bytes(content)


def test_bytes_are_taken_by_their_digest_where_they_are_what_this_version_wrote() -> None:
    digest = Manifest.from_bytes(WRITTEN).digest
    with pytest.raises(DigestMismatch, match=f"expected {digest}"):
        Manifest.of_digest(WRITTEN.replace(b"lora", b"LORA"), digest)
    later = WRITTEN.replace(b'"method"', b'"later":1,"method"')
    with pytest.raises(UnsafeFile, match="field 'later' is unknown"):
        Manifest.of_digest(later, digest_of_bytes(later))


RECIPE = {
    "density": 0.5, "kind": "ties", "member": None, "parents": [{"digest": DIGEST, "weight": 1.0}], "rank": 4,
    "seed": None,
}  # fmt: skip


def with_recipe(**changes: Any) -> bytes:
    raw = {**json.loads(WRITTEN), "recipe": {**RECIPE, **changes}}
    return json.dumps(raw, sort_keys=True, separators=(",", ":")).encode()


def test_a_recipe_says_what_the_adapter_was_made_of() -> None:
    recipe = Manifest.from_bytes(with_recipe()).recipe
    assert recipe == Recipe("ties", (Parent(DIGEST, 1.0),), rank=4, density=0.5)
    assert not recipe.is_mix


def test_a_mixture_of_experts_says_how_it_chooses() -> None:
    said = {"top_k": 2, "temperature": 0.5, "renormalised": False, "router": DIGEST, "general": [DIGEST]}
    recipe = Manifest.from_bytes(with_recipe(**said)).recipe
    assert recipe is not None
    assert (recipe.top_k, recipe.temperature, recipe.renormalised) == (2, 0.5, False)
    assert (recipe.router, recipe.general) == (DIGEST, (DIGEST,))
    with pytest.raises(UnsafeFile, match="canonical"):
        Manifest.from_bytes(with_recipe(top_k=None))


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": 3},
        {"kind": None},
        {"rank": 4.0},
        {"rank": True},
        {"density": "0.5"},
        {"seed": [1]},
        {"member": "pirate"},
        {"parents": []},
        {"parents": "pirate"},
        {"parents": [{"digest": DIGEST, "weight": 1}]},
        {"parents": [{"digest": "pirate", "weight": 1.0}]},
        {"parents": [{"digest": DIGEST}]},
        {"extra": 1},
        {"top_k": True},
        {"temperature": 1},
        {"renormalised": 1},
        {"router": "pirate"},
        {"general": "pirate"},
        {"general": ["pirate"]},
    ],
    ids=str,
)
def test_a_recipe_of_another_shape_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UnsafeFile, match="the manifest's recipe"):
        Manifest.from_bytes(with_recipe(**changes))
