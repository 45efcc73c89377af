"""llama.cpp's server: ``DIR/build/bin/llama-server``, and beside it the sources ``DIR/src/llama.cpp``, whose
scripts make GGUF files of the base and of LoRAs.

Adapters are fixed when it starts, and a request names them by place. One that names none gets all of them;
the base alone is any of them at scale 0.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from load import Job, openai_body
from measured_server import free_port
from peers.contract import HttpPeer, Setting

SLOTS, SLOT_TOKENS = 32, 1024
OUT_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


class LlamaCpp(HttpPeer):
    name = "llama.cpp"

    def __init__(self, folder: Path | None) -> None:
        super().__init__()
        self._folder = folder
        self.places: dict[str, int] = {}

    def missing(self) -> str | None:
        if self._folder is None:
            return "no --llamacpp was given"
        needed = (
            self._server,
            self._script("convert_hf_to_gguf.py"),
            self._script("convert_lora_to_gguf.py"),
        )
        absent = [str(path) for path in needed if not path.exists()]
        return f"there is no {', no '.join(absent)}" if absent else None

    @property
    def _server(self) -> Path:
        assert self._folder is not None, "missing() says why it cannot be started"
        return self._folder / "build" / "bin" / "llama-server"

    def _script(self, name: str) -> Path:
        assert self._folder is not None, "missing() says why it cannot be started"
        return self._folder / "src" / "llama.cpp" / name

    def start(self, setting: Setting) -> None:
        out_type = ["--outtype", OUT_TYPES[setting.dtype]]
        base = setting.scratch / "base.gguf"
        self._convert("convert_hf_to_gguf.py", [setting.model_folder, *out_type, "--outfile", base])
        loras = []
        for place, (name, folder) in enumerate(setting.loras.items()):
            target = setting.scratch / f"{name}.gguf"
            options: list[object] = ["--base", setting.model_folder, *out_type, "--outfile", target]
            self._convert("convert_lora_to_gguf.py", [*options, folder])
            loras.append(str(target))
            self.places[name] = place
        port = free_port()
        command: list[object] = [self._server, "-m", base, "--alias", setting.base, "--host", "127.0.0.1"]
        command += ["--port", port, "-np", SLOTS, "-c", SLOTS * SLOT_TOKENS, "-t", setting.threads]
        command += ["--cache-ram", 0, *(["--lora", ",".join(loras)] if loras else [])]
        self.launch(command, port, setting.scratch / "llamacpp.log", os.environ)

    def _convert(self, script: str, options: list[object]) -> None:
        """Raises RuntimeError with what the script said."""
        command = [sys.executable, str(self._script(script)), *map(str, options)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{script} ended with status {done.returncode}: {done.stderr[-2000:]}")

    def body(self, job: Job) -> Mapping[str, Any]:
        body = {key: value for key, value in openai_body(job).items() if key != "return_token_ids"}
        if self.places:
            place = self.places.get(job.model)
            body["lora"] = [{"id": place or 0, "scale": 0.0 if place is None else 1.0}]
        return body
