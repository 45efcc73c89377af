"""Where settings come from, which are refused, and that each one is documented."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from timbre_server.launch import engine_options
from timbre_server.settings import (
    LOOPBACK_HOSTS,
    Settings,
    SettingsError,
    load_settings,
    setting_groups,
    unknown_variables,
)

UNITS = {
    "int": (
        "_len",
        "_seqs",
        "_tokens",
        "_mib",
        "_kib",
        "_s",
        "_requests",
        "_logprobs",
        "_adapters",
        "_threads",
        "port",
    ),
    "float": ("_s",),
}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("TIMBRE_")]:
        monkeypatch.delenv(name)


def test_a_flag_wins_over_a_variable_and_that_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "timbre.toml"
    file.write_text("port = 1\nmax_num_seqs = 1\nnum_threads = 1\n")
    monkeypatch.setenv("TIMBRE_CONFIG", str(file))
    monkeypatch.setenv("TIMBRE_PORT", "2")
    monkeypatch.setenv("TIMBRE_MAX_NUM_SEQS", "2")
    settings = load_settings({"port": "3"})
    assert (settings.port, settings.max_num_seqs, settings.num_threads) == (3, 2, 1)


def test_the_stack_of_layers_is_json_in_a_flag_and_a_variable_and_an_array_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "timbre.toml"
    file.write_text("layer_replication = [[0, 4], [2, 5]]\n")
    assert load_settings({"config": str(file)}).layer_replication == ((0, 4), (2, 5))
    monkeypatch.setenv("TIMBRE_LAYER_REPLICATION", "[[0, 3]]")
    assert load_settings({}).layer_replication == ((0, 3),)
    assert load_settings({"layer_replication": "[[1, 2]]"}).layer_replication == ((1, 2),)
    assert engine_options(load_settings({}), "m").layer_replication == ((0, 3),)


def test_the_flag_names_the_file_too(tmp_path: Path) -> None:
    file = tmp_path / "timbre.toml"
    file.write_text('device = "cpu"\napi_keys = ["key-one-1", "key-two-2"]\n')
    settings = load_settings({"config": str(file)})
    assert (settings.device, settings.keys()) == ("cpu", ("key-one-1", "key-two-2"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"port": "x"}, "TIMBRE_PORT"),
        ({"port": "70000"}, "--port"),
        ({"max_num_seqs": "0"}, "greater than or equal to 1"),
        ({"max_num_seq": "1"}, "max_num_seq: there is no such setting"),
        ({"dtype": "int8"}, "'bfloat16'"),
        ({"layer_replication": "0-4"}, "--layer-replication"),
        ({"layer_replication": "[[0, 1, 2]]"}, "at most 2 items"),
        ({"max_logprobs": "-2"}, "greater than or equal to -1"),
        ({"examples_dir": "/no/such/folder"}, "examples_dir: there is no folder"),
        ({"lora_path_root": "/no/such/folder"}, "lora_path_root: there is no folder"),
        ({"api_keys": "short"}, "5 characters"),
        ({"api_keys": "with a space"}, "without spaces"),
        ({"api_key_file": "/no/such/file"}, "cannot be read"),
        ({"config": "/no/such/file.toml"}, "cannot be read"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_names(flags: dict[str, str], words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings(flags)
    assert words in str(caught.value)


def test_all_wrong_settings_are_named_at_once() -> None:
    with pytest.raises(SettingsError) as caught:
        load_settings({"port": "x", "device": "tpu", "nonsense": "1"})
    assert [line.split()[0].rstrip(":") for line in str(caught.value).splitlines()] == [
        "device",
        "port",
        "nonsense",
    ]


@pytest.mark.parametrize("text", ["port = ", "prot = 1", "[http]\nport = 1"])
def test_a_file_with_a_mistake_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "timbre.toml"
    file.write_text(text)
    with pytest.raises(SettingsError):
        load_settings({"config": str(file)})


def test_keys_come_from_the_setting_and_the_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# for the board\nkey-from-file\n\n")
    settings = load_settings({"api_keys": "key-one-1, key-two-2", "api_key_file": str(file)})
    assert settings.keys() == ("key-one-1", "key-two-2", "key-from-file")


def test_a_file_of_keys_without_a_key_is_refused_rather_than_open(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# none yet\n")
    with pytest.raises(SettingsError, match="holds no key"):
        load_settings({"api_key_file": str(file)})


def test_no_key_is_ever_shown() -> None:
    settings = load_settings({"api_keys": "a-secret-key"})
    assert "a-secret-key" not in repr(settings) + str(settings) + settings.model_dump_json()
    with pytest.raises(SettingsError) as caught:
        load_settings({"api_keys": "a secret key", "port": "a-secret-port"})
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "hosts"),
    [
        ({}, LOOPBACK_HOSTS),
        ({"host": "::1"}, LOOPBACK_HOSTS),
        ({"host": "0.0.0.0"}, ("*",)),
        ({"api_keys": "a-secret-key"}, ("*",)),
        ({"allowed_hosts": "a.test, *.b.test"}, ("a.test", "*.b.test")),
    ],
)
def test_only_a_local_server_without_keys_is_picky_about_hosts(flags: dict[str, str], hosts: Any) -> None:
    assert load_settings(flags).answered_hosts() == hosts


def test_variables_that_mean_nothing_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIMBRE_PROT", "1")
    monkeypatch.setenv("TIMBRE_PORT", "1")
    assert unknown_variables() == ("TIMBRE_PROT",)


def test_every_setting_is_documented_and_in_one_group() -> None:
    grouped = [name for names in setting_groups().values() for name in names]
    assert sorted(grouped) == sorted(Settings.model_fields)
    for name, field in Settings.model_fields.items():
        assert (field.description or "").rstrip(".") != "", name
        assert (field.description or "").endswith("."), name


def test_every_number_has_its_unit_in_its_name() -> None:
    for name, field in Settings.model_fields.items():
        kind = str(field.annotation)
        for number, units in UNITS.items():
            if f"'{number}'" in kind or kind.startswith(number):
                assert name.endswith(units), name


def test_settings_do_not_change_after_start() -> None:
    settings = load_settings({})
    with pytest.raises(ValueError, match="frozen"):
        settings.port = 1  # type: ignore[misc]
