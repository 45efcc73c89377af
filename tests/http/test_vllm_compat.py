"""vLLM's load and unload routes: its statuses and texts, and a folder that nothing gets out of."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from timbre_store.errors import NotFound

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def put(folder: Path, files: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_bytes(files.config)
    (folder / TENSORS).write_bytes(files.tensors)
    return folder


async def load(served: Any, name: str, path: object, **more: object) -> Any:
    body = {"lora_name": name, "lora_path": str(path), **more}
    return await served.client.post("/v1/load_lora_adapter", json=body)


async def test_load_and_unload_answer_as_vllm_does(serve: Callable[..., Any], adapter_files: Any) -> None:
    served = serve()
    put(served.lora_root / "pirate", adapter_files())
    loaded = await load(served, "pirate", "pirate")
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'pirate' added successfully.")
    digest = served.store.resolve("pirate").digest
    assert served.engine.loaded == [digest]
    again = await load(served, "pirate", "pirate")
    assert again.status_code == 400
    assert "has already been loaded" in again.json()["error"]["message"]
    unloaded = await served.client.post("/v1/unload_lora_adapter", json={"lora_name": "pirate"})
    assert (unloaded.status_code, unloaded.text) == (
        200,
        "Success: LoRA adapter 'pirate' removed successfully.",
    )
    gone = await served.client.post("/v1/unload_lora_adapter", json={"lora_name": "pirate", "lora_int_id": 1})
    assert gone.status_code == 404


async def test_an_absolute_path_within_the_folder_is_taken(
    serve: Callable[..., Any], adapter_files: Any
) -> None:
    served = serve()
    folder = put(served.lora_root / "deep" / "pirate", adapter_files())
    assert (await load(served, "pirate", folder)).status_code == 200


async def test_loading_in_place_makes_a_new_version(serve: Callable[..., Any], adapter_files: Any) -> None:
    served = serve()
    put(served.lora_root / "pirate", adapter_files(seed=0))
    await load(served, "pirate", "pirate")
    put(served.lora_root / "pirate", adapter_files(seed=1))
    assert (await load(served, "pirate", "pirate", load_inplace=True)).status_code == 200
    assert served.store.resolve("pirate").version == 2


async def test_what_cannot_be_loaded_leaves_the_name_as_it_was(
    serve: Callable[..., Any], adapter_files: Any
) -> None:
    served = serve()
    put(served.lora_root / "pirate", adapter_files(seed=0))
    served.engine.load_error = "no"
    assert (await load(served, "pirate", "pirate")).status_code >= 400
    with pytest.raises(NotFound):
        served.store.resolve("pirate")
    served.engine.load_error = None
    assert (await load(served, "pirate", "pirate")).status_code == 200
    known = served.store.resolve("pirate")
    served.engine.load_error = "no"
    assert (await load(served, "pirate", "pirate", load_inplace=True)).status_code >= 400
    assert served.store.resolve("pirate") == known
    put(served.lora_root / "pirate", adapter_files(seed=1))
    assert (await load(served, "pirate", "pirate", load_inplace=True)).status_code >= 400
    assert served.store.resolve("pirate") == known


@pytest.mark.parametrize(
    "body", [{}, {"lora_name": "a"}, {"lora_path": "a"}, {"lora_name": "tiny", "lora_path": "a"}]
)
async def test_a_load_without_a_usable_name_or_path_is_a_bad_request(
    serve: Callable[..., Any], body: Any
) -> None:
    assert (await serve().client.post("/v1/load_lora_adapter", json=body)).status_code == 400


@pytest.mark.parametrize(
    "kind", ["parent", "absolute", "linked folder", "linked file", "nul", "dot", "missing", "fifo", "swapped"]
)
async def test_nothing_outside_the_folder_can_be_loaded(
    serve: Callable[..., Any], adapter_files: Any, tmp_path: Path, kind: str
) -> None:
    served = serve()
    outside = put(tmp_path / "outside", adapter_files())
    inside = served.lora_root / "x"
    path: object = inside
    if kind == "parent":
        path = "../outside"
    elif kind == "absolute":
        path = outside
    elif kind == "linked folder":
        inside.symlink_to(outside)
    elif kind == "linked file":
        put(inside, adapter_files())
        (inside / TENSORS).unlink()
        (inside / TENSORS).symlink_to(outside / TENSORS)
    elif kind == "nul":
        path = "x\x00y"
    elif kind == "dot":
        path = "."
    elif kind == "fifo":
        put(inside, adapter_files())
        (inside / TENSORS).unlink()
        os.mkfifo(inside / TENSORS)
    elif kind == "swapped":
        inside.mkdir()
        (inside / CONFIG).symlink_to(served.lora_root)
    response = await load(served, "pirate", path)
    assert response.status_code == 404, response.text
    assert served.store.list(10, None).items == ()
    assert str(tmp_path) not in response.text.replace(str(path), "")


async def test_a_link_that_stays_within_the_folder_is_followed(
    serve: Callable[..., Any], adapter_files: Any
) -> None:
    served = serve()
    blobs = put(served.lora_root / "blobs", adapter_files())
    snapshot = served.lora_root / "snapshot"
    snapshot.mkdir()
    for name in (CONFIG, TENSORS):
        (snapshot / name).symlink_to(blobs / name)
    assert (await load(served, "pirate", "snapshot")).status_code == 200


async def test_an_adapter_that_the_engine_cannot_load_is_said_so(
    serve: Callable[..., Any], adapter_files: Any
) -> None:
    served = serve()
    served.engine.load_error = "the adapter does not fit"
    put(served.lora_root / "pirate", adapter_files())
    response = await load(served, "pirate", "pirate")
    assert response.json()["error"] == {
        "message": "the adapter does not fit", "type": "server_error", "param": None,
        "code": "adapter_load_failed",
    }  # fmt: skip
