"""Adapters that come with the server, registered in a real store."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from timbre_methods.prompt_contract import Frame
from timbre_methods.registry import methods
from timbre_server.engine.messages import SiteShape
from timbre_server.example_adapters import register_examples
from timbre_server.inspection import inspector, meta_sites
from timbre_store.limits import StoreLimits
from timbre_store.store import Store

BASE = "sha256:" + "b" * 64
SITES = meta_sites([SiteShape("layers.0.q_proj", 16, 16, False)])


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    inspect = inspector(SITES, budget_bytes=1 << 20, derive=lambda *_: pytest.fail("nothing to derive"))
    with Store(tmp_path / "store", inspect=inspect, limits=StoreLimits()) as opened:
        yield opened
        assert opened.check_integrity() == ()


def put_example(folder: Path, seed: int = 0) -> None:
    """One adapter's two files, as PEFT names them."""
    config, tensors = methods()["lora"].example(SITES, torch.Generator().manual_seed(seed))
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")


def register(store: Store, folder: Path) -> list[str]:
    """What was said."""
    said: list[str] = []
    register_examples(store, folder, BASE, said.append)
    return said


def names(store: Store) -> list[str]:
    return [record.name for record in store.list(10).items]


def test_an_example_of_a_base_that_is_laid_out_otherwise_is_left_out_and_said_so(tmp_path: Path) -> None:
    put_example(tmp_path / "examples" / "pirate")
    inspect = inspector(
        SITES,
        budget_bytes=1 << 20,
        derive=lambda *_: pytest.fail("nothing to derive"),
        frame=Frame(16, (), stack=(0, 0)),
    )
    with Store(tmp_path / "store", inspect=inspect, limits=StoreLimits()) as store:
        assert "left out: the adapter was trained on each of the base's layers once" in "".join(
            register(store, tmp_path / "examples")
        )
        assert names(store) == []


def test_every_folder_with_both_files_becomes_an_adapter_of_its_name(store: Store, tmp_path: Path) -> None:
    examples = tmp_path / "examples"
    put_example(examples / "pirate")
    put_example(examples / "headline", seed=1)
    (examples / "notes").mkdir()
    (examples / "README.md").write_text("not an adapter")
    assert register(store, examples) == [
        "Added the example adapter headline (lora).",
        "Added the example adapter pirate (lora).",
    ]
    assert names(store) == ["headline", "pirate"]
    assert store.resolve("pirate").manifest.base_model_digest == BASE


def test_a_second_start_adds_nothing(store: Store, tmp_path: Path) -> None:
    put_example(tmp_path / "examples" / "pirate")
    register(store, tmp_path / "examples")
    assert register(store, tmp_path / "examples") == []
    assert store.resolve("pirate").version == 1


def test_a_users_adapter_or_alias_of_that_name_is_left_alone(store: Store, tmp_path: Path) -> None:
    put_example(tmp_path / "mine" / "pirate")
    put_example(tmp_path / "examples" / "pirate", seed=1)
    put_example(tmp_path / "examples" / "prod", seed=2)
    register(store, tmp_path / "mine")
    own = store.resolve("pirate").digest
    store.set_alias("prod", "pirate")
    assert register(store, tmp_path / "examples") == []
    assert store.resolve("pirate").digest == store.resolve("prod").digest == own


def test_one_that_does_not_fit_is_said_and_hinders_no_other(store: Store, tmp_path: Path) -> None:
    examples = tmp_path / "examples"
    put_example(examples / "broken")
    (examples / "broken" / "adapter_model.safetensors").write_bytes(b"torn")
    put_example(examples / "not a name")
    put_example(examples / "pirate")
    said = register(store, examples)
    assert [line.split(":")[0] for line in said] == [
        "The example adapter broken does not fit and is left out",
        "The example adapter not a name does not fit and is left out",
        "Added the example adapter pirate (lora).",
    ]
    assert names(store) == ["pirate"]
