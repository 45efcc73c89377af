"""A store with many adapters, made through its own interface and without a server.

Each content is FourierFT with 100 coefficients on every query and value projection, all of them random. Names
beyond the number of contents are given those contents again, in turn: a registered name costs the server the
same, and a hundred thousand contents would take hours to make durable one by one. All names of a content are
registered together: it is looked at once.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from random_adapters import linear_shapes
from safetensors.torch import save

from timbre_methods.contract import Site
from timbre_methods.registry import inspect_adapter
from timbre_server.engine.model_digest import model_digest
from timbre_store.inspection import Inspection
from timbre_store.limits import StoreLimits
from timbre_store.store import Store
from timbre_store.upload import Arrival, Upload

CONTENTS_AT_ONCE = 100
COEFFICIENTS = 100
CONFIG = {"peft_type": "FOURIERFT", "n_frequency": COEFFICIENTS, "scaling": 1.0, "random_loc_seed": 777}
KEY = "base_model.model.{}.fourierft_spectrum"


def name_of(number: int) -> str:
    return f"voice-{number:06d}"


def seed_store(root: Path, model_folder: Path, names: int, contents: int) -> None:
    """Register so many names, of so many contents at most, for the model in a folder."""
    shapes = {
        path: shape
        for path, shape in linear_shapes(model_folder).items()
        if path.endswith(("q_proj", "v_proj"))
    }
    sites = {path: Site(path, torch.empty(shape, device="meta"), None) for path, shape in shapes.items()}
    header = {KEY.format(path): ("F32", (COEFFICIENTS,)) for path in sites}
    found = inspect_adapter(CONFIG, header, sites)
    known = Inspection(found.method, found.sites, found.parameters, found.prepared_bytes)
    base = model_digest(model_folder)
    with Store(root, inspect=lambda *_: known, limits=StoreLimits()) as store:
        contents = min(contents, names)
        for start in range(0, contents, CONTENTS_AT_ONCE):
            some = range(start, min(start + CONTENTS_AT_ONCE, contents))
            with store.begin_upload() as upload:
                config_digest = _put(upload, json.dumps(CONFIG).encode())
                digests = {content: _put(upload, _tensors(content, list(shapes))) for content in some}
                numbers = (number for content in some for number in range(content, names, contents))
                arrivals = [
                    Arrival(name_of(number), config_digest, digests[number % contents]) for number in numbers
                ]
                store.register_all(arrivals, base)
            print(f"registered the names of {some.stop} of {contents} contents", flush=True)


def _tensors(seed: int, paths: list[str]) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    return save({KEY.format(path): torch.randn(COEFFICIENTS, generator=generator) for path in paths})


def _put(upload: Upload, content: bytes) -> str:
    with upload.begin_blob() as writer:
        writer.write(content)
        return writer.commit()
