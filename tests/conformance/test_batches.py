"""Every method in one batch: each row equals its own method's paper formula, whoever its neighbours are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from timbre_methods.contract import Site
from timbre_methods.registry import compile_adapter, methods
from timbre_server.adapters.adapted_model import AdaptedModel, Arithmetic
from timbre_server.adapters.groups import Block, LinearGroup, LoneLayer, ParameterModule
from timbre_server.operators.catalogue import Kernels, why_not
from timbre_server.operators.row_table import Pairs, RowTable, Span

METHODS = sorted(methods())
EXAMPLES_EACH = 3
QK = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj")
Maker = Callable[[str, Mapping[str, Site], int], Any]


class Matrices(nn.Module):
    """A module with parameters of its own, each of which it multiplies by rows, all slices one by one."""

    def forward(self, x: Tensor, name: str) -> Tensor:
        parameter: Tensor = getattr(self, name)
        return x @ parameter.flatten(0, -2).mT


def network(sites: Mapping[str, Site]) -> nn.Module:
    """Modules under the sites' paths, with the sites' weights."""
    root = nn.Module()
    for path, site in sites.items():
        *parents, name = path.split(".")
        parent = root
        for step in parents:
            if not hasattr(parent, step):
                parent.add_module(step, Matrices())
            parent = parent.get_submodule(step)
        if site.kind == "parameter":
            sizes = (site.slices, -1, site.in_features) if site.slices > 1 else site.weight_OI.shape
            parent.register_parameter(name, nn.Parameter(site.weight_OI.view(sizes)))
        else:
            parent.add_module(name, layer(site))
    return root


def layer(site: Site) -> nn.Module:
    made: nn.Module
    if site.kind == "embedding":
        made = nn.Embedding(site.in_features, site.out_features)
    elif site.kind == "norm":
        made = nn.LayerNorm(site.out_features, bias=site.bias_O is not None)
    else:
        made = nn.Linear(site.in_features, site.out_features, bias=site.bias_O is not None)
    with torch.no_grad():
        made.weight.copy_(site.weight_OI.T if site.is_transposed else site.weight_OI)
        if site.bias_O is not None:
            made.bias.copy_(site.bias_O)
    return made


def features(site: Site, x: Tensor) -> Tensor:
    """What a layer is linear in, in float64: one-hot tokens, the normalised input, the input."""
    if site.kind == "embedding":
        return nn.functional.one_hot(x, site.in_features).double()
    return nn.functional.layer_norm(x.double(), x.shape[-1:]) if site.kind == "norm" else x.double()


class Crowd:
    """All examples of all methods in the slots of one adapted network; slot i holds example i."""

    def __init__(
        self,
        sites: Mapping[str, Site],
        make_example: Maker,
        dtype: torch.dtype,
        kernels: Kernels = "torch",
    ) -> None:
        self.everything = sites
        self.sites = {path: site for path, site in sites.items() if site.kind != "block"}
        self.examples = [make_example(name, sites, seed) for name in METHODS for seed in range(EXAMPLES_EACH)]
        self.net = network(self.sites).to(dtype)
        alone = [
            LinearGroup((path,)) for path, site in sites.items() if path not in QK and site.kind == "linear"
        ]
        lone = [
            LoneLayer(path, site.kind) for path, site in sites.items() if site.kind in ("embedding", "norm")
        ]
        matrices = [path.rpartition(".")[0::2] for path, site in sites.items() if site.kind == "parameter"]
        modules = [
            ParameterModule(
                module, tuple(name for other, name in matrices if other == module), (1, None), (1,)
            )
            for module in dict.fromkeys(module for module, _ in matrices)
        ]
        blocks = [Block(path, site.in_features) for path, site in sites.items() if site.kind == "block"]
        self.model = AdaptedModel(
            self.net, [LinearGroup(QK), *alone], Arithmetic(kernels=kernels), lone, blocks, None, modules
        )
        for slot, example in enumerate(self.examples):
            program = compile_adapter(example.raw_config, example.completed(sites), sites)
            self.model.put(slot, program)

    def run(self, spans: list[Span], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each site's output for its input [T, I]; q and k are given one and the same tensor."""
        table = RowTable(spans)
        self.model.set_rows(table, table)
        shared = {path: inputs[QK[0]] if path in QK else inputs[path] for path in self.sites}
        with torch.inference_mode():
            outputs = {path: self._output(path, x.unsqueeze(0))[0] for path, x in shared.items()}
        self.model.clear_rows()
        return outputs

    def _output(self, path: str, x: Tensor) -> Tensor:
        if self.sites[path].kind != "parameter":
            return self.net.get_submodule(path)(x)
        module, _, name = path.rpartition(".")
        return self.net.get_submodule(module)(x, name)

    def expected(self, path: str, pairs: Pairs, x_TI: Tensor) -> Tensor:
        """W + Σ w (W_k − W), from the methods' reference formulas in float64."""
        site = self.sites[path]
        bias = None if site.bias_O is None else site.bias_O.double()
        exact = replace(site, weight_OI=site.weight_OI.double(), bias_O=bias)
        x = features(site, x_TI)
        base = x @ exact.weight_OI.T if site.kind != "norm" else x * exact.weight_OI
        base += 0.0 if bias is None else bias
        total = base.clone()
        for slot, weight in pairs:
            example = self.examples[slot]
            if site.kind not in example.method.kinds:
                continue
            tensors = {
                name: t.double() if t.is_floating_point() else t
                for name, t in example.completed(self.everything).items()
            }
            total += weight * (example.method.reference(example.config, tensors, exact, x) - base)
        return total

    def random_inputs(self, rows: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {
            path: torch.randint(site.in_features, (rows,), generator=generator)
            if site.kind == "embedding"
            else torch.randn(rows, site.in_features, generator=generator)
            for path, site in self.sites.items()
        }

    def random_spans(self, generator: torch.Generator) -> list[Span]:
        """Every adapter at least once, in random order, with base rows, long spans and mixes between."""
        spans = [Span(1, ((slot, 1.0),)) for slot in range(len(self.examples))]
        spans += [Span(20, ((slot, 1.0),)) for slot in range(0, len(self.examples), 4)]
        spans += [Span(3)] * 4
        for _ in range(6):
            slots = torch.randperm(len(self.examples), generator=generator)[:3].tolist()
            weights = torch.randn(3, generator=generator).tolist()
            spans.append(Span(2, tuple(zip(slots, weights, strict=True))))
        return [spans[i] for i in torch.randperm(len(spans), generator=generator)]


@pytest.mark.parametrize(("seed", "kernels"), [(0, "torch"), (1, "torch"), (2, "torch"), (0, "native")])
def test_a_heterogeneous_batch_gives_each_row_its_own_papers_formula(
    seed: int, kernels: Kernels, tiny_sites: Mapping[str, Site], make_example: Maker
) -> None:
    if (missing := why_not(kernels)) is not None:
        pytest.skip(f"no {kernels} kernels here: {missing}")
    crowd = Crowd(tiny_sites, make_example, torch.float32, kernels)
    generator = torch.Generator().manual_seed(seed)
    spans = crowd.random_spans(generator)
    inputs = crowd.random_inputs(sum(span.num_rows for span in spans), generator)

    outputs = crowd.run(spans, inputs)

    for path, y_TO in outputs.items():
        row = 0
        x_TI = inputs[QK[0]] if path in QK else inputs[path]
        for span in spans:
            rows = slice(row, row + span.num_rows)
            expected = crowd.expected(path, span.pairs, x_TI[rows])
            scale = float(expected.abs().max()) + 1.0
            torch.testing.assert_close(y_TO[rows].double(), expected, atol=2e-5 * scale, rtol=0)
            row += span.num_rows


def test_a_row_does_not_depend_on_its_neighbours(tiny_sites: Mapping[str, Site], make_example: Maker) -> None:
    crowd = Crowd(tiny_sites, make_example, torch.float32)
    generator = torch.Generator().manual_seed(9)
    spans = crowd.random_spans(generator)
    inputs = crowd.random_inputs(sum(span.num_rows for span in spans), generator)
    together = crowd.run(spans, inputs)
    row = 0
    for span in spans:
        rows = slice(row, row + span.num_rows)
        alone = crowd.run([span], {path: x[rows] for path, x in inputs.items()})
        for path, y_TO in alone.items():
            torch.testing.assert_close(together[path][rows], y_TO, atol=1e-4, rtol=1e-5)
        row += span.num_rows


def test_base_rows_keep_every_bit_in_the_middle_of_a_crowd(
    tiny_sites: Mapping[str, Site], make_example: Maker
) -> None:
    crowd = Crowd(tiny_sites, make_example, torch.bfloat16)
    generator = torch.Generator().manual_seed(10)
    spans = crowd.random_spans(generator)
    num_rows = sum(span.num_rows for span in spans)
    inputs = crowd.random_inputs(num_rows, generator)
    inputs = {path: x.bfloat16() if x.is_floating_point() else x for path, x in inputs.items()}
    with_adapters, without = crowd.run(spans, inputs), crowd.run([Span(num_rows)], inputs)
    base_rows = [
        row for row, span in enumerate(s for s in spans for _ in range(s.num_rows)) if not span.pairs
    ]
    for path, y_TO in with_adapters.items():
        assert torch.equal(y_TO[base_rows], without[path][base_rows])


def test_running_a_batch_modifies_neither_inputs_nor_programs(
    tiny_sites: Mapping[str, Site], make_example: Maker
) -> None:
    crowd = Crowd(tiny_sites, make_example, torch.float32)
    generator = torch.Generator().manual_seed(11)
    spans = crowd.random_spans(generator)
    inputs = crowd.random_inputs(sum(span.num_rows for span in spans), generator)
    before = {path: x.clone() for path, x in inputs.items()}
    first, second = crowd.run(spans, inputs), crowd.run(spans, inputs)
    assert all(torch.equal(inputs[path], x) for path, x in before.items())
    assert all(torch.equal(first[path], second[path]) for path in first)
