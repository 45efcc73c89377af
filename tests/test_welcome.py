"""The first request: a shell that runs the line sends what the server takes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from timbre_server.welcome import FirstRequest, Key

KEY = "a-key-of-some-length"


def first_request(host: str = "127.0.0.1", key: Key | None = None) -> FirstRequest:
    return FirstRequest(host, 8000, "it's", has_tokenizer=True, has_chat_template=True, key=key)


def words_of(line: str, **variables: str) -> list[str]:
    """What a shell makes of the line's words."""
    program = f"printf '%s\\0' {line}"
    done = subprocess.run(
        ["sh", "-c", program], env={**os.environ, **variables}, capture_output=True, text=True, check=True
    )
    return done.stdout.split("\0")[:-1]


def test_a_shell_reads_the_request_as_it_is_meant() -> None:
    words = words_of(first_request().curl())
    body = json.loads(words[words.index("-d") + 1])
    assert words[:3] == ["curl", "-s", "http://127.0.0.1:8000/v1/chat/completions"]
    assert body["model"] == "it's"
    assert not [word for word in words if word.startswith("Authorization")]


@pytest.mark.parametrize("keys", [KEY, f"{KEY},another-key-of-some-length"])
def test_a_key_is_the_settings_first(keys: str) -> None:
    request = first_request(key=Key())
    assert words_of(request.curl(), TIMBRE_API_KEYS=keys)[-1] == f"Authorization: Bearer {KEY}"
    assert "TIMBRE_API_KEYS" in request.introduction()


def test_a_key_is_read_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "the keys"
    file.write_text(f"# of the team\n\n{KEY}\nanother-key-of-some-length\n")
    assert words_of(first_request(key=Key(file)).curl())[-1] == f"Authorization: Bearer {KEY}"


@pytest.mark.parametrize(
    ("host", "origin"), [("0.0.0.0", "http://127.0.0.1:8000"), ("::1", "http://[::1]:8000")]
)
def test_the_address_can_be_reached(host: str, origin: str) -> None:
    assert words_of(first_request(host).curl())[2].startswith(f"{origin}/")
