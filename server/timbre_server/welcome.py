"""The first request that a person can paste: one line for a shell. Knows no server."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

QUESTION = "Why is the sky blue?"
ANY_ADDRESS = ("0.0.0.0", "::", "")


@dataclass(frozen=True, slots=True)
class Key:
    """Where a shell finds a key that the server takes. The key itself is not printed: output is kept."""

    file: Path | None = None
    """None: the variable TIMBRE_API_KEYS."""

    def in_shell(self) -> str:
        """What a shell replaces by the first key, between double quotes."""
        if self.file is None:
            return "${TIMBRE_API_KEYS%%,*}"
        return f"$(grep -m1 '^[^#[:space:]]' {shlex.quote(str(self.file))})"


@dataclass(frozen=True, slots=True)
class FirstRequest:
    host: str
    port: int
    model: str
    """An adapter's name, or the base's."""
    has_tokenizer: bool
    has_chat_template: bool
    key: Key | None = None
    """None: the server asks for none."""

    def curl(self) -> str:
        """The command, one line."""
        words = ["curl", "-s", f"{self._origin()}/v1/{self._path()}", "-H", "Content-Type: application/json"]
        line = shlex.join([*words, "-d", json.dumps(self._body())])
        return line if self.key is None else f'{line} -H "Authorization: Bearer {self.key.in_shell()}"'

    def introduction(self) -> str:
        """What is said before it."""
        if self.key is None or self.key.file is not None:
            return "Try it:"
        return "Try it, where TIMBRE_API_KEYS is set:"

    def _origin(self) -> str:
        host = "127.0.0.1" if self.host in ANY_ADDRESS else self.host
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"

    def _path(self) -> str:
        return "chat/completions" if self.has_chat_template else "completions"

    def _body(self) -> dict[str, object]:
        body: dict[str, object] = {"model": self.model, "max_tokens": 60, "temperature": 0}
        if self.has_chat_template:
            return {**body, "messages": [{"role": "user", "content": QUESTION}]}
        return {**body, "prompt": QUESTION if self.has_tokenizer else [1, 2, 3]}
