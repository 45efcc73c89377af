"""A real ``timbre serve`` in a process of its own, with a store that is thrown away."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil
from prometheus_client.parser import text_string_to_metric_families
from torch import device

from timbre_client import Timbre
from timbre_server.engine.embedded_model import embedded_model_folder
from timbre_server.engine.model_loader import chosen_dtype

CACHE = Path(".timbre/cache")
START_TIMEOUT_S = 300.0


@dataclass
class MeasuredServer:
    url: str
    base: str
    model_folder: Path
    vocab_size: int
    dtype: str
    process: subprocess.Popen[bytes]

    @classmethod
    def start(cls, folder: Path, on: str, threads: int, flags: Sequence[str]) -> MeasuredServer:
        """Serve the embedded model on a device with that many CPU threads; returns when it is ready."""
        model_folder = embedded_model_folder(CACHE, print)
        dtype = str(chosen_dtype("auto", device(on))).removeprefix("torch.")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        own = ["--model", model_folder, "--dtype", dtype, "--device", on]
        own += ["--num-threads", threads, "--port", port]
        own += ["--store-dir", folder / "store", "--adapter-memory-mib", 4096, "--log-level", "warning"]
        command = [sys.executable, "-m", "timbre_server", "serve", *map(str, own), *flags]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(url, process)
        base = httpx2.get(f"{url}/v1/models").json()["data"][0]["id"]
        vocab_size = json.loads((model_folder / "config.json").read_text())["vocab_size"]
        return cls(url, base, model_folder, vocab_size, dtype, process)

    def upload(self, folder: Path) -> None:
        with Timbre(self.url) as client:
            for adapter in sorted(folder.iterdir()):
                client.upload_adapter(adapter.name, adapter)

    def facts(self) -> dict[str, Any]:
        """What the server holds, in bytes."""
        text = httpx2.get(f"{self.url}/metrics").text
        resident = {
            f"{sample.name}{sorted(sample.labels.items())}": sample.value
            for family in text_string_to_metric_families(text)
            if family.name == "timbre_adapter_bytes"
            for sample in family.samples
        }
        main = psutil.Process(self.process.pid)
        rss = {"server": main.memory_info().rss}
        rss |= {
            f"engine {i}": child.memory_info().rss for i, child in enumerate(main.children(recursive=True))
        }
        return {"dtype": self.dtype, "resident_bytes": resident, "rss_bytes": rss}

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    give_up = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < give_up:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}")
        try:
            if httpx2.get(f"{url}/readyz").status_code == 200:
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.2)
    process.kill()
    raise RuntimeError(f"the server was not ready within {START_TIMEOUT_S:.0f} s")
