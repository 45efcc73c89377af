"""Embeddings, norms, heads and experts of a model in a real folder, adapted through the whole engine.

What each row gets is compared with transformers' own model, its weights overwritten: the log probabilities of
the prompt, and the text.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel

from timbre_server.engine.assembly import assemble
from timbre_server.engine.attention import install_attention
from timbre_server.engine.core import EngineCore
from timbre_server.engine.messages import AdapterUse, DeriveTensors, SamplingParams, Submit
from timbre_server.engine.options import EngineOptions
from timbre_server.engine.probe import probe
from timbre_server.inspection import inspector, meta_sites
from timbre_store.errors import InvalidAdapter
from timbre_store.limits import StoreLimits
from timbre_store.store import Store

MAX_TOKENS = 12
PROMPT = [5, 77, 9, 130, 9, 31, 64]
TOKENS = [9, 31, 100, 2]
Weights = dict[str, Tensor]


def adapters_of(model: PreTrainedModel) -> list[tuple[dict[str, Any], Weights, Weights]]:
    """(config, tensors, the weights that they mean): LoRA on the embedding beside norms and head of its own,
    rows for some tokens, and LoRA on the experts where there are any."""
    generator = torch.Generator().manual_seed(3)

    def noise(shape: tuple[int, ...], std: float) -> Tensor:
        return torch.randn(shape, generator=generator) * std

    module = model.get_input_embeddings()
    embedding = next(path for path, each in model.named_modules() if each is module)
    table = module.weight
    a, b = noise((2, len(table)), 0.3), noise((table.shape[1], 2), 0.3)
    own: Weights = {f"{embedding}.weight": table + 2 * (b @ a).T}
    saved = {
        name: value + noise(tuple(value.shape), 0.1)
        for name, value in model.named_parameters(remove_duplicate=False)
        if (value.ndim == 1 and ("norm" in name or "ln_" in name)) or name == "lm_head.weight"
    }
    stem = f"base_model.model.{embedding}"
    tensors = {f"base_model.model.{name}": value for name, value in saved.items()}
    tensors |= {
        f"{stem}.lora_embedding_A": a,
        f"{stem}.lora_embedding_B": b,
        f"{stem}.base_layer.weight": table,
    }
    lora = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "modules_to_save": ["norm", "lm_head"]}

    rows = noise((len(TOKENS), table.shape[1]), 0.5)
    changed = table.clone()
    changed[TOKENS] = rows
    meant = {f"{embedding}.weight": changed}
    if model.get_output_embeddings().weight is table:
        meant["lm_head.weight"] = changed
    tokens = {"peft_type": "TRAINABLE_TOKENS", "token_indices": TOKENS}
    found = [(lora, tensors, own | saved), (tokens, {f"{stem}.trainable_tokens_delta": rows}, meant)]
    experts = {name: value for name, value in model.named_parameters() if value.ndim == 3}
    return [*found, experts_adapter(experts, noise)] if experts else found


def experts_adapter(
    experts: Weights, noise: Callable[[tuple[int, ...], float], Tensor]
) -> tuple[dict[str, Any], Weights, Weights]:
    """LoRA of rank 2 on stacks of [out, in], two of each module."""
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "target_parameters": ["gate_up_proj", "down_proj"],
    }
    tensors, meant = {}, {}
    for name, value in experts.items():
        count, outs, ins = value.shape
        a_ERI, b_EOR = noise((count, 2, ins), 0.2), noise((count, outs, 2), 0.2)
        meant[name] = value + b_EOR @ a_ERI
        module, _, own = name.rpartition(".")
        stem = f"base_model.model.{module}" + (".base_layer" if own == "gate_up_proj" else "")
        tensors[f"{stem}.lora_A.weight"] = a_ERI.flatten(0, 1)
        tensors[f"{stem}.lora_B.weight"] = b_EOR.permute(1, 2, 0).flatten(1)
    return config, tensors, meant


def merged(model: PreTrainedModel, mix: Mapping[int, float], meant: list[Weights]) -> PreTrainedModel:
    """W + Σ w (W_k − W)."""
    made = copy.deepcopy(model)
    head = made.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)
    for name, value in model.named_parameters(remove_duplicate=False):
        changes = [w * (meant[k][name] - value) for k, w in mix.items() if name in meant[k]]
        made.get_parameter(name).data.copy_(value + sum(changes, torch.zeros(())))
    return made


def generated(model: PreTrainedModel) -> list[int]:
    ids_1T = torch.tensor([PROMPT])
    out = model.generate(
        ids_1T, attention_mask=torch.ones_like(ids_1T), max_new_tokens=MAX_TOKENS, do_sample=False
    )
    return out[0, len(PROMPT) :].tolist()


def derived(core: EngineCore, config: dict[str, Any], tensors_path: Path, derived_path: Path) -> None:
    """As the server asks its engine for it."""
    core.take(DeriveTensors(json.dumps(config).encode(), str(tensors_path), str(derived_path)))
    while not (answers := core.step().derived):
        time.sleep(0.01)
    if answers[0].error_code is not None:
        raise InvalidAdapter(answers[0].error_message)


def registered(store: Store, name: str, config: dict[str, Any], tensors: Weights, base: str) -> str:
    contents = json.dumps(config).encode(), save({key: t.contiguous().clone() for key, t in tensors.items()})
    with store.begin_upload() as together:
        digests = []
        for content in contents:
            with together.begin_blob() as writer:
                writer.write(content)
                digests.append(writer.commit())
        return store.register(name, *digests, base).digest


POSITIONS = "base_model.model.transformer.wpe"
ON_POSITIONS: dict[str, tuple[dict[str, Any], Weights]] = {
    "a LoRA": (
        {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["wte", "wpe"]},
        {
            f"{POSITIONS}.lora_embedding_A": torch.ones(2, 256),
            f"{POSITIONS}.lora_embedding_B": torch.ones(32, 2),
        },
    ),
    "rows of its own": (
        {"peft_type": "TRAINABLE_TOKENS", "target_modules": ["wpe"], "token_indices": [1, 2]},
        {f"{POSITIONS}.trainable_tokens_delta": torch.ones(2, 32)},
    ),
    "rows beside a LoRA": (
        {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "trainable_token_indices": {"wpe": [1, 2]}},
        {f"{POSITIONS}.token_adapter.trainable_tokens_delta": torch.ones(2, 32)},
    ),
    "a table of its own": (
        {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "modules_to_save": ["wpe"]},
        {f"{POSITIONS}.weight": torch.ones(256, 32)},
    ),
}
"""What PEFT writes for a GPT-2's learned positions."""


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "beside a LoRA of the tokens"])
@pytest.mark.parametrize(("config", "tensors"), ON_POSITIONS.values(), ids=ON_POSITIONS)
def test_an_adapter_of_learned_positions_is_refused_at_upload_by_their_name(
    config: dict[str, Any],
    tensors: Weights,
    alone: bool,
    tiny_model: Callable[[str], PreTrainedModel],
    tmp_path: Path,
) -> None:
    model = tiny_model("gpt2")
    install_attention(model)
    tokens = {
        "base_model.model.transformer.wte.lora_embedding_A": torch.ones(2, 131),
        "base_model.model.transformer.wte.lora_embedding_B": torch.ones(32, 2),
    }
    inspect = inspector(meta_sites(probe(model).sites), budget_bytes=1 << 20, derive=lambda *_: None)
    with (
        Store(tmp_path, inspect=inspect, limits=StoreLimits()) as store,
        pytest.raises(InvalidAdapter, match=r"this base has no .* '(transformer\.)?wpe' that can be adapted"),
    ):
        registered(store, "positions", config, tensors if alone else tensors | tokens, "sha256:" + "0" * 64)


def scored(model: PreTrainedModel) -> Tensor:
    """The log probability of each prompt token but the first."""
    with torch.inference_mode():
        logprobs_TV = model(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    return logprobs_TV[:-1].gather(1, torch.tensor(PROMPT[1:]).unsqueeze(1)).flatten()


def served(core: EngineCore, requests: list[Submit]) -> tuple[dict[str, list[int]], dict[str, list[float]]]:
    """Tokens and the prompt's log probabilities by request."""
    outputs: dict[str, list[int]] = {}
    scores: dict[str, list[float]] = {}
    for request in requests:
        core.submit(request)
    while core.has_work:
        for event in core.step().events:
            assert event.error_message is None
            outputs.setdefault(event.request_id, []).extend(event.token_ids)
            found = [each.logprob for each in event.prompt_logprobs if each is not None]
            scores.setdefault(event.request_id, []).extend(found)
    return outputs, scores


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "qwen3_moe"])
def test_rows_with_other_embeddings_norms_heads_and_experts_get_the_text_of_a_merged_model(
    family: str, tiny_model: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "model")
    options = EngineOptions(
        model=str(tmp_path / "model"), adapters_dir=str(tmp_path / "store"), dtype="float32", device="cpu",
        kv_cache_bytes=1 << 20,
    )  # fmt: skip
    core, ready = assemble(options, lambda text: None, lambda: None)
    derive = partial(derived, core)
    inspect = inspector(meta_sites(ready.sites), budget_bytes=1 << 20, derive=derive)
    adapters = adapters_of(model)
    with Store(tmp_path / "store", inspect=inspect, limits=StoreLimits()) as store:
        digests = [
            registered(store, f"a{at}", config, tensors, ready.model_digest)
            for at, (config, tensors, _) in enumerate(adapters)
        ]
        config, tensors, _ = adapters[0]
        other = {name: t + 1e-3 if "base_layer" in name else t for name, t in tensors.items()}
        with pytest.raises(InvalidAdapter, match="found other values than this base has"):
            registered(store, "another", config, other, ready.model_digest)
    mixes: list[dict[int, float]] = [{}, {0: 1.0}, {1: 1.0}, {0: 0.5, 1: 0.75}]
    mixes += [{2: 1.0}, {0: 0.75, 2: -0.5}] if len(adapters) > 2 else []
    sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, prompt_logprobs=0)
    requests = [
        Submit(str(at), PROMPT, sampling, tuple(AdapterUse(digests[k], w) for k, w in mix.items()))
        for at, mix in enumerate(mixes)
    ]

    outputs, scores = served(core, requests)

    expected = [merged(model, mix, [meant for _, _, meant in adapters]) for mix in mixes]
    found = torch.tensor([scores[str(at)] for at in range(len(mixes))])
    torch.testing.assert_close(found, torch.stack([scored(each) for each in expected]), atol=2e-4, rtol=1e-5)
    assert torch.cdist(found, found).fill_diagonal_(1.0).min() > 0.1, "no two mixes are alike"
    assert outputs == {str(at): generated(each) for at, each in enumerate(expected)}
