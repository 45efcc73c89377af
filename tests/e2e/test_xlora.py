"""X-LoRA, trained in PEFT's folders and packed into one, through a real server, against PEFT."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file

from timbre_client.export.xlora import xlora as pack

COUNT = 6


def expert(rank: int) -> peft.LoraConfig:
    return peft.LoraConfig(r=rank, lora_alpha=6, target_modules=["q_proj", "down_proj"])


@pytest.fixture
def trained(base: torch.nn.Module, catalogue: ModuleType, tmp_path: Path) -> torch.nn.Module:
    """The model as PEFT runs it; its folders are below ``tmp_path``."""
    model = copy.deepcopy(base)
    model.config.use_cache = False
    folders = [
        catalogue.save_adapter(base, lambda e=e: expert(e + 2), tmp_path / str(e), std=0.5, seed=e)
        for e in range(2)
    ]
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=base.config.hidden_size,
        adapters={str(e): str(folder) for e, folder in enumerate(folders)},
        layerwise_scalings=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped: torch.nn.Module = peft.get_peft_model(model, config).eval()
    torch.manual_seed(3)
    classifier = {name: p for name, p in wrapped.named_parameters() if "internal_xlora_classifier" in name}
    for parameter in classifier.values():
        parameter.data.normal_(std=0.5)
    config.save_pretrained(str(tmp_path))
    save_file({name: p.data for name, p in classifier.items()}, tmp_path / "adapter_model.safetensors")
    return wrapped


@torch.no_grad()
def test_a_packed_xlora_answers_as_peft_does(
    trained: torch.nn.Module, tiny_server: Any, prompt_ids: list[int], tmp_path: Path
) -> None:
    uploaded = tiny_server.upload("xlora", pack(tmp_path / "packed", tmp_path))
    assert uploaded.status_code == 201, uploaded.text
    assert uploaded.json()["method"] == "xlora"
    assert uploaded.json()["scouts"] is True
    tokens = list(prompt_ids)
    for _ in range(COUNT):
        tokens.append(int(trained(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    body = {"model": "xlora", "prompt": prompt_ids, "max_tokens": COUNT, "temperature": 0, "ignore_eos": True}
    with tiny_server.client() as client:
        answers = [
            client.post("/v1/completions", json={**body, "model": model, "return_token_ids": True}).json()
            for model in ("xlora", "xlora")
        ]
    assert [answer["choices"][0]["token_ids"] for answer in answers] == [tokens[len(prompt_ids) :]] * 2
