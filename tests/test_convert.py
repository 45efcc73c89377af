"""``timbre convert``: what it makes of pickles, and what it refuses without running it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from timbre_server import unpickle
from timbre_server.cli import main
from timbre_server.convert import PROGRAM
from timbre_server.unpickle import Job, Refused, chosen_tensors, read

CONFIG = b'{"peft_type": "MIXLORA",  "r": 2}\n'
TENSORS = {
    "mixlora.layers.0.mlp.moe_gate.weight": torch.arange(12.0).view(2, 6),
    "mixlora.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 6, dtype=torch.bfloat16),
}


class Command:
    """A pickle of it runs a command when it is read."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._mark}",)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes(CONFIG)
    return folder


def job(path: Path | str, **options: Any) -> Job:
    chosen: dict[str, Any] = {"inside": [], "strip_prefix": "", "keep": [], "cpu_seconds": 60, **options}
    return Job(str(path), "nowhere", **chosen)


def test_a_folder_becomes_an_adapter(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(TENSORS, source / "adapter_model.bin")
    target = tmp_path / "made" / "adapter"
    assert main(["convert", str(source), str(target)]) == 0
    assert capsys.readouterr().out == f"{target}: 72 bytes of tensors under 2 names\n"
    assert sorted(path.name for path in target.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert (target / "adapter_config.json").read_bytes() == CONFIG
    made = load_file(target / "adapter_model.safetensors")
    assert made.keys() == TENSORS.keys()
    assert all(torch.equal(made[name], tensor) for name, tensor in TENSORS.items())
    assert all(made[name].dtype == tensor.dtype for name, tensor in TENSORS.items())


@pytest.mark.parametrize("is_zip", [True, False], ids=["present format", "former format"])
def test_code_in_a_pickle_is_named_and_not_run(
    is_zip: bool, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark, target = tmp_path / "it_ran", tmp_path / "made"
    whole = {**TENSORS, "payload": Command(mark)}
    torch.save(whole, source / "adapter_model.bin", _use_new_zipfile_serialization=is_zip)
    assert main(["convert", str(source), str(target)]) == 1
    said = capsys.readouterr().err
    assert "it calls posix.system, which makes no tensor; nothing of it was run" in said
    assert "weights_only" not in said, "torch's own advice would run it"
    assert not mark.exists()
    assert not target.exists()


def test_a_whole_models_checkpoint_is_reduced_to_its_adapter(source: Path) -> None:
    checkpoint = {
        "epoch": 3,
        "state_dict": OrderedDict(
            {
                "llm.base_model.model.model.layers.0.mlp.router.bias": torch.ones(3),
                "llm.base_model.model.model.layers.0.mlp.original_module.up_proj.weight": torch.ones(9, 6),
                "vit.layers.0.weight": torch.ones(2, 2),
                "steps": 7,
            }
        ),
    }
    torch.save(checkpoint, source / "model.pt")
    wanted = job(
        source / "model.pt", inside=["state_dict"], strip_prefix="llm.", keep=["*.router.*", "*.lora_*"]
    )
    made = chosen_tensors(wanted, read(wanted.source))
    assert list(made) == ["base_model.model.model.layers.0.mlp.router.bias"]


REFUSED: dict[str, tuple[object, dict[str, Any], str]] = {
    "a list": ([torch.ones(2)], {}, "is a list, expected a dict of tensors by name"),
    "a number beside tensors": ({"a": torch.ones(2), "epoch": 3}, {}, "'epoch' is an int, expected a tensor"),
    "a dict of tensors": ({"model": {"a": torch.ones(2)}}, {}, "look into it with --inside model"),
    "a name that is a number": ({7: torch.ones(2)}, {}, "an entry is called 7, an int; expected a name"),
    "no such entry": ({"a": torch.ones(2)}, {"inside": ["b"]}, "no entry 'b' to look inside; it has a"),
    "nothing kept": ({"a": torch.ones(2)}, {"keep": ["*.lora_*"]}, "no tensor is left .* names are a"),
    "two of one name": ({"x.a": torch.ones(2), "a": torch.ones(2)}, {"strip_prefix": "x."}, "two tensors"),
    "a name of safetensors": ({"x.__metadata__": torch.ones(2)}, {"strip_prefix": "x."}, "keeps for itself"),
    "a sparse tensor": ({"a": torch.eye(2).to_sparse_coo()}, {}, "'a' is a tensor of a kind .* sparse"),
    "complex numbers": ({"a": torch.ones(2, dtype=torch.complex64)}, {}, "'a' is a tensor .* complex64"),
    "far more than the file has": (
        {"a": torch.ones(2).expand(10**12, 2)},
        {},
        "tensors up to 'a' need 8000000000000 bytes, far more than the file has",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_dict_of_tensors_is_refused_by_name(case: str, source: Path) -> None:
    whole, options, message = REFUSED[case]
    torch.save(whole, source / "model.pt")
    wanted = job(source / "model.pt", **options)
    with pytest.raises(Refused, match=message):
        chosen_tensors(wanted, read(wanted.source))


def test_a_refusal_and_a_broken_file_leave_nothing_behind(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "made"
    torch.save({**TENSORS, "epoch": 3}, source / "adapter_model.bin")
    assert main(["convert", str(source), str(target)]) == 1
    assert "'epoch' is an int, expected a tensor; or leave it out with --keep" in capsys.readouterr().err
    (source / "torn.pth").write_bytes((source / "adapter_model.bin").read_bytes()[:300])
    assert main(["convert", str(source / "torn.pth"), str(target)]) == 1
    assert "torn.pth: it cannot be read as tensors: PytorchStreamReader" in capsys.readouterr().err
    assert not target.exists()


def test_sources_targets_and_configs_that_do_not_fit_are_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(*arguments: object) -> str:
        assert main(["convert", *map(str, arguments)]) == 1
        return capsys.readouterr().err

    assert "adapter_model.bin is no file" in refusal(source, tmp_path / "made")
    torch.save(TENSORS, source / "adapter_model.bin")
    assert "exists already; name another folder" in refusal(source, source)
    assert "not called as a pickle is" in refusal(source / "adapter_config.json", tmp_path / "made")
    (tmp_path / "list.json").write_text("[]")
    assert "list.json is not JSON of an object" in refusal(
        source, tmp_path / "made", "--config", tmp_path / "list.json"
    )
    (source / "adapter_config.json").unlink()
    assert "a server needs it, so write one" in refusal(source, tmp_path / "made")
    assert not (tmp_path / "made").exists()


LIMITED = """
import importlib.util, resource, sys, torch
spec = importlib.util.spec_from_file_location("unpickle", sys.argv[1])
unpickle = sys.modules["unpickle"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(unpickle)
job = unpickle.Job(sys.argv[2], "nowhere", [], "", [], 77)
unpickle._limit(job)
failures = []
try: torch.empty(3 * 2**30, dtype=torch.uint8)
except RuntimeError: failures.append("memory")
try: files = [open(sys.argv[2]) for _ in range(100)]
except OSError: failures.append("open files")
try: open(sys.argv[3], "wb").write(bytes(80 * 2**20))
except OSError: failures.append("a file's size")
print(failures, resource.getrlimit(resource.RLIMIT_CPU)[0], resource.getrlimit(resource.RLIMIT_CORE)[0])
"""


def test_the_process_that_reads_has_limits(source: Path, tmp_path: Path) -> None:
    torch.save(TENSORS, source / "model.pt")
    command = [sys.executable, "-I", "-c", LIMITED, str(PROGRAM), str(source / "model.pt")]
    done = subprocess.run([*command, str(tmp_path / "big")], capture_output=True, text=True, check=True)
    failures = ["memory", "open files", "a file's size"]
    assert done.stdout == f"{failures} 77 0\n"


def test_what_it_says_of_an_error_never_advises_to_run_the_file() -> None:
    advice = RuntimeError("Re-running `torch.load` with `weights_only` set to `False` will likely succeed")
    assert unpickle._told(advice) == "it is no file of tensors that torch.save wrote, or it is cut short"
    assert unpickle._told(MemoryError()) == "it cannot be read as tensors: MemoryError"


def test_the_help_says_what_it_is_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as caught:
        main(["convert", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "A pickle is a program" in text
    for option in ("--config FILE", "--inside KEY", "--strip-prefix TEXT", "--keep PATTERN"):
        assert option in text


def test_the_program_says_one_line_of_json(source: Path, tmp_path: Path) -> None:
    torch.save(TENSORS, source / "model.pt")
    asked = {
        "source": str(source / "model.pt"),
        "target": str(tmp_path / "out.safetensors"),
        "inside": [],
        "strip_prefix": "mixlora.",
        "keep": ["*.moe_gate.*"],
        "cpu_seconds": 60,
    }
    done = subprocess.run(
        [sys.executable, "-I", str(PROGRAM), json.dumps(asked)], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == {"tensors": 1, "bytes": 48}
    assert list(load_file(tmp_path / "out.safetensors")) == ["layers.0.mlp.moe_gate.weight"]
