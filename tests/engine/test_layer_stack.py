"""A model whose layers run again equals one that was built with as many layers and the copied weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from timbre_server.engine.layer_stack import stack_layers
from timbre_server.engine.model_loader import load_model, prepare_model
from timbre_server.engine.packed_linear import LinearPacker
from timbre_server.errors import UnsupportedModel

TinyModel = Callable[[str], PreTrainedModel]
RANGES = ((0, 2), (1, 3), (0, 1))
LAYERS = (0, 1, 1, 2, 0)
IDS = torch.tensor([[(7 * i * i + 3 * i + 1) % 131 for i in range(21)]])
"""Longer than the windows."""


def built_large(small: PreTrainedModel) -> PreTrainedModel:
    """A model of its own with the layers `LAYERS` of a small one."""
    fields = small.config.to_dict()
    depth = "n_layer" if "n_layer" in fields else "num_hidden_layers"
    fields[depth] = len(LAYERS)
    if fields.get("layer_types"):
        fields["layer_types"] = [fields["layer_types"][layer] for layer in LAYERS]
    config = type(small.config)(**fields)
    large = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    name, list_path = ("h", "transformer.h") if depth == "n_layer" else ("layers", "model.layers")
    outer = {key: value for key, value in small.state_dict().items() if f".{name}." not in key}
    large.load_state_dict(outer, strict=False)
    theirs, ours = (model.get_submodule(list_path) for model in (small, large))
    for place, layer in enumerate(LAYERS):
        ours[place].load_state_dict(theirs[layer].state_dict())
    large.eval()
    return large


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gemma3", "phi3", "gpt2"])
def test_a_stack_equals_a_model_of_as_many_layers(family: str, tiny_model: TinyModel, tmp_path: Path) -> None:
    small = tiny_model(family)
    small.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), dtype="float32", device="cpu", layers=RANGES)
    assert loaded.stack == LAYERS
    with torch.inference_mode():
        want, got = built_large(small)(IDS).logits, loaded.model(IDS, use_cache=False).logits
        plain = small(IDS).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert (want - plain).abs().max() > 0.1


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_each_place_has_its_own_cache_and_the_window_of_its_layer(
    family: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    probed = [
        prepare_model(str(tmp_path), dtype="float32", device="cpu", check=True, layers=layers).probed
        for layers in ((), RANGES)
    ]
    once, stacked = (found.layers for found in probed)
    assert [layer.shape.layer for layer in stacked] == [0, 1, 2, 3, 4]
    assert [layer.window for layer in stacked] == [once[layer].window for layer in LAYERS]
    assert len({layer.path for layer in stacked}) == 5
    assert len({site.path for site in probed[1].sites}) == len(probed[1].sites)


def test_the_weights_are_shared_and_packed_once(tiny_model: TinyModel, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    once = load_model(str(tmp_path), dtype="float32", device="cpu")
    stacked = load_model(str(tmp_path), dtype="float32", device="cpu", layers=RANGES)
    assert stacked.num_bytes == once.num_bytes
    first, again = (stacked.model.get_submodule(f"model.layers.{place}.mlp.up_proj") for place in (1, 2))
    assert first is not again
    assert first.weight is again.weight
    packer = LinearPacker(torch.float32, torch.device("cpu"))
    if not packer.works:
        pytest.skip("this processor packs no float32")
    products = [packer.pack(layer) for layer in (first, again)]
    assert products[0]._product is products[1]._product  # type: ignore[union-attr]


def test_a_place_can_be_changed_alone(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    stack_layers(model, RANGES)
    model.model.layers[1].mlp.up_proj = nn.Identity()
    assert isinstance(model.model.layers[2].mlp.up_proj, nn.Linear)


def test_the_digest_tells_stacks_apart_and_not_how_they_are_written(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    tiny_model("llama").save_pretrained(tmp_path)

    def digest(*layers: tuple[int, int]) -> str:
        return load_model(str(tmp_path), dtype="float32", device="cpu", layers=layers).digest

    assert digest() == digest((0, 3)) == digest((0, 1), (1, 3))
    assert digest((0, 2), (1, 3)) == digest((0, 1), (1, 2), (1, 3))
    assert len({digest(), digest((0, 2)), digest((0, 2), (1, 3)), digest((0, 2), (0, 3))}) == 4


@pytest.mark.parametrize("layers", [((0, 4),), ((2, 1),), ((1, 1),), ((-1, 2),), ((0, 2), (3, 9))])
def test_a_range_out_of_bounds_is_refused(layers: tuple[tuple[int, int], ...], tiny_model: TinyModel) -> None:
    with pytest.raises(UnsupportedModel, match=r"0 <= start < end <= 3"):
        stack_layers(tiny_model("llama"), layers)


def test_a_stack_without_bounds_is_refused(tiny_model: TinyModel) -> None:
    with pytest.raises(UnsupportedModel, match="makes 4098 layers; expected at most 4096"):
        stack_layers(tiny_model("llama"), [(0, 3)] * 1366)


def test_a_model_without_one_list_of_layers_is_refused(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    model.model.layers[1].self_attn.layer_idx = 7
    with pytest.raises(UnsupportedModel, match="found 0 lists of 3 modules with a layer_idx"):
        stack_layers(model, RANGES)


def test_layers_that_lean_on_their_number_are_refused(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    model.config.num_kv_shared_layers = 1
    with pytest.raises(UnsupportedModel, match=r"depend on their number \(num_kv_shared_layers\)"):
        stack_layers(model, RANGES)
