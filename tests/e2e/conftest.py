"""Real servers: ``timbre serve`` in a process of its own, on a tiny random model or on the embedded one."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import httpx2
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

START_TIMEOUT_S = 240.0
CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
END = "<|end|>"


@dataclass
class LiveServer:
    """A running server and what a test needs to reach it."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def client(self) -> httpx2.Client:
        return httpx2.Client(base_url=self.url, timeout=120)

    def upload(self, name: str, folder: Path) -> httpx2.Response:
        files = {
            file: (file, (folder / file).read_bytes())
            for file in ("adapter_config.json", "adapter_model.safetensors")
        }
        with self.client() as client:
            return client.post("/v1/adapters", data={"name": name}, files=files)

    def prompt_logprobs(self, prompt_ids: list[int], **fields: object) -> Tensor:
        """Of each next token of a prompt, which is echoed, in float64."""
        body = {"prompt": prompt_ids, "max_tokens": 1, "echo": True, "logprobs": 0, **fields}
        with self.client() as client:
            answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        found = answer.json()["choices"][0]["logprobs"]["token_logprobs"]
        return torch.tensor(found[1 : len(prompt_ids)], dtype=torch.float64)

    def engine_pids(self) -> list[int]:
        """The server's child processes."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
        return self.process.wait()


def start_server(folder: Path, *flags: object) -> LiveServer:
    """Start ``timbre serve`` and wait until it is ready; its log is in ``folder``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / f"server-{port}.log"
    own = ["--port", port, "--store-dir", folder / "store", "--num-threads", 1, "--drain-lead-s", 0]
    command = [sys.executable, "-m", "timbre_server", "serve", *map(str, [*own, *flags])]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    server = LiveServer(f"http://127.0.0.1:{port}", process, log)
    give_up = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < give_up and process.poll() is None:
        try:
            if httpx2.get(f"{server.url}/readyz", timeout=10).status_code == 200:
                return server
        except httpx2.TransportError:
            pass
        time.sleep(0.1)
    process.kill()
    pytest.fail(f"the server did not become ready; its log:\n{log.read_text()[-4000:]}")


@pytest.fixture(scope="session")
def catalogue(load_module: Callable[[Path], ModuleType]) -> ModuleType:
    """`peft_catalogue.py` beside this file."""
    return load_module(Path(__file__).with_name("peft_catalogue.py"))


@pytest.fixture(scope="session")
def prompt_ids(catalogue: ModuleType) -> list[int]:
    """A prompt of twelve tokens of the tiny model."""
    ids: list[int] = catalogue.PROMPT_IDS
    return ids


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with a byte-level tokenizer, as an ordinary model folder."""
    folder = tmp_path_factory.mktemp("tiny-model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, chat_template=CHAT_TEMPLATE)
    fast.save_pretrained(folder)
    torch.manual_seed(21)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=48,
        intermediate_size=70,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=False,
        eos_token_id=fast.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base(tiny_model: Path) -> nn.Module:
    """The tiny model as PEFT gets it; not to be changed."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    return model


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., LiveServer]]:
    """Starts servers with flags of a test's own; all are stopped in the end."""
    started: list[LiveServer] = []

    def start(*flags: object) -> LiveServer:
        started.append(start_server(tmp_path_factory.mktemp("server"), *flags))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="session")
def tiny_server(serve: Callable[..., LiveServer], tiny_model: Path) -> LiveServer:
    """The tiny model in float32, with every log-probability on offer, and adapters that may be pinned."""
    flags = ("--model", tiny_model, "--served-model-name", "tiny", "--dtype", "float32")
    return serve(*flags, "--max-logprobs", -1, "--kv-cache-mib", 16, "--allow-merged-pin")
