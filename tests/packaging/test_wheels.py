"""Both wheels build without a network, hold our names and nothing else, and the client's brings no torch."""

from __future__ import annotations

import email
import subprocess
import sys
import zipfile
from email.message import Message
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def build(project: Path, out: Path) -> Path:
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(out), str(project)]
    subprocess.run(command, check=True, capture_output=True)
    [wheel] = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def server_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(REPOSITORY, tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="session")
def client_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(REPOSITORY / "clients/python", tmp_path_factory.mktemp("client"))


def contents(wheel: Path) -> dict[str, set[str]]:
    """Files by top-level name, without the wheel's own records."""
    found: dict[str, set[str]] = {}
    for name in zipfile.ZipFile(wheel).namelist():
        top, _, rest = name.partition("/")
        if not top.endswith(".dist-info"):
            found.setdefault(top, set()).add(rest)
    return found


def metadata(wheel: Path) -> Message:
    archive = zipfile.ZipFile(wheel)
    [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(archive.read(name))


def sources(*packages: str) -> dict[str, set[str]]:
    """What is in the tree, by package."""
    found = {}
    for package in packages:
        root = REPOSITORY / package
        files = (path for path in root.rglob("*") if path.is_file() and path.suffix != ".pyc")
        found[root.name] = {path.relative_to(root).as_posix() for path in files}
    return found


def test_the_server_wheel_holds_three_packages_whole_and_nothing_else(server_wheel: Path) -> None:
    assert contents(server_wheel) == sources(
        "server/timbre_server", "adapters_store/timbre_store", "adapters_store/timbre_methods"
    )


def test_the_client_wheel_holds_one_package_whole_and_nothing_else(client_wheel: Path) -> None:
    assert contents(client_wheel) == sources("clients/python/timbre_client")


def test_the_server_wheel_brings_the_command(server_wheel: Path) -> None:
    archive = zipfile.ZipFile(server_wheel)
    [name] = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
    assert archive.read(name).decode() == "[console_scripts]\ntimbre = timbre_server.cli:main\n"


def test_the_client_asks_for_no_tensor_library(client_wheel: Path) -> None:
    asked = metadata(client_wheel).get_all("Requires-Dist")
    assert [entry for entry in asked if "extra ==" not in entry] == ["httpx2>=2.16"]
    assert not any("torch" in entry for entry in asked)


def test_the_client_wheel_works_by_itself_without_torch(client_wheel: Path) -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(client_wheel)!r}); import timbre_client;"
        "print(timbre_client.__file__); print({'torch', 'numpy', 'timbre_server'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == [f"{client_wheel}/timbre_client/__init__.py", "set()"]


def test_both_wheels_have_one_version(server_wheel: Path, client_wheel: Path) -> None:
    assert metadata(server_wheel)["Version"] == metadata(client_wheel)["Version"]
