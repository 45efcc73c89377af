"""From a folder on disk to a model that is ready to serve, and the folders that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BloomConfig, GPTJConfig, LlamaConfig, PreTrainedModel

from timbre_server.engine.attention import ATTENTION_NAME
from timbre_server.engine.model_digest import model_digest
from timbre_server.engine.model_loader import (
    chosen_device,
    chosen_dtype,
    end_token_ids,
    factors_rounded_to,
    load_model,
    longest_sequence,
    prepare_model,
)
from timbre_server.errors import UnsupportedModel

TinyModel = Callable[[str], PreTrainedModel]
CPU = torch.device("cpu")


@pytest.fixture
def llama_folder(tiny_model: TinyModel, tmp_path: Path) -> Path:
    folder = tmp_path / "llama"
    tiny_model("llama").save_pretrained(folder)
    return folder


def test_a_folder_is_loaded_checked_and_given_our_attention(llama_folder: Path) -> None:
    told: list[str] = []
    prepared = prepare_model(
        str(llama_folder), dtype="auto", device="cpu", check=True, on_progress=told.append
    )
    model = prepared.loaded.model
    assert model.config._attn_implementation == ATTENTION_NAME
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert len(prepared.probed.groups) == 13
    assert told == [
        f"Loading {llama_folder}",
        "Probing the model's layers",
        "Checking attention against the model's own",
    ]


def test_a_tied_head_stays_tied_and_counts_once(llama_folder: Path) -> None:
    loaded = load_model(str(llama_folder), dtype="float32", device="cpu")
    model = loaded.model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    weights = sum(4 * parameter.numel() for parameter in model.parameters())
    assert weights <= loaded.num_bytes < weights + 1024


def test_the_asked_dtype_is_the_model_s_and_rotary_frequencies_stay_float32(llama_folder: Path) -> None:
    model = load_model(str(llama_folder), dtype="bfloat16", device="cpu").model
    assert model.dtype is torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype is torch.float32


def test_auto_is_a_dtype_that_the_processor_computes_itself() -> None:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    native = "avx512_bf16" in flags or "amx_bf16" in flags
    assert chosen_dtype("auto", CPU) is (torch.bfloat16 if native else torch.float32)
    assert chosen_dtype("float16", CPU) is torch.float16


def test_factors_are_rounded_to_what_a_model_runs_in_or_is_asked_for() -> None:
    assert factors_rounded_to("auto", torch.bfloat16) is torch.bfloat16
    assert factors_rounded_to("bfloat16", torch.float32) is torch.bfloat16
    assert factors_rounded_to("float32", torch.bfloat16) is None
    for dtype in (torch.float32, torch.float16):
        assert factors_rounded_to("auto", dtype) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_said_so() -> None:
    assert chosen_device("auto") == CPU
    with pytest.raises(UnsupportedModel, match="finds no GPU"):
        chosen_device("cuda")


def test_the_digest_outlives_dtype_name_and_sharding(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    digest = model_digest(tmp_path / "whole")
    assert digest.startswith("sha256:")
    assert model_digest(tmp_path / "sharded") == digest
    for dtype in ("float32", "bfloat16"):
        assert load_model(str(tmp_path / "whole"), dtype=dtype, device="cpu").digest == digest


def test_another_weight_or_another_setting_is_another_digest(llama_folder: Path) -> None:
    digest = model_digest(llama_folder)
    weights = load_file(llama_folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, llama_folder / "model.safetensors", metadata={"format": "pt"})
    changed_weight = model_digest(llama_folder)
    settings = json.loads((llama_folder / "config.json").read_text())
    settings["rms_norm_eps"] = 0.5
    (llama_folder / "config.json").write_text(json.dumps(settings))
    assert len({digest, changed_weight, model_digest(llama_folder)}) == 3


def test_pickled_weights_are_not_read(llama_folder: Path) -> None:
    weights = load_file(llama_folder / "model.safetensors")
    (llama_folder / "model.safetensors").unlink()
    torch.save(weights, llama_folder / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match="could not be loaded"):
        load_model(str(llama_folder), dtype="float32", device="cpu")


def test_a_folder_that_wants_its_own_code_run_is_refused(llama_folder: Path) -> None:
    settings = json.loads((llama_folder / "config.json").read_text())
    settings |= {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (llama_folder / "config.json").write_text(json.dumps(settings))
    (llama_folder / "own.py").write_text("raise SystemExit('this code ran')")
    with pytest.raises(UnsupportedModel, match="could not be loaded"):
        load_model(str(llama_folder), dtype="float32", device="cpu")


def test_a_folder_that_is_not_there_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"nowhere: could not be loaded"):
        load_model(str(tmp_path / "nowhere"), dtype="float32", device="cpu")


def test_a_family_that_cannot_be_served_is_refused_while_loading(
    model_of: Callable[[GPTJConfig], PreTrainedModel], tmp_path: Path
) -> None:
    config = GPTJConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)
    model_of(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"gptj \(GPTJForCausalLM\): 0 of 2 layers called"):
        prepare_model(str(tmp_path), dtype="float32", device="cpu", check=True)


def test_end_tokens_come_from_the_generation_config_first(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    assert end_token_ids(model) == ()
    model.config.eos_token_id = 5
    assert end_token_ids(model) == (5,)
    model.generation_config.eos_token_id = [7, 9]
    assert end_token_ids(model) == (7, 9)


def test_a_model_s_length_is_its_positions() -> None:
    assert longest_sequence(LlamaConfig(max_position_embeddings=77), asked=None) == 77
    assert longest_sequence(LlamaConfig(max_position_embeddings=77), asked=99) == 77


def test_a_model_that_does_not_say_its_length_has_the_one_asked_for() -> None:
    config = BloomConfig()
    assert longest_sequence(config, asked=50) == 50
    with pytest.raises(UnsupportedModel, match="Set max_model_len"):
        longest_sequence(config, asked=None)
