"""Where a model's files are and what it is called: the embedded one, a folder, a GGUF file, or a hub id."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from timbre_server.engine.embedded_model import converted_gguf_folder, embedded_model_folder
from timbre_server.settings import EMBEDDED_MODEL

EMBEDDED_NAME = "SmolLM2-135M-Instruct"
HUB_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip


def model_folder(model: str, cache_dir: Path, say: Callable[[str], None]) -> str:
    """What the engine loads: a folder where there is one, else the hub id. A GGUF file is converted first.

    Raises: UnsupportedModel.
    """
    if model == EMBEDDED_MODEL:
        return str(embedded_model_folder(cache_dir, say))
    path = Path(model).expanduser()
    if _is_gguf(path):
        return str(converted_gguf_folder(path.absolute(), cache_dir, say))
    return str(path.absolute()) if path.is_dir() else model


def codec_folder(model: str) -> str:
    """The folder with the model's tokenizer; for a hub id the engine has made it, and the rest is fetched."""
    if Path(model).is_dir():
        return model
    from transformers.utils.hub import cached_file  # Slow to import, and only hub ids need it.

    found = [cached_file(model, name, _raise_exceptions_for_missing_entries=False) for name in HUB_FILES]
    return str(next(Path(path).parent for path in found if path is not None))


def base_names(model: str, loaded_name: str, chosen: str | None) -> tuple[str, ...]:
    """What requests may call the base model; the first is shown."""
    if chosen is not None:
        return (chosen,)
    if model == EMBEDDED_MODEL:
        return (EMBEDDED_NAME,)
    path = Path(model).expanduser()
    if _is_gguf(path):
        return (path.stem,)
    return (path.absolute().name if path.is_dir() else loaded_name,)


def _is_gguf(path: Path) -> bool:
    return path.suffix == ".gguf" and path.is_file()
