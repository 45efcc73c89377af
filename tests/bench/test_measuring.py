"""The benches run from end to end on a model that means nothing: that they work, not what they measure."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import floor
import gpu
import many
import pytest
import run
import run_peers
import step_profile
import torch
from load import Figures, Job, Timing, figures
from measured_server import MeasuredServer, free_port
from peers.contract import Setting
from peers.generate import Generate
from peers.llamacpp import LlamaCpp
from peers.vllm import Vllm
from random_adapters import FAMILIES, write_adapters
from scenarios import Scenario
from table import report
from transformers.utils import import_utils


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """The floor is not measured well."""
    monkeypatch.setattr(floor, "BUDGET_S", 0.0)
    monkeypatch.setattr(floor, "COPY_BYTES", 1 << 20)


def numbers(rows: list[dict[str, Any]], column: str) -> list[float]:
    return [float(row[column]) for row in rows]


@pytest.mark.slow
def test_a_real_server_is_measured_on_every_kind_of_load(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(tiny_model), "--rounds", "2", "--streams", "2", "--adapters", "2"]
    flags += ["--families", "lora,mola,vera,all", "--prompts", "8", "--new-tokens", "24"]
    args = run.arguments([*flags, "--popularity", "uniform", "--out", str(tmp_path / "bench.json")])
    rows, more = run.measure(args, tmp_path)
    assert len(rows) == 3 * 5
    assert numbers(rows, "errors") == [0] * 15
    assert min(numbers(rows, "tokens/s") + numbers(rows, "to base") + numbers(rows, "x floor")) > 0
    assert [row["to base"] for row in rows if row["scenario"].endswith("base")] == ["1.000"] * 3
    report(rows, args, **more)
    written = json.loads(args.out.read_text())
    assert written["rows"] == rows
    assert len(written["rounds"]) == 15
    assert "| decode, 2 x 8: mola, 2 uniform |" in capsys.readouterr().out


def test_a_batch_of_all_has_adapters_of_the_named_families_in_turn(tiny_model: Path, tmp_path: Path) -> None:
    uploaded: list[Path] = []
    server = SimpleNamespace(model_folder=tiny_model, upload=uploaded.append)
    asked = [Scenario("decode", 2, "ia3", 2), Scenario("decode", 2, "all", 2)]
    found = run.names_of(asked, "m", server, tmp_path, "lora,ia3,all")  # type: ignore[arg-type]
    own = {"lora": ["lora-0", "lora-1"], "ia3": ["ia3-0", "ia3-1"]}
    assert found == {"base": ["m"], **own, "all": ["lora-0", "ia3-0", "lora-1", "ia3-1"]}
    assert uploaded == [tmp_path]


@pytest.mark.slow
def test_servers_with_more_and_fewer_names_are_measured(tiny_model: Path, tmp_path: Path) -> None:
    few = ["--registered", "6", "3", "--contents", "3", "--asked", "5", "--requests", "4", "--rounds", "1"]
    args = many.arguments([*few, "--cold", "1", "--bank", "2", "--store", str(tmp_path / "kept")])
    measured = many.measure(args, tmp_path, tiny_model)
    assert {folder.name for folder in tmp_path.glob("kept/*/*")} == {"store"}
    assert numbers(measured["registered"], "registered") == [3, 6]
    assert measured["registered"][0]["ttft_p50_ratio"] == 1
    assert [row["family"] for row in measured["cold"]] == ["fourierft", "lora"]
    assert min(numbers(measured["cold"], "cold_to_warm")) > 0
    assert numbers(measured["bank"], "booked_bytes") == numbers(measured["bank"], "coefficient_bytes")


def test_a_server_that_did_not_answer_as_asked_is_stopped(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    nowhere = MeasuredServer(f"http://127.0.0.1:{free_port()}", "", tiny_model, 256, "float32", process)
    monkeypatch.setattr(MeasuredServer, "start", lambda *_: nowhere)
    args = many.arguments(["--contents", "1"])
    with (
        pytest.raises(RuntimeError, match="requests failed; the first: voice-000000: "),
        ExitStack() as stack,
    ):
        many.started(stack, tmp_path, args, 1, tiny_model)
    assert process.poll() is not None


def test_no_bench_is_taken_for_a_library_that_transformers_looks_for() -> None:
    for path in Path(__file__).parent.glob("*.py"):
        assert not hasattr(import_utils, f"is_{path.stem}_available"), path.name


def engine_parts(model: Path, *flags: str) -> dict[str, float]:
    short = ["--rounds", "2", "--steps", "3", "--prompt-tokens", "4"]
    return step_profile.engine_parts(step_profile.arguments([*short, *flags]), model)


@pytest.mark.cpp
@pytest.mark.parametrize("flags", [(), ("--changing-rows",)])
def test_a_decode_step_is_profiled_by_part(tiny_model: Path, flags: tuple[str, ...]) -> None:
    parts = engine_parts(tiny_model, "--family", "mola", "--rows", "2", *flags)
    kernels = {"linear layers", "attention", "adapters: Routed"}
    assert parts.keys() >= kernels | {step_profile.SAMPLING, step_profile.SCHEDULING, step_profile.PYTHON}
    assert not any(part.startswith("kernel ") for part in parts)
    assert min(parts[part] for part in kernels) > 0
    *each, whole = step_profile.rows_of(parts)
    assert numbers(each, "ms") == sorted(numbers(each, "ms"), reverse=True)
    assert whole["ms"] == pytest.approx(1e3 * sum(parts.values()), abs=0.01)


def test_parts_are_all_of_the_steps_that_were_not_timed() -> None:
    calls, kernels = {"sample": 2.0, "execute": 9.0}, {"linear layers": 5.0, "attention": 1.0}
    parts = step_profile.parts_of(10.0, calls, kernels)
    own = {step_profile.SAMPLING: 2.0, step_profile.SCHEDULING: 1.0, step_profile.PYTHON: 1.0}
    assert parts == kernels | own


@pytest.mark.cpp
def test_rows_of_all_families_take_turns_in_a_profile(tiny_model: Path) -> None:
    parts = engine_parts(tiny_model, "--family", "all", "--rows", str(len(FAMILIES)))
    operators = "LowRank Spectral Sparse Diagonal Rotation Circulant Kronecker Projected Routed"
    assert parts.keys() >= {f"adapters: {name}" for name in operators.split()}
    assert not any(part.startswith("kernel ") for part in parts)
    assert step_profile.turns({"a": [1, 2], "b": [3, 4]}, 0, 3) == [1, 3, 2]


def test_the_base_alone_has_no_adapters_in_its_profile(tiny_model: Path) -> None:
    parts = engine_parts(tiny_model, "--family", "base", "--rows", "2")
    assert parts.keys() >= {step_profile.SAMPLING, step_profile.SCHEDULING, step_profile.PYTHON}
    assert not any(part.startswith("adapters") for part in parts)


def test_the_gpu_bench_runs_its_cases_on_a_cpu() -> None:
    rows, more = gpu.measure(gpu.size_of(tiny=True, rows=3), rounds=2, steps=2, prompt_tokens=4)
    assert [row["case"] for row in rows] == list(gpu.CASES)
    assert [row["aim"] for row in rows] == [0.75, 0.97, 0.9, 0.85]
    assert rows[0]["to base"] == 1
    assert all(len(own) == 2 for own in more["step_s"].values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_gpu_bench_says_so() -> None:
    with pytest.raises(SystemExit, match="no GPU here"):
        gpu.size_of(tiny=False, rows=64)


@pytest.mark.parametrize(("flags", "kinds"), [([], {"decode"}), (["--scenarios", "mixed"], {"mixed"})])
def test_peers_are_measured_on_the_kinds_that_are_named_or_else_on_decode(
    flags: list[str], kinds: set[str]
) -> None:
    assert {each.kind for each in run.chosen(run_peers.arguments(flags))} == kinds


def test_peers_that_are_not_here_are_skipped_aloud(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BENCH_VLLM", raising=False)
    monkeypatch.setenv("BENCH_LLAMACPP", str(tmp_path / "nowhere"))
    args = run_peers.arguments([])
    peers = [Vllm(args.vllm), Vllm(tmp_path / "empty"), LlamaCpp(args.llamacpp)]
    setting = Setting(tmp_path, "base", "float32", 1, {}, tmp_path)
    with ExitStack() as stack:
        assert run_peers.started(peers, setting, stack) == []
    said = capsys.readouterr().out
    assert "vLLM is skipped: no --vllm was given" in said
    assert f"vLLM is skipped: there is no {tmp_path / 'empty' / 'bin' / 'python'}" in said
    assert f"llama.cpp is skipped: there is no {tmp_path / 'nowhere'}" in said


def test_peft_generates_for_the_base_and_for_adapters_of_its_own_for_each_row(
    tiny_model: Path, tmp_path: Path
) -> None:
    names = write_adapters(tiny_model, tmp_path, ["lora"], 2)["lora"]
    loras = {name: tmp_path / name for name in names}
    peer = Generate()
    with ExitStack() as stack:
        setting = Setting(tiny_model, "base", "float32", 1, loras, tmp_path)
        assert run_peers.started([peer], setting, stack) == [peer]
        for models in (["base", "base"], names):
            timings = peer.measure([[Job(model, (5, 6, 7), 4)] for model in models])
            assert [(len(t.arrivals), t.prompt_tokens, t.error) for t in timings] == [(4, 3, None)] * 2
            assert figures("decode", timings).tokens_per_s > 0


def test_llama_cpp_is_told_the_place_of_an_adapter_and_to_use_none_for_the_base() -> None:
    peer = LlamaCpp(None)
    peer.places = {"lora-0": 0, "lora-1": 1}
    assert peer.body(Job("lora-1", (1,), 2))["lora"] == [{"id": 1, "scale": 1.0}]
    assert peer.body(Job("base", (1,), 2))["lora"] == [{"id": 0, "scale": 0.0}]


def test_the_first_round_counts_for_no_peer(capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[tuple[str, int]] = []

    def slow_at_first(name: str) -> Any:
        def measure(round_: int) -> list[Timing]:
            asked.append((name, round_))
            return [Timing(0.0, ((1.0, 10),), 1.0 if round_ else 100.0, 1)]

        return SimpleNamespace(name=name, runs=lambda scenario: True, measure=measure)

    peers = [slow_at_first("Timbre"), slow_at_first("vLLM")]
    base = Scenario("mixed", 1, "base", 0)
    rounds = run_peers.measured_rounds(2, [base], peers, lambda scenario, number: number)
    assert asked == [(name, number) for number in range(3) for name in ("Timbre", "vLLM")]
    assert {key: [each.tokens_per_s for each in found] for key, found in rounds.items()} == {
        ("Timbre", base.name): [10.0, 10.0],
        ("vLLM", base.name): [10.0, 10.0],
    }
    said = capsys.readouterr().out
    assert f"warm-up, not counted: vLLM: {base.name}: 0.1 tokens/s" in said
    assert f"round 2: vLLM: {base.name}: 10.0 tokens/s" in said


def test_rows_of_peers_compare_with_their_own_base_and_with_ours() -> None:
    times = (1.0, 1.0, 1.0)
    speeds = {
        ("Timbre", "base"): 10.0,
        ("Timbre", "lora"): 8.0,
        ("vLLM", "base"): 20.0,
        ("vLLM", "lora"): 4.0,
    }
    lora = Scenario("decode", 2, "lora", 2)
    scenario_of = {"base": lora.partner, "lora": lora}
    rounds = {
        (peer, scenario_of[which].name): [Figures(speed, times, times, times, 0)]
        for (peer, which), speed in speeds.items()
    }
    floors = {each.name: 40.0 for each in scenario_of.values()}
    rows = run_peers.rows_of([lora.partner, lora], ["Timbre", "vLLM", "PEFT generate"], rounds, floors)
    assert [(row["peer"], row["to base"], row["to Timbre"], row["x floor"]) for row in rows] == [
        ("Timbre", "1.000", "1.000", "4.00"),
        ("vLLM", "1.000", "2.000", "2.00"),
        ("Timbre", "0.800", "1.000", "5.00"),
        ("vLLM", "0.200", "0.500", "10.00"),
    ]
