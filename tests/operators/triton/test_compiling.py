"""The kernels compile for a GPU that is not here, with what it has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SHARED_OF_AN_A100 = 163 * 1024


def test_every_kernel_compiles_for_an_a100_without_atomics(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    program = Path(__file__).with_name("compile_kernels.py")
    result = subprocess.run(
        [sys.executable, str(program), "cuda", "80"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    compiled = [json.loads(line) for line in result.stdout.splitlines()]
    some = {"shrink", "expand", "gather_rows", "apply_gains", "_core_sums", "_add_products"}
    some |= {"_store", "_shares", "_join", "_rotate", "_activate"}
    assert some <= {kernel["kernel"] for kernel in compiled}
    assert [kernel for kernel in compiled if kernel["atomics"]] == []
    assert max(kernel["shared"] for kernel in compiled) <= SHARED_OF_AN_A100
