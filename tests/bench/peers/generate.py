"""transformers' ``generate``, with PEFT where adapters are asked for: ``adapter_names`` has one for each row.

A static batch of requests of equal length, without HTTP: its best case. It runs in a process of its own, with
threads and memory of its own (`peers.generate_process`).
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from load import Job, Timing
from peers.contract import Peer, Setting
from scenarios import Scenario


class Generate(Peer):
    name = "PEFT generate"

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def missing(self) -> str | None:
        return None if importlib.util.find_spec("peft") else "peft is not installed"

    def start(self, setting: Setting) -> None:
        script = Path(__file__).with_name("generate_process.py")
        flags = ["--dtype", setting.dtype, "--threads", str(setting.threads), "--base", setting.base]
        loras = [word for name, folder in setting.loras.items() for word in ("--lora", f"{name}={folder}")]
        self._process = subprocess.Popen(
            [sys.executable, script, setting.model_folder, *flags, *loras],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._said()

    def runs(self, scenario: Scenario) -> bool:
        """A batch is put together once and has one length."""
        return scenario.kind != "mixed"

    def measure(self, streams: Sequence[Sequence[Job]]) -> list[Timing]:
        jobs = [job for own in streams for job in own]
        assert self._process is not None
        assert self._process.stdin is not None
        started_s = time.perf_counter()
        asked = {"models": [j.model for j in jobs], "prompts": [j.prompt for j in jobs]}
        self._process.stdin.write(json.dumps(asked | {"new_tokens": jobs[0].new_tokens}) + "\n")
        self._process.stdin.flush()
        after_s: list[float] = json.loads(self._said())
        arrivals = tuple((started_s + seconds, 1) for seconds in after_s)
        wrong = None if len(arrivals) == jobs[0].new_tokens else f"{len(arrivals)} tokens came"
        return [Timing(started_s, arrivals, arrivals[-1][0], len(job.prompt), wrong) for job in jobs]

    def _said(self) -> str:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name}: its process ended with status {self._process.wait()}")
        return line

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
