"""What a method on linear layers costs in memory and in a decode step: ``make bench-methods``.

One decoder layer of the embedded model's shapes (seven linear layers), 16 rows, 16 distinct adapters of one
method at usual sizes, as PEFT or the paper's export writes them. Every round times the layer without adapters
and with each method once, so that a busy neighbour troubles all alike; figures are medians. ``added_ms`` is
the time that the adapters add to one layer, ``to_lora`` its ratio to LoRA of rank 8 in the same round. Prints
a table and writes JSON.

Legend: T rows, I in features.
"""

from __future__ import annotations

import copy
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from paper_adapters import METHODS as PAPERS
from peft.tuners.lora.config import BdLoraConfig, KasaConfig
from safetensors.torch import load_file
from table import arguments, report
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from timbre_methods.contract import Site, Sites
from timbre_methods.registry import derive, method_for
from timbre_server.adapters.adapted_model import AdaptedModel, Arithmetic
from timbre_server.adapters.groups import LinearGroup
from timbre_server.engine.packed_linear import LinearPacker
from timbre_server.operators.catalogue import Kernels
from timbre_server.operators.row_table import RowTable, Span

LAYER = "model.layers.0."
GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
EVERY = {"target_modules": [path.split(".")[1] for group in GROUPS for path in group]}
FEEDFORWARD = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
BLOCKS = BdLoraConfig(
    ["o_proj", "down_proj"], ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], nblocks=2
)
ROWS = 16

METHODS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora r=8": lambda: peft.LoraConfig(r=8, **EVERY),
    "dora r=8": lambda: peft.LoraConfig(r=8, use_dora=True, **EVERY),
    "adalora r=8": lambda: peft.AdaLoraConfig(init_r=8, total_step=10, **EVERY),
    "alora r=8": lambda: peft.LoraConfig(r=8, alora_invocation_tokens=[1], **EVERY),
    "bdlora r=8": lambda: peft.LoraConfig(r=8, use_bdlora=BLOCKS, **EVERY),
    "kasa r=8": lambda: peft.LoraConfig(r=8, kasa_config=KasaConfig(), **EVERY),
    "olora r=8": lambda: peft.LoraConfig(r=8, init_lora_weights="olora", **EVERY),
    "pissa r=8": lambda: peft.LoraConfig(r=8, init_lora_weights="pissa", **EVERY),
    "adamss r=100": lambda: peft.AdamssConfig(r=100, **EVERY),
    "beft": lambda: peft.BeftConfig(**EVERY),
    "boft b=4": lambda: peft.BOFTConfig(boft_block_size=4, **EVERY),
    "c3a b=64": lambda: peft.C3AConfig(block_size=64, **EVERY),
    "deft r=8": lambda: peft.DeftConfig(r=8, **EVERY),
    "delora r=8": lambda: peft.DeloraConfig(r=8, **EVERY),
    "fourierft n=1000": lambda: peft.FourierFTConfig(n_frequency=1000, **EVERY),
    "frod 1 %": lambda: peft.FrodConfig(progressbar=False, **EVERY),
    "glora r=8": lambda: peft.GloraConfig(r=8, **EVERY),
    "gralora r=32": lambda: peft.GraloraConfig(**EVERY),
    "hira r=32": lambda: peft.HiraConfig(**EVERY),
    "hra r=8": lambda: peft.HRAConfig(r=8, **EVERY),
    "ia3": lambda: peft.IA3Config(**FEEDFORWARD),
    "loha r=8": lambda: peft.LoHaConfig(r=8, **EVERY),
    "lokr r=8": lambda: peft.LoKrConfig(r=8, **EVERY),
    "miss r=64": lambda: peft.MissConfig(**EVERY),
    "oft b=32": lambda: peft.OFTConfig(oft_block_size=32, **EVERY),
    "osf k=8": lambda: peft.OSFConfig(effective_rank=184, **EVERY),
    "peanut r=32": lambda: peft.PeanutConfig(**EVERY),
    "psoft r=32": lambda: peft.PsoftConfig(**EVERY),
    "pvera r=256": lambda: peft.PveraConfig(**EVERY),
    "randlora r=32": lambda: peft.RandLoraConfig(**EVERY),
    "road_1": lambda: peft.RoadConfig(**EVERY),
    "shira r=8": lambda: peft.ShiraConfig(r=8, **EVERY),
    "supertuning 1 %": lambda: peft.SupertuningConfig(**EVERY),
    "tinylora r=2": lambda: peft.TinyLoraConfig(**EVERY),
    "unilora r=4": lambda: peft.UniLoraConfig(**EVERY),
    "vblora r=4": lambda: peft.VBLoRAConfig(vector_length=64, **EVERY),
    "vera r=256": lambda: peft.VeraConfig(**EVERY),
    "waveft n=2592": lambda: peft.WaveFTConfig(**EVERY),
}


def one_layer() -> LlamaForCausalLM:
    """A random model of one layer with the embedded model's widths."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=576, intermediate_size=1536, num_hidden_layers=1, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def layer_weights(model: nn.Module) -> dict[str, Tensor]:
    """The seven weights by path."""
    return {
        LAYER + path: model.get_submodule(LAYER + path).weight.detach() for group in GROUPS for path in group
    }


def write_adapter(model: nn.Module, make: Callable[[], peft.PeftConfig], folder: Path) -> Path:
    """An adapter as PEFT saves it, with every trainable value moved a little."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(copy.deepcopy(model), make())
        for parameter in wrapped.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.data += 0.02 * torch.randn(parameter.shape).to(parameter.dtype)
        wrapped.save_pretrained(str(folder))
    return folder


class Measured:
    """The layer with so many adapters of one method in its slots, used by its rows in turn; or with none."""

    def __init__(
        self,
        model: nn.Module,
        folder: Path | None,
        kernels: Kernels,
        *,
        rows: int = ROWS,
        adapters: int = ROWS,
    ) -> None:
        self._model = copy.deepcopy(model)
        paths = [[LAYER + path for path in group] for group in GROUPS]
        sites = {path: Site(path, weight, None) for path, weight in layer_weights(self._model).items()}
        groups = [LinearGroup(tuple(group)) for group in paths]
        packer = LinearPacker(self._model.dtype, torch.device("cpu"), native=kernels == "native")
        self._adapted = AdaptedModel(self._model, groups, Arithmetic(packer.product_of, kernels))
        self.prepared_bytes = self._load(folder, sites, adapters) if folder is not None else 0
        slots = [((row % adapters, 1.0),) if folder else () for row in range(rows)]
        self._table = RowTable([Span(1, pairs) for pairs in slots])
        generator = torch.Generator().manual_seed(2)
        self._inputs = [
            [(path, x_TI) for path in group]
            for group in paths
            for x_TI in [torch.randn(1, rows, sites[group[0]].in_features, generator=generator)]
        ]

    def _load(self, folder: Path, sites: Sites, adapters: int) -> int:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors: Mapping[str, Tensor] = load_file(folder / "adapter_model.safetensors")
        method = method_for(config)
        tensors = {**tensors, **derive(config, tensors, sites)}
        for slot in range(adapters):
            program = method.compile(method.parse(config), tensors, sites)
            self._adapted.put(slot, program)
        return program.prepared_bytes

    def step_ms(self, clock: Callable[[], float] = time.perf_counter) -> float:
        """One decode step through the layer's linear parts, the table as in the step before."""
        self._adapted.set_rows(self._table, self._table)
        started = clock()
        with torch.inference_mode():
            for group in self._inputs:
                for path, x_TI in group:
                    self._model.get_submodule(path)(x_TI)
        elapsed = clock() - started
        self._adapted.clear_rows()
        return 1000 * elapsed


Key = tuple[str, Kernels]


def measure(rounds: int, steps: int, kernels: Sequence[Kernels], folder: Path) -> list[dict[str, Any]]:
    model = one_layer()
    written: dict[str, Path | None] = {"base": None}
    for name, make in METHODS.items():
        written[name] = write_adapter(model, make, folder / str(len(written)))
    weights = {name: w.numpy() for name, w in layer_weights(model).items()}
    shapes = {path: weight.shape for path, weight in weights.items()}
    for name, write in PAPERS.items():
        written[name] = write(folder / str(len(written)), shapes, weights)
    measured: dict[Key, Measured] = {
        (name, each): Measured(model, path, each) for name, path in written.items() for each in kernels
    }
    times: dict[Key, list[float]] = {key: [] for key in measured}
    for number in range(rounds + 1):
        for key, layer in measured.items():
            median = statistics.median(layer.step_ms() for _ in range(steps))
            if number:
                times[key].append(median)
    return [_row(key, measured[key].prepared_bytes, times) for key in measured]


def _row(key: Key, prepared_bytes: int, times: dict[Key, list[float]]) -> dict[str, Any]:
    name, kernels = key

    def added(own: str) -> list[float]:
        return [ms - base for ms, base in zip(times[own, kernels], times["base", kernels], strict=True)]

    ratios = [own / lora for own, lora in zip(added(name), added("lora r=8"), strict=True)]
    return {
        "method": name,
        "kernels": kernels,
        "prepared_bytes": prepared_bytes,
        "layer_ms": round(statistics.median(times[key]), 3),
        "added_ms": round(statistics.median(added(name)), 3),
        "to_lora": round(statistics.median(ratios), 2),
    }


def main() -> None:
    args = arguments(__doc__, rounds=5, steps=20, out="bench-methods.json", has_kernels=True)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        report(measure(args.rounds, args.steps, args.kernels, Path(folder)), args)


if __name__ == "__main__":
    main()
