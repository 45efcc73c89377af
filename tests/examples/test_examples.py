"""The example adapters and their data as files: small, portable, well formed, read by our own methods."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from safetensors import safe_open

from timbre_methods.contract import Site
from timbre_methods.registry import check_adapter

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
METHODS = MappingProxyType({"pirate": "lora", "headline": "fourierft", "telegram": "shira", "json": "ia3"})
MIXTURES = frozenset({"solo", "duet"})
"""They have a test file of their own."""
MAX_BYTES = 500_000
LAYERS = 30
SHAPES = MappingProxyType(  # (out, in) of the linear layers in each of the base's layers
    {
        "self_attn.q_proj": (576, 576),
        "self_attn.k_proj": (192, 576),
        "self_attn.v_proj": (192, 576),
        "self_attn.o_proj": (576, 576),
        "mlp.gate_proj": (1536, 576),
        "mlp.up_proj": (1536, 576),
        "mlp.down_proj": (576, 1536),
    }
)


def is_json_answer(text: str) -> bool:
    answer = json.loads(text)
    return list(answer) == ["topic", "answer"] and all(isinstance(v, str) and v for v in answer.values())


def is_title(text: str) -> bool:
    return (
        text[0].isupper() and not text.endswith((".", "!")) and sum(w[0].isupper() for w in text.split()) > 1
    )


IN_VOICE: Mapping[str, Callable[[str], bool]] = MappingProxyType(
    {
        "pirate": lambda text: text.startswith(("Arr, ", "Aye, ", "Ahoy ")),
        "headline": is_title,
        "telegram": lambda text: text.endswith(" STOP") and "." not in text.replace("4.5", ""),
        "json": is_json_answer,
    }
)


@pytest.fixture(scope="module", params=sorted(METHODS))
def voice(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def config_of(voice: str) -> dict[str, Any]:
    return dict(json.loads((EXAMPLES / "adapters" / voice / "adapter_config.json").read_text()))


def tensors_of(voice: str) -> dict[str, torch.Tensor]:
    file = EXAMPLES / "adapters" / voice / "adapter_model.safetensors"
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping


def pairs_of(name: str) -> list[dict[str, str]]:
    lines = (EXAMPLES / "data" / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def base_sites() -> dict[str, Site]:
    paths = [(f"model.layers.{i}.{name}", shape) for i in range(LAYERS) for name, shape in SHAPES.items()]
    return {path: Site(path, torch.empty(shape, device="meta"), None) for path, shape in paths}


def strings_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from strings_in(key)
            yield from strings_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings_in(inner)


def test_there_are_one_adapter_of_each_family_and_the_mixtures() -> None:
    found = {folder.name for folder in (EXAMPLES / "adapters").iterdir() if folder.is_dir()}
    assert found == set(METHODS) | MIXTURES


def test_an_adapter_is_two_small_files(voice: str) -> None:
    files = {path.name: path.stat().st_size for path in (EXAMPLES / "adapters" / voice).iterdir()}
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors"}
    assert sum(files.values()) <= MAX_BYTES


def test_a_config_names_the_base_and_no_place_on_a_machine(voice: str) -> None:
    config = config_of(voice)
    assert config["base_model_name_or_path"] == "SmolLM2-135M-Instruct"
    assert config["inference_mode"] is True
    assert [text for text in strings_in(config) if "/" in text or "\\" in text] == []


def test_our_methods_read_each_adapter_at_the_sites_that_its_file_names(voice: str) -> None:
    tensors = tensors_of(voice)
    inspection = check_adapter(config_of(voice), tensors, base_sites())
    named = {name.removeprefix("base_model.model.").split("_proj")[0] + "_proj" for name in tensors}
    assert inspection.method == METHODS[voice]
    assert set(inspection.sites) == named
    assert named <= set(base_sites())


def test_every_tensor_is_finite_and_was_trained(voice: str) -> None:
    neutral = 1.0 if METHODS[voice] == "ia3" else 0.0
    for name, tensor in tensors_of(voice).items():
        assert torch.isfinite(tensor).all(), name
        assert (tensor != neutral).any(), name


def test_the_data_are_prompts_with_answers_in_the_voice(voice: str) -> None:
    for name in (f"{voice}.jsonl", f"{voice}.heldout.jsonl"):
        for pair in pairs_of(name):
            assert list(pair) == ["prompt", "answer"]
            assert pair["prompt"].strip() == pair["prompt"] != ""
            assert IN_VOICE[voice](pair["answer"]), pair


def test_nothing_held_out_is_trained_on_and_nothing_comes_twice(voice: str) -> None:
    trained = [pair["prompt"].lower() for pair in pairs_of(f"{voice}.jsonl")]
    held_out = [pair["prompt"].lower() for pair in pairs_of(f"{voice}.heldout.jsonl")]
    assert len(trained) >= 120
    assert len(held_out) == 25
    assert len({*trained, *held_out}) == len(trained) + len(held_out)


def test_all_voices_answer_the_same_held_out_prompts() -> None:
    prompts = {tuple(pair["prompt"] for pair in pairs_of(f"{voice}.heldout.jsonl")) for voice in METHODS}
    assert len(prompts) == 1


def test_the_training_script_knows_exactly_these_voices() -> None:
    tree = ast.parse((EXAMPLES / "voices.py").read_text(encoding="utf-8"))
    voices = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "voices")
    returned = next(n for n in ast.walk(voices) if isinstance(n, ast.Return)).value
    assert isinstance(returned, ast.Dict)
    assert {ast.literal_eval(key) for key in returned.keys if key is not None} == set(METHODS)
