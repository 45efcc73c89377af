"""The engine process with stand-ins in place of a model: ``python scripted_worker.py FD``.

``model`` in the options says how it behaves: "scripted" serves; "refused", "broken" and "gone" fail while
they start; "slow" starts when it is told to leave; "dies" is gone at its first step.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

import stand_ins  # beside this file, which runs as a program

from timbre_server.adapters.derivation import Derivations
from timbre_server.engine.core import EngineCore
from timbre_server.engine.messages import Ready
from timbre_server.engine.options import EngineOptions
from timbre_server.engine.worker import run_worker
from timbre_server.errors import UnsupportedModel


def assemble(
    options: EngineOptions, on_progress: Callable[[str], None], on_load_ended: Callable[[], None]
) -> tuple[EngineCore, Ready]:
    on_progress(f"Pretending to load {options.model}")
    if options.model == "refused":
        raise UnsupportedModel("refused: no such family")
    if options.model == "broken":
        raise RuntimeError("a secret path")
    if options.model == "gone":
        os._exit(3)
    while options.model == "slow":
        time.sleep(0.05)
        on_progress("Still pretending")
    runner = stand_ins.ScriptedRunner()
    if options.model == "dies":
        runner.fails = lambda plan: os._exit(4)
    bench = stand_ins.a_bench(
        adapters=stand_ins.AdaptersBesideTheLoop(on_load_ended=on_load_ended),
        runner=runner,
        max_model_len=options.max_model_len or 100,
    )
    ready = Ready(
        model_name=options.model,
        model_digest="sha256:0",
        model_type="scripted",
        dtype="float32",
        device="cpu",
        vocab_size=stand_ins.VOCAB_SIZE,
        max_model_len=100,
        eos_token_ids=(),
        sites=(),
        block_size=stand_ins.BLOCK_SIZE,
        num_kv_blocks=64,
        kv_cache_bytes=0,
        model_bytes=0,
        adapter_budget_bytes=options.adapter_memory_bytes,
    )
    return EngineCore(
        bench.runner, bench.scheduler, bench.adapters, Derivations({}), stand_ins.a_pinning(bench.adapters)
    ), ready


if __name__ == "__main__":
    sys.exit(run_worker(int(sys.argv[1]), assemble))
