"""Train the example adapters: one voice, one PEFT method each, on a CPU.

    python examples/train.py                                  # all four, one after another
    python examples/train.py pirate --out my-adapters         # one
    python examples/train.py pirate --out my-adapters --samples 5

A voice is `examples/data/<voice>.jsonl`, one `{"prompt": ..., "answer": ...}` a line; its twin
`<voice>.heldout.jsonl` is never trained on. The loss is taken on the answer and the token that ends it, after
the model's own chat template. What is written is what PEFT's save_pretrained writes, less its README.

Adapters sit in the layers from FIRST_LAYER on. What the layers below make of an example never changes, so it
is computed once, which saves a third of the work.

Legend: B rows of a batch, L positions, K kept positions at the end of each row, D hidden width.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import ShiraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from voices import FIRST_LAYER, SEED, Voice, voices

HERE = Path(__file__).resolve().parent
BASE_MODEL = "SmolLM2-135M-Instruct"
IGNORED = -100
SHOWN_EVERY_STEPS = 20
MASK_BATCHES = 10


@dataclass(frozen=True, slots=True)
class Example:
    """One exchange, also as token ids: the prompt up to where the assistant speaks, and what it says."""

    prompt: str
    prompt_ids: list[int]
    answer_ids: list[int]
    below_LD: Tensor
    """What goes into the first layer that is adapted."""


class Passed(torch.nn.Module):
    """Stands in for a layer whose work was done beforehand."""

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden


@contextmanager
def lower_layers_passed(base: Any, first_layer: int = FIRST_LAYER) -> Iterator[None]:
    """The model without the layers below the first adapted, whose outputs it is given as embeddings."""
    layers = base.get_decoder().layers
    lower = list(layers[:first_layer])
    for index in range(first_layer):
        layers[index] = Passed()
    yield
    for index, layer in enumerate(lower):
        layers[index] = layer


@torch.no_grad()
def below_first_layer(base: Any, ids: list[int], first_layer: int) -> Tensor:
    """What the layers below it make of one sequence: [L, D]."""
    decoder = base.get_decoder()
    hidden_1LD = decoder.embed_tokens(torch.tensor([ids]))
    rotary = decoder.rotary_emb(hidden_1LD, torch.arange(len(ids)).unsqueeze(0))
    for layer in decoder.layers[:first_layer]:
        hidden_1LD = layer(hidden_1LD, position_embeddings=rotary)
    return hidden_1LD[0]


def read_examples(
    path: Path, tokenizer: Any, base: Any, system: str | None = None, first_layer: int = FIRST_LAYER
) -> list[Example]:
    """With another system message than the chat template's own, where one is given."""
    before = [] if system is None else [{"role": "system", "content": system}]
    examples = []
    for line in path.read_text(encoding="utf-8").splitlines():
        pair = json.loads(line)
        prompt = tokenizer.apply_chat_template(
            [*before, {"role": "user", "content": pair["prompt"]}],
            add_generation_prompt=True,
            tokenize=False,
        )
        prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
        answer_ids = [*tokenizer(pair["answer"], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        below_LD = below_first_layer(base, prompt_ids + answer_ids, first_layer)
        examples.append(Example(pair["prompt"], prompt_ids, answer_ids, below_LD))
    return examples


def answer_loss(model: Any, batch: list[Example]) -> tuple[Tensor, int]:
    """The summed loss over the batch's answer tokens, in nats, and how many they are.

    Rows are padded on the left, so that all answers end together and only the last K positions need logits.
    """
    length = max(len(e.below_LD) for e in batch)
    kept = max(len(e.answer_ids) for e in batch)
    below_BLD = torch.zeros(len(batch), length, batch[0].below_LD.shape[1])
    mask_BL = torch.zeros(len(batch), length, dtype=torch.long)
    targets_BK = torch.full((len(batch), kept), IGNORED)
    for row, example in enumerate(batch):
        below_BLD[row, -len(example.below_LD) :] = example.below_LD
        mask_BL[row, -len(example.below_LD) :] = 1
        targets_BK[row, -len(example.answer_ids) :] = torch.tensor(example.answer_ids)
    positions_BL = (mask_BL.cumsum(1) - 1).clamp(min=0)
    logits_BKV = model(
        inputs_embeds=below_BLD,
        attention_mask=mask_BL,
        position_ids=positions_BL,
        logits_to_keep=kept + 1,
        use_cache=False,
    ).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(
        logits_BKV.flatten(0, 1).float(), targets_BK.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return loss, int((targets_BK != IGNORED).sum())


@torch.no_grad()
def mean_loss(model: Any, examples: list[Example]) -> float:
    """Nats for each answer token, over all examples."""
    model.eval()
    parts = [answer_loss(model, examples[start : start + 5]) for start in range(0, len(examples), 5)]
    return sum(float(loss) for loss, _ in parts) / sum(count for _, count in parts)


def shuffled_batches(examples: list[Example], batch_size: int, steps: int) -> Iterator[list[Example]]:
    """`steps` batches; every example comes once before any comes again."""
    order = random.Random(SEED)
    waiting: list[Example] = []
    for _ in range(steps):
        if len(waiting) < batch_size:
            waiting += order.sample(examples, len(examples))
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


def strongest_gradients(model: Any, targets: list[str], examples: list[Example]) -> Callable[..., Tensor]:
    """SHiRA's mask function: of each site's weights, those whose gradient over some examples is largest.

    PEFT asks for r (in + out) entries of a layer. Random places, its default, learn far more slowly.
    """
    model.requires_grad_(False)
    for path, module in model.named_modules():
        if path.endswith(tuple(targets)):
            module.weight.requires_grad_(True)
    for batch in shuffled_batches(examples, 4, MASK_BATCHES):
        loss, _ = answer_loss(model, batch)
        loss.backward()

    def mask(layer: Any, r: int, **_: Any) -> Tensor:
        gradient_OI, layer.weight.grad = layer.weight.grad.abs(), None
        chosen = gradient_OI.flatten().topk(r * sum(gradient_OI.shape)).indices
        return torch.zeros(gradient_OI.numel()).scatter_(0, chosen, 1.0).view_as(gradient_OI)

    return mask


def warm_up_and_cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate rises over a fifteenth of the steps, then falls to zero."""
    warm_up = max(1, steps // 15)
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )


def fit(model: Any, voice: Voice, examples: list[Example]) -> None:
    """AdamW with a short warm-up and a cosine to zero. Changes the adapter's parameters in place."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=voice.learning_rate, weight_decay=0.0)
    schedule = warm_up_and_cosine(optimizer, voice.steps)
    model.train()
    seen_loss, seen_tokens, started_s = 0.0, 0, time.monotonic()
    for step, batch in enumerate(shuffled_batches(examples, voice.batch_size, voice.steps), 1):
        loss, tokens = answer_loss(model, batch)
        (loss / tokens).backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        seen_loss, seen_tokens = seen_loss + float(loss.detach()), seen_tokens + tokens
        if step % SHOWN_EVERY_STEPS == 0 or step == voice.steps:
            per_token = seen_loss / seen_tokens
            print(f"  step {step:4d}  loss {per_token:.3f}  {time.monotonic() - started_s:.0f} s", flush=True)
            seen_loss, seen_tokens = 0.0, 0


def save(model: Any, out: Path) -> int:
    """Write the two files of a PEFT adapter, the base by its public name. Returns their bytes."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        config = json.loads((Path(scratch) / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = BASE_MODEL
        for name, value in config.items():
            if isinstance(value, list):  # sets come out in an order that changes from run to run
                config[name] = sorted(value)
        (out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        shutil.copyfile(Path(scratch) / "adapter_model.safetensors", out / "adapter_model.safetensors")
    return sum(path.stat().st_size for path in out.iterdir())


@torch.no_grad()
def greedy_answer(model: Any, tokenizer: Any, prompt_ids: list[int]) -> str:
    model.eval()
    ids = torch.tensor([prompt_ids])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, do_sample=False
    )
    return str(tokenizer.decode(out[0, len(prompt_ids) :], skip_special_tokens=True))


def train(name: str, model_folder: Path, out: Path, samples: int) -> None:
    """Train one voice and print its held-out loss before and after."""
    torch.manual_seed(SEED)
    voice = voices()[name]
    voice.config.task_type = "CAUSAL_LM"
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    trained = read_examples(HERE / "data" / f"{name}.jsonl", tokenizer, base)
    heldout = read_examples(HERE / "data" / f"{name}.heldout.jsonl", tokenizer, base)
    with lower_layers_passed(base):
        before = mean_loss(base, heldout)
        if isinstance(voice.config, ShiraConfig):
            voice.config.mask_fn = strongest_gradients(base, sorted(voice.config.target_modules), trained)
    model = get_peft_model(base, voice.config)  # with all layers there: it shortens target_modules by them
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{name} ({voice.config.peft_type.value}, {parameters} parameters)", flush=True)
    with lower_layers_passed(base):
        fit(model, voice, trained)
        after = mean_loss(model, heldout)
    stored_bytes = save(model, out / name)
    print(f"  held-out loss {before:.2f} -> {after:.2f} nats/token, {stored_bytes / 1000:.0f} kB", flush=True)
    for example in heldout[:samples]:
        print(f"  > {example.prompt}")
        print(f"    {greedy_answer(model, tokenizer, example.prompt_ids)}", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the example adapters.")
    parser.add_argument("voices", nargs="*", metavar="VOICE", help=f"{', '.join(voices())}; all if none")
    parser.add_argument("--out", type=Path, default=HERE / "adapters", help="where <voice>/ is written")
    parser.add_argument("--model", type=Path, help="a model folder; the embedded default model if not given")
    parser.add_argument("--cache-dir", type=Path, default=Path(".timbre/cache"), help="its converted weights")
    parser.add_argument("--samples", type=int, default=3, help="held-out prompts to answer at the end")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    chosen = parser.parse_args()
    unknown = sorted(set(chosen.voices) - set(voices()))
    if unknown:
        parser.error(f"unknown voice {', '.join(unknown)}; there are {', '.join(voices())}")
    return chosen


def default_model_folder(cache_dir: Path) -> Path:
    """The embedded model's, converted where it is not yet."""
    from timbre_server.engine.embedded_model import embedded_model_folder

    return embedded_model_folder(cache_dir, lambda text: print(text, flush=True))


def main() -> None:
    chosen = arguments()
    torch.set_num_threads(chosen.threads)
    folder = chosen.model or default_model_folder(chosen.cache_dir)
    for name in chosen.voices or voices():
        train(name, folder, chosen.out, chosen.samples)


if __name__ == "__main__":
    main()
