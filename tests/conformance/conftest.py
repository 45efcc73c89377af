"""Fixtures of the conformance suite: tiny sites, and examples of every method on them.

``tiny_sites`` and ``make_example`` serve every suite that runs over all discovered methods.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from timbre_methods.contract import Method, Site, Sites
from timbre_methods.program import AdapterProgram
from timbre_methods.prompt_contract import AttentionLayer, Frame
from timbre_methods.registry import (
    check_adapter,
    compile_adapter,
    derive,
    methods,
    prompt_methods,
    sites_of,
)

LINEAR = {
    "model.layers.0.self_attn.q_proj": (12, 12, True),
    "model.layers.0.self_attn.k_proj": (6, 12, True),
    "model.layers.0.mlp.up_proj": (17, 12, False),
    "model.layers.0.mlp.down_proj": (12, 17, False),
    "model.layers.1.self_attn.q_proj": (12, 12, True),
    "model.layers.1.mlp.down_proj": (12, 17, True),
    "lm_head": (19, 12, False),
}
"""Out features, in features and whether there is a bias, by path; the first two read the same input."""
EMBEDDING = "model.embed_tokens"
NORMS = {"model.layers.0.input_layernorm": True, "model.layers.1.input_layernorm": False, "model.norm": True}
"""Whether there is a bias."""
BLOCK = "model.layers.0.mlp"
PARAMETERS = {
    "model.layers.0.mlp.gate.weight": (1, 4, 12, False),
    "model.layers.0.mlp.experts.gate_up_proj": (4, 10, 12, False),
    "model.layers.0.mlp.experts.down_proj": (4, 12, 5, False),
    "model.layers.1.mlp.experts.gate_up_proj": (3, 12, 10, True),
}
"""Slices, rows and columns, and whether the module reads a slice as [in, out]; two are of one module."""


@pytest.fixture
def all_sites() -> dict[str, Site]:
    """Random float32 sites of a make-believe base, square, wide and tall, with and without a bias; its
    embedding, to which the head is tied, norms, a block, and parameters of experts and a router."""
    generator = torch.Generator().manual_seed(17)

    def site(path: str, out_features: int, in_features: int, has_bias: bool) -> Site:
        weight_OI = torch.randn(out_features, in_features, generator=generator)
        bias_O = torch.randn(out_features, generator=generator)
        return Site(path, weight_OI, bias_O if has_bias else None)

    sites = {path: site(path, *shape) for path, shape in LINEAR.items()}
    table = torch.randn(19, 12, generator=generator)
    sites[EMBEDDING] = Site(EMBEDDING, table.T, None, "embedding", is_transposed=True)
    sites["lm_head"] = Site("lm_head", table, None, tied_to=EMBEDDING)
    for path, has_bias in NORMS.items():
        weight, bias = torch.randn(2, 12, generator=generator)
        sites[path] = Site(path, weight, bias if has_bias else None, "norm")
    sites[BLOCK] = Site(BLOCK, torch.empty(12, 12, device="meta"), None, "block")
    for path, (slices, rows, columns, is_transposed) in PARAMETERS.items():
        stacked = torch.randn(slices * rows, columns, generator=generator)
        sites[path] = Site(path, stacked, None, "parameter", is_transposed=is_transposed, slices=slices)
    return sites


@pytest.fixture
def tiny_sites(all_sites: dict[str, Site], request: pytest.FixtureRequest) -> Sites:
    """All sites; in a test of one method (by ``name``), those of the kinds that it adapts."""
    parameters = getattr(request.node, "callspec", None)
    name = parameters.params.get("name") if parameters else None
    return all_sites if name is None else sites_of(methods()[name], all_sites)


@dataclass(frozen=True)
class Example:
    """One adapter as its method makes examples, and the typed config."""

    method: Method[Any]
    raw_config: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def config(self) -> Any:
        return self.method.parse(self.raw_config)

    def compiled(
        self,
        sites: Sites,
        raw_config: dict[str, Any] | None = None,
        tensors: dict[str, Tensor] | None = None,
    ) -> AdapterProgram:
        """As a server reads it: checks first, then the program. Raises what either of them raises."""
        raw_config = self.raw_config if raw_config is None else raw_config
        tensors = self.tensors if tensors is None else tensors
        check_adapter(raw_config, tensors, sites)
        return compile_adapter(raw_config, {**tensors, **derive(raw_config, tensors, sites)}, sites)

    def completed(self, sites: Sites) -> dict[str, Tensor]:
        """The file's tensors, what registration derives and what the reference needs beyond."""
        beyond = self.method.for_reference(self.config, self.tensors, sites_of(self.method, sites))
        return {**self.tensors, **derive(self.raw_config, self.tensors, sites), **beyond}


@pytest.fixture
def make_example() -> Callable[[str, Sites, int], Example]:
    """Makes the example of a method by name for some sites and a seed."""

    def make(name: str, sites: Sites, seed: int) -> Example:
        method = methods()[name]
        own = sites_of(method, sites)
        return Example(method, *method.example(own, torch.Generator().manual_seed(seed)))

    return make


@dataclass(frozen=True)
class Attention:
    """One layer of attention and its linear layers: all that a method of prompts needs of a base."""

    sites: Sites
    frame: Frame


@pytest.fixture(scope="session")
def attention() -> Attention:
    layer = AttentionLayer("layers.0.attention", num_heads=2, num_kv_heads=2, key_dim=4, value_dim=4)
    paths = [f"{layer.path}.{projection}_proj" for projection in "qkvo"]
    return Attention({path: Site(path, torch.eye(8), torch.ones(8)) for path in paths}, Frame(8, (layer,)))


@pytest.fixture
def config_of(
    all_sites: dict[str, Site], attention: Attention, make_example: Callable[..., Example]
) -> Callable[[str], dict[str, Any]]:
    """A valid ``adapter_config.json`` of a method of either kind, by name."""

    def config(name: str) -> dict[str, Any]:
        if name in methods():
            return make_example(name, all_sites, 0).raw_config
        generator = torch.Generator().manual_seed(0)
        return dict(prompt_methods()[name].example(attention.sites, attention.frame, generator)[0])

    return config


@pytest.fixture(scope="session")
def evaluate(load_module: Callable[[Path], ModuleType]) -> ModuleType:
    """The method tests' evaluator of programs, by the semantics of `timbre_methods.program`."""
    return load_module(Path(__file__).parents[1] / "methods" / "evaluate.py")
