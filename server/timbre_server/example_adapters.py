"""Adapters that come with the server: put into the store at start where their names are free."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from timbre_store.errors import NotFound, StoreError
from timbre_store.records import AdapterRecord
from timbre_store.store import Store

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
PLAIN_EXAMPLE = "pirate"
"""The one to ask first: what it does shows in any answer, without a cue."""


def register_examples(store: Store, folder: Path, base_digest: str, say: Callable[[str], None]) -> None:
    """Adds each adapter below the folder whose name means nothing yet; says so, and what does not fit."""
    for name, config, tensors in example_files(folder):
        if _is_known(store, name):
            continue
        try:
            record = register_files(store, name, (config, tensors), base_digest)
        except StoreError as error:
            say(f"The example adapter {name} does not fit and is left out: {error}")
        else:
            say(f"Added the example adapter {name} ({record.manifest.method}).")


def example_files(folder: Path) -> Iterator[tuple[str, Path, Path]]:
    """(name, config, tensors) of each subfolder that holds an adapter, in order of names."""
    for entry in sorted(folder.iterdir()):
        config, tensors = entry / CONFIG_NAME, entry / TENSORS_NAME
        if config.is_file() and tensors.is_file():
            yield entry.name, config, tensors


def register_files(store: Store, name: str, paths: tuple[Path, Path], base_digest: str) -> AdapterRecord:
    """An adapter from two files of this machine. Raises: StoreError."""
    with store.begin_upload() as upload:
        digests = []
        for path in paths:
            with upload.begin_blob() as writer:
                writer.write(path.read_bytes())
                digests.append(writer.commit())
        return store.register(name, digests[0], digests[1], base_digest)


def _is_known(store: Store, name: str) -> bool:
    try:
        store.resolve(name)
    except NotFound:
        return False
    return True
