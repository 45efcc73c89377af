"""Train the two example mixtures, four experts each, on a CPU.

    python examples/train_mixture.py                         # both, one after another
    python examples/train_mixture.py duet --out my-adapters --samples 4

The kinds of text are the four voices' data; a system message, the cue, says which is wanted (see CUES). Each
batch has equally many examples of every kind, the same questions for all. Two losses are summed: the text's,
on the answer as in train.py, and the routers': the cross-entropy of their logits with the expert of the kind,
over the positions after the cue. The gates of `duet` have a gradient from the text too, so its routers are
told less and less, and at the end nothing; those of `solo` are 1 or 0, and its routers have no other teacher.

What is written is float16, in the format of each method's own code, and read back before it is judged.

Legend: B rows of a batch, L positions, E experts.
"""

from __future__ import annotations

import argparse
import json
import operator
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mixture import CUES, LAYERS, MIXTURES, Mixture, MixtureMlp, named_tensors, put_into
from safetensors.torch import load_file, save_file
from torch import Tensor
from train import (
    HERE,
    SHOWN_EVERY_STEPS,
    Example,
    answer_loss,
    default_model_folder,
    greedy_answer,
    lower_layers_passed,
    mean_loss,
    read_examples,
    shuffled_batches,
    warm_up_and_cosine,
)
from transformers import AutoModelForCausalLM, AutoTokenizer
from voices import SEED

STEPS = 120
EACH_KIND = 1
"""Examples in a batch."""
LEARNING_RATE = 8e-3
ROUTING_WEIGHT = 0.5

Texts = Mapping[str, list[Example]]
"""By kind."""
Mlps = Mapping[int, MixtureMlp]
"""By layer."""


@dataclass(frozen=True, slots=True)
class Data:
    trained: Texts
    heldout: Texts


def read_texts(tokenizer: Any, base: Any) -> Data:
    def texts(ending: str) -> Texts:
        return {
            kind: read_examples(HERE / "data" / f"{kind}{ending}", tokenizer, base, cue, LAYERS[0])
            for kind, cue in CUES.items()
        }

    return Data(texts(".jsonl"), texts(".heldout.jsonl"))


def num_after_cue(example: Example) -> int:
    """How many of its positions follow the system message, which ends as an answer does."""
    return len(example.below_LD) - example.prompt_ids.index(example.answer_ids[-1]) - 1


def after_cue(values_BLE: Tensor, batch: list[Example]) -> list[Tensor]:
    """Of each row, which is padded on the left, what belongs to the positions after the cue."""
    return [values_LE[-num_after_cue(e) :] for values_LE, e in zip(values_BLE, batch, strict=True)]


def routing_loss(mlps: Mlps, batch: list[Example], experts: list[int]) -> Tensor:
    """The mean over layers and positions; ``experts`` are the rows'."""
    losses = []
    for mlp in mlps.values():
        rows = after_cue(mlp.logits_BLE, batch)
        wanted = torch.cat([torch.full((len(row),), e) for row, e in zip(rows, experts, strict=True)])
        losses.append(torch.nn.functional.cross_entropy(torch.cat(rows), wanted))
    return torch.stack(losses).mean()


def mixed_batches(texts: Texts) -> Iterator[list[Example]]:
    """EACH_KIND of every kind in each, kind after kind."""
    by_kind = [shuffled_batches(examples, EACH_KIND, STEPS) for examples in texts.values()]
    for batches in zip(*by_kind, strict=True):
        yield [example for batch in batches for example in batch]


def fit(model: Any, mixture: Mixture, mlps: Mlps, texts: Texts) -> None:
    """AdamW with a short warm-up and a cosine to zero."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = warm_up_and_cosine(optimizer, STEPS)
    experts = [e for e in range(len(CUES)) for _ in range(EACH_KIND)]
    model.train()
    started_s = time.monotonic()
    for step, batch in enumerate(mixed_batches(texts), 1):
        loss, tokens = answer_loss(model, batch)
        routing = routing_loss(mlps, batch, experts)
        told = ROUTING_WEIGHT if mixture.top_k == 1 else ROUTING_WEIGHT * (1 - step / STEPS)
        (loss / tokens + told * routing).backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % SHOWN_EVERY_STEPS == 0 or step == STEPS:
            text = float(loss.detach()) / tokens
            told_s = f"text {text:.3f}  routing {float(routing.detach()):.3f}"
            print(f"  step {step:4d}  {told_s}  {time.monotonic() - started_s:.0f} s", flush=True)


def save(mixture: Mixture, mlps: Mlps, out: Path) -> int:
    """Write the two files, and take the rounded values over. Returns the files' bytes."""
    out.mkdir(parents=True, exist_ok=True)
    config = json.dumps(dict(mixture.config), indent=2, sort_keys=True)
    (out / "adapter_config.json").write_text(config + "\n")
    named = named_tensors(mixture, mlps)
    file = out / "adapter_model.safetensors"
    save_file({name: tensor.half().contiguous() for name, tensor in named.items()}, file)
    for name, tensor in load_file(file).items():
        named[name].copy_(tensor)
    return sum(path.stat().st_size for path in out.iterdir())


def forced_gates() -> dict[str, Tensor | None]:
    """What is compared: the base, each expert alone, all at equal weights, and the mixture itself, None."""
    one_hot_EE, num_experts = torch.eye(len(CUES)), len(CUES)
    alone = {f"{kind} alone": one_hot_EE[e] for e, kind in enumerate(CUES)}
    plain_mix_E = torch.full((num_experts,), 1 / num_experts)
    return {"base": torch.zeros(num_experts), **alone, "plain mix": plain_mix_E, "mixture": None}


def print_losses(model: Any, mlps: Mlps, texts: Texts, forced: Mapping[str, Tensor | None]) -> None:
    """Held-out loss by kind and over all kinds."""
    tokens = [sum(len(e.answer_ids) for e in examples) for examples in texts.values()]
    for name, gates_E in forced.items():
        for mlp in mlps.values():
            mlp.forced_E = gates_E
        losses = [mean_loss(model, examples) for examples in texts.values()]
        losses.append(sum(map(operator.mul, losses, tokens)) / sum(tokens))
        print(f"| {name} | " + " | ".join(f"{loss:.2f}" for loss in losses) + " |", flush=True)


def print_routing(model: Any, mlps: Mlps, texts: Texts) -> None:
    """Each expert's mean gate over layers and positions after the cue, by kind."""
    print("| share of expert | " + " | ".join(CUES) + " |", flush=True)
    for kind, examples in texts.items():
        gates: list[Tensor] = []
        for example in examples:
            mean_loss(model, [example])
            gates += [row for mlp in mlps.values() for row in after_cue(mlp.gates_BLE, [example])]
        share_E = torch.cat(gates).mean(0)
        print(f"| {kind} | " + " | ".join(f"{share:.1%}" for share in share_E.tolist()) + " |", flush=True)


def train(name: str, model_folder: Path, out: Path, samples: int, judged_each: int) -> None:
    """Train one mixture, write it, and print how it does on the held-out set."""
    mixture = MIXTURES[name]
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    texts = read_texts(tokenizer, base)
    torch.manual_seed(SEED)
    mlps = put_into(base, mixture)
    parameters = sum(p.numel() for p in base.parameters() if p.requires_grad)
    print(f"{name} ({mixture.config['peft_type']}, {parameters} parameters)", flush=True)
    judged = {kind: examples[:judged_each] for kind, examples in texts.heldout.items()}
    with lower_layers_passed(base, LAYERS[0]):
        fit(base, mixture, mlps, texts.trained)
        stored_bytes = save(mixture, mlps, out / name)
        print(f"  {stored_bytes / 1000:.0f} kB", flush=True)
        print("| held-out loss | " + " | ".join(CUES) + " | all |", flush=True)
        print_losses(base, mlps, judged, forced_gates())
        print_routing(base, mlps, judged)
    for kind, examples in texts.heldout.items():
        for example in examples[:samples]:
            print(f"  > {CUES[kind]} {example.prompt}")
            print(f"    {greedy_answer(base, tokenizer, example.prompt_ids)}", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the example mixtures.")
    parser.add_argument("mixtures", nargs="*", metavar="MIXTURE", help=f"{', '.join(MIXTURES)}; both if none")
    parser.add_argument("--out", type=Path, default=HERE / "adapters", help="where <mixture>/ is written")
    parser.add_argument("--model", type=Path, help="a model folder; the embedded default model if not given")
    parser.add_argument("--cache-dir", type=Path, default=Path(".timbre/cache"), help="its converted weights")
    parser.add_argument("--samples", type=int, default=3, help="held-out prompts of each kind to answer")
    parser.add_argument("--judged", type=int, default=25, help="held-out examples of each kind to judge by")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    chosen = parser.parse_args()
    unknown = sorted(set(chosen.mixtures) - set(MIXTURES))
    if unknown:
        parser.error(f"unknown mixture {', '.join(unknown)}; there are {', '.join(MIXTURES)}")
    return chosen


def main() -> None:
    chosen = arguments()
    torch.set_num_threads(chosen.threads)
    for name in chosen.mixtures or MIXTURES:
        folder = chosen.model or default_model_folder(chosen.cache_dir)
        train(name, folder, chosen.out, chosen.samples, chosen.judged)


if __name__ == "__main__":
    main()
