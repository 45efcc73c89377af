"""What a server, or a library in a process of its own, must offer to be measured beside ours."""

from __future__ import annotations

import asyncio
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from load import Job, Timing, run
from measured_server import stop, wait_until_ready
from scenarios import Scenario

START_TIMEOUT_S = 900.0
"""Some compile first."""


@dataclass(frozen=True)
class Setting:
    """What all peers share: the base, its dtype by torch's name, threads, and LoRA folders by name."""

    model_folder: Path
    base: str
    dtype: str
    threads: int
    loras: Mapping[str, Path]
    scratch: Path
    """A folder for conversions and logs."""


class Peer(ABC):
    """Not started when it is made; requests name the base and adapters as `Setting` does."""

    name: str

    @abstractmethod
    def missing(self) -> str | None:
        """Why it cannot be run here: what was looked for and was not found."""

    @abstractmethod
    def start(self, setting: Setting) -> None:
        """Returns when it is ready. Raises RuntimeError where that fails."""

    def runs(self, scenario: Scenario) -> bool:
        return True

    @abstractmethod
    def measure(self, streams: Sequence[Sequence[Job]]) -> list[Timing]: ...

    @abstractmethod
    def stop(self) -> None:
        """Also of one that was not started, or not whole."""


class HttpPeer(Peer):
    """A server of OpenAI's API in a process of its own."""

    ready_path = "/health"

    def __init__(self) -> None:
        self.url = ""
        self._process: subprocess.Popen[bytes] | None = None

    def launch(self, command: Sequence[object], port: int, log: Path, environment: Mapping[str, str]) -> None:
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [str(word) for word in command],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=dict(environment),
            )
        self.url = f"http://127.0.0.1:{port}"
        try:
            wait_until_ready(self.url + self.ready_path, self._process, START_TIMEOUT_S)
        except RuntimeError as error:
            last = log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{self.name}: {error}; the end of its log:\n{last}") from error

    @abstractmethod
    def body(self, job: Job) -> Mapping[str, Any]:
        """The request as this server wants it."""

    def measure(self, streams: Sequence[Sequence[Job]]) -> list[Timing]:
        return asyncio.run(run(self.url, streams, self.body))

    def stop(self) -> None:
        if self._process is not None:
            stop(self._process)
