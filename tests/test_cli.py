"""The command line: what it says, what it refuses, and that its options are the settings."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from timbre_server.cli import main
from timbre_server.settings import Settings


def help_text(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main([*arguments, "--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_the_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_text(capsys)
    assert "serve " in text
    assert "version " in text


def test_every_setting_is_an_option_in_its_group(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    text = help_text(capsys, "serve")
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')}" in text
    for title in (
        "Model:",
        "Engine:",
        "Adapters:",
        "HTTP:",
        "Limits:",
        "Security:",
        "Life cycle:",
        "Logs and metrics:",
    ):
        assert f"\n{title}\n" in text
    assert "{auto,bfloat16,float16,float32}" in text
    assert "(default: 8000)" in text
    assert "--layer-replication JSON" in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.skipif(not any(metadata.distributions(name="timbre")), reason="timbre is not installed here")
def test_version_is_the_distributions(capsys: pytest.CaptureFixture[str]) -> None:
    pyproject = Path(__file__).parents[1] / "pyproject.toml"
    expected = tomllib.loads(pyproject.read_text())["project"]["version"]
    assert main(["version"]) == 0
    assert capsys.readouterr().out == f"{expected}\n"


def test_wrong_settings_end_with_their_names_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", "x"]) == 2
    assert "port (--port, TIMBRE_PORT)" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["server"], ["serve", "--prot", "1"], ["serve", "--max-num", "1"]])
def test_unknown_words_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_help_needs_nothing_heavy() -> None:
    program = (
        "import sys; from timbre_server.cli import main\n"
        "try: main(['serve', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'fastapi'} & set(sys.modules); print(); print(sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
