"""Speed on a GPU, as shares of what its memory allows: ``make bench-gpu``.

A Llama of 8 billion random bfloat16 weights, made on the device; 64 rows, each with an adapter of its own;
decode steps of the real engine core, without HTTP, in one process. Every round times each case once.
``of bandwidth`` is the least time in which this device reads the base's weights, by a copy measured on it,
over the step's; what adapters read is not in it, and so lowers it. Prints a table, with what is aimed at, and
writes JSON.

``--tiny`` runs the same code on the CPU with a model that means nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from engine_in_process import Decoding, distinct
from floor import bytes_per_s
from random_adapters import Make, fourierft, lora, mola
from table import options, report
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

CASES: Mapping[str, tuple[str | None, float]] = {
    "base": (None, 0.75),
    "FourierFT n=1000": ("fourierft", 0.97),
    "LoRA r=16": ("lora", 0.90),
    "top 2 of 4 LoRAs r=8": ("mola", 0.85),
}
"""Whose adapters run, and the aim: the base alone to the bandwidth, the others to the base."""


MAKES: Mapping[str, Make] = {
    "fourierft": fourierft,
    "lora": partial(lora, rank=16),
    "mola": mola,
}
LLAMA_8B = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192, tie_word_embeddings=False,
)  # fmt: skip
TINY = LlamaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    config: LlamaConfig
    rows: int
    device: torch.device
    dtype: torch.dtype
    kv_bytes: int


def size_of(tiny: bool, rows: int) -> Size:
    """Raises SystemExit where there is no GPU and none is done without."""
    if tiny:
        return Size(TINY, min(rows, 4), torch.device("cpu"), torch.float32, 16 << 20)
    if not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU here, so there is nothing to measure; --tiny tries the code out")
    return Size(LLAMA_8B, rows, torch.device("cuda"), torch.bfloat16, 4 << 30)


def random_model(size: Size) -> PreTrainedModel:
    torch.manual_seed(0)
    with size.device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            size.config, dtype=size.dtype, attn_implementation="eager"
        )
    return model.eval().requires_grad_(False)


def read_bytes(model: PreTrainedModel) -> int:
    """What a step reads of the base: every matrix once, of the embedding next to nothing."""
    return sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes


def measure(
    size: Size, rounds: int, steps: int, prompt_tokens: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The table's rows, and what they were computed from."""
    model = random_model(size)
    least_s = read_bytes(model) / bytes_per_s(size.device)
    decoding = Decoding.of(model, MAKES, size.rows, size.kv_bytes)
    rows_of = {case: distinct(name, size.rows) for case, (name, _) in CASES.items()}
    decoding.load([digest for digests in rows_of.values() for digest in digests if digest])
    seconds: dict[str, list[float]] = {case: [] for case in CASES}
    for number in range(rounds + 1):
        for case, digests in rows_of.items():
            median = statistics.median(decoding.step_seconds(digests, prompt_tokens, steps))
            print(f"round {number}: {case}: {1e3 * median:.2f} ms", file=sys.stderr, flush=True)
            if number:
                seconds[case].append(median)
    rows = [row(case, own, seconds["base"], least_s) for case, own in seconds.items()]
    return rows, {"least_step_s": least_s, "step_s": seconds, "adapters": size.rows}


def row(case: str, own: list[float], base: list[float], least_s: float) -> dict[str, Any]:
    """One line; ratios are taken inside a round."""
    to_base = statistics.median(b / s for s, b in zip(own, base, strict=True))
    return {
        "case": case,
        "step, ms": round(1e3 * statistics.median(own), 3),
        "to base": round(to_base, 3),
        "of bandwidth": round(statistics.median(least_s / s for s in own), 3),
        "aim": CASES[case][1],
    }


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny model on the CPU: the same code, no figures"
    )
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after one that warms up")
    parser.add_argument("--steps", type=int, default=30, help="decode steps of each case in a round")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("bench-gpu.json"))
    args = parser.parse_args(argv)
    args.threads = torch.get_num_threads()
    return args


def main() -> None:
    args = arguments()
    size = size_of(args.tiny, args.rows)
    rows, more = measure(size, args.rounds, args.steps, args.prompt_tokens)
    report(rows, args, **more)


if __name__ == "__main__":
    main()
