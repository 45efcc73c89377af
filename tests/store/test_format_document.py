"""FORMAT.md says what is so."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path
from types import ModuleType

import timbre_store
from timbre_store.failpoints import FAIL_POINTS
from timbre_store.manifest import Manifest

DOCUMENT = (Path(timbre_store.__path__[0]).parent / "FORMAT.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return DOCUMENT.split(f"\n## {title}\n")[1].split("\n## ")[0]


def first_column(table: str) -> list[str]:
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def test_the_document_begins_with_the_promises() -> None:
    assert re.findall(r"^## (.*)$", DOCUMENT, re.MULTILINE)[0] == "Promises"


def test_the_crash_table_has_each_fail_point_once() -> None:
    assert sorted(first_column(section("What a crash leaves"))) == sorted(FAIL_POINTS)


def test_the_example_manifest_is_one_and_has_the_digest_that_is_printed() -> None:
    text = section("The manifest")
    example = re.findall(r"```json\n(.*)\n```", text)[0]
    assert Manifest.from_bytes(example.encode()).digest == re.findall(r"digest `(sha256:\w+)`", text)[0]


def test_the_manifest_s_fields_are_all_explained() -> None:
    assert sorted(first_column(section("The manifest"))) == sorted(Manifest.__dataclass_fields__)


def test_the_folder_holds_what_the_layout_shows(tmp_path: Path, samples: ModuleType) -> None:
    with samples.open_store(tmp_path) as store:
        samples.upload(store, "a", 1)
        found = {path.name for path in tmp_path.iterdir()}
    shown = set(re.findall(r"^      ([a-z]\S*?)[/,]? ", section("Layout"), re.MULTILINE))
    assert {name.split("/")[0] for name in shown} | {
        "catalogue.sqlite3-wal",
        "catalogue.sqlite3-shm",
    } == found


def test_the_tables_are_those_that_are_listed(tmp_path: Path, samples: ModuleType) -> None:
    samples.open_store(tmp_path).close()
    catalogue = sqlite3.connect(tmp_path / "catalogue.sqlite3")
    rows = catalogue.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    columns = {
        name: ", ".join(row[1] for row in catalogue.execute(f"PRAGMA table_info({name})")) for (name,) in rows
    }
    catalogue.close()
    listed = re.findall(r"^\| `(\w+)` \| ([^|]*) \|", section("Layout"), re.MULTILINE)
    assert dict(listed) == columns
