"""The example mixtures: their files, and that they are served as they were trained.

Legend: T rows, D hidden width, E experts.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from timbre_methods.contract import Site
from timbre_methods.registry import check_adapter, methods
from timbre_server.adapters.adapted_model import AdaptedModel
from timbre_server.adapters.groups import Block, LinearGroup
from timbre_server.operators.row_table import RowTable, Span

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
METHODS = MappingProxyType({"solo": "llava_mole", "duet": "mixlora"})
KEPT = MappingProxyType({"solo": 1, "duet": 2})
D, INNER, LAYERS, NUM_ROWS = 576, 1536, 30, 24
MAX_BYTES = 1_000_000
TOLERANCE = 1e-4


class Mlp(nn.Module):
    """The base's, with other weights."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(D, INNER, bias=False), nn.Linear(D, INNER, bias=False)
        self.down_proj = nn.Linear(INNER, D, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x_BLD: Tensor) -> Tensor:
        y_BLD: Tensor = self.down_proj(self.act_fn(self.gate_proj(x_BLD)) * self.up_proj(x_BLD))
        return y_BLD


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.mlp = Mlp()


class Decoder(nn.Module):
    """As deep as the base; all layers are one, which is enough for files and one MLP at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def get_decoder(self) -> nn.Module:
        return self


@pytest.fixture(scope="module")
def training() -> ModuleType:
    """The module that the training script trains."""
    spec = importlib.util.spec_from_file_location("example_mixture", EXAMPLES / "mixture.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=sorted(METHODS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def config_of(name: str) -> dict[str, Any]:
    return dict(json.loads((EXAMPLES / "adapters" / name / "adapter_config.json").read_text()))


def tensors_of(name: str) -> dict[str, Tensor]:
    return load_file(EXAMPLES / "adapters" / name / "adapter_model.safetensors")


def base_sites() -> dict[str, Site]:
    sites: dict[str, Site] = {}
    shapes = {"gate_proj": (INNER, D), "up_proj": (INNER, D), "down_proj": (D, INNER)}
    for i in range(LAYERS):
        path = f"model.layers.{i}.mlp"
        for layer, shape in shapes.items():
            sites[f"{path}.{layer}"] = Site(f"{path}.{layer}", torch.empty(shape, device="meta"), None)
        sites[path] = Site(path, torch.empty(D, D, device="meta"), None, "block")
    return sites


def test_a_mixture_is_two_small_files(name: str) -> None:
    files = {path.name: path.stat().st_size for path in (EXAMPLES / "adapters" / name).iterdir()}
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors"}
    assert sum(files.values()) <= MAX_BYTES


def test_our_methods_read_it_at_the_mlps_that_were_trained(name: str, training: ModuleType) -> None:
    inspection = check_adapter(config_of(name), tensors_of(name), base_sites())
    blocks = {f"model.layers.{i}.mlp" for i in training.LAYERS}
    layers = {f"{block}.{p}_proj" for block in blocks for p in training.PROJECTIONS}
    assert inspection.method == METHODS[name]
    assert set(inspection.sites) == blocks | layers


def test_the_config_is_the_one_that_the_script_writes(name: str, training: ModuleType) -> None:
    assert config_of(name) == training.MIXTURES[name].config


def test_every_tensor_is_finite_and_was_trained(name: str, training: ModuleType) -> None:
    tensors = tensors_of(name)
    mixture = training.MIXTURES[name]
    assert set(tensors) == set(training.named_tensors(mixture, training.put_into(Decoder(), mixture)))
    for key, tensor in tensors.items():
        assert torch.isfinite(tensor).all(), key
        assert (tensor != 0).any(), key


@pytest.fixture(scope="module")
def served(name: str) -> Callable[[int, Tensor], tuple[Tensor, list[dict[int, float]]]]:
    """What the server makes of rows at one layer's MLP, and the gates of each row's experts."""
    method = methods()[METHODS[name]]
    program = method.compile(method.parse(config_of(name)), tensors_of(name), base_sites())

    def run(i: int, x_TD: Tensor) -> tuple[Tensor, list[dict[int, float]]]:
        stem = f"model.layers.{i}."
        layer = Layer()
        groups = [LinearGroup(("mlp.gate_proj", "mlp.up_proj")), LinearGroup(("mlp.down_proj",))]
        adapted = AdaptedModel(layer, groups, blocks=[Block("mlp", D, "mlp.down_proj")])
        own = {
            path.removeprefix(stem): parts for path, parts in program.sites.items() if path.startswith(stem)
        }
        adapted.put(0, type(program)(own))
        table = RowTable([Span(len(x_TD), ((0, 1.0),))])
        adapted.set_rows(table, table)
        with torch.inference_mode():
            y_TD = layer.mlp(x_TD.unsqueeze(0))[0]
        choices = adapted.choices_of(range(len(x_TD)))
        adapted.clear_rows()
        gates = [
            dict(zip(choice.experts, choice.gates, strict=True))
            for row in range(len(x_TD))
            for choice in choices[row]
        ]
        return y_TD, gates

    return run


def test_each_mlp_is_served_as_it_was_trained(
    name: str, training: ModuleType, served: Callable[[int, Tensor], tuple[Tensor, list[dict[int, float]]]]
) -> None:
    mixture = training.MIXTURES[name]
    mlps = training.put_into(Decoder(), mixture)
    named = training.named_tensors(mixture, mlps)
    for key, tensor in tensors_of(name).items():
        named[key].copy_(tensor)
    x_TD = torch.randn(NUM_ROWS, D, generator=torch.Generator().manual_seed(9))
    seen: set[int] = set()
    for i, mlp in mlps.items():
        with torch.no_grad():
            expected_TD = mlp(x_TD.unsqueeze(0))[0]
            base_TD = mlp.mlp(x_TD)
        y_TD, gates = served(i, x_TD)
        largest = (expected_TD - base_TD).abs().max()
        assert (y_TD - expected_TD).abs().max() <= TOLERANCE * largest
        for own, gates_E in zip(gates, mlp.gates_BLE[0], strict=True):
            assert len(own) == KEPT[name]
            assert own == pytest.approx({e: float(g) for e, g in enumerate(gates_E) if g}, abs=TOLERANCE)
            seen |= set(own)
    assert seen == {0, 1, 2, 3}
