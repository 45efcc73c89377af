"""A real ``timbre serve`` in a process of its own, with a store that is thrown away."""

from __future__ import annotations

import json
import os
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
    def start(
        cls, folder: Path, on: str, threads: int, flags: Sequence[str], model_folder: Path | None = None
    ) -> MeasuredServer:
        """Serve a model (None: the embedded one) on a device with that many CPU threads; returns when it is
        ready. What it stores lies below ``folder``."""
        model_folder = model_folder or embedded_model_folder(CACHE, print)
        dtype = str(chosen_dtype("auto", device(on))).removeprefix("torch.")
        port = free_port()
        own = ["--model", model_folder, "--dtype", dtype, "--device", on]
        own += ["--num-threads", threads, "--port", port]
        own += ["--store-dir", folder / "store", "--adapter-memory-mib", 4096, "--log-level", "warning"]
        command = [sys.executable, "-m", "timbre_server", "serve", *map(str, own), *flags]
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(f"{url}/readyz", process)
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

    def processor_s(self) -> float:
        """Seconds that all of its processes have computed so far."""
        main = psutil.Process(self.process.pid)
        times = [each.cpu_times() for each in (main, *main.children(recursive=True))]
        return sum(each.user + each.system for each in times)

    def engine_steps(self) -> tuple[float, int]:
        """Seconds that the engine has spent in steps so far, and how many they were."""
        found = {
            sample.name.removeprefix("timbre_engine_step_seconds_"): sample.value
            for family in text_string_to_metric_families(httpx2.get(f"{self.url}/metrics").text)
            if family.name == "timbre_engine_step_seconds"
            for sample in family.samples
        }
        return found["sum"], int(found["count"])

    def stop(self) -> None:
        stop(self.process)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def wait_until_ready(
    probe: str, process: subprocess.Popen[bytes], timeout_s: float = START_TIMEOUT_S
) -> None:
    """Until ``probe`` answers with 200. Raises RuntimeError where the process ends or takes too long."""
    give_up = time.monotonic() + timeout_s
    while time.monotonic() < give_up:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with status {process.returncode}")
        try:
            if httpx2.get(probe).status_code == 200:
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.2)
    stop(process)
    raise RuntimeError(f"the server was not ready within {timeout_s:.0f} s")


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
