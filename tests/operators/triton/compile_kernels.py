"""Compiles what is launched in Triton, for a GPU that need not be here: ``cuda 90``, ``hip gfx942``.

Every operator runs on random parts, for rows by themselves and for many of one adapter, attention of recorded
steps on the largest heads, and what else layers launch, with launches that compile and do nothing else.
Prints a line of JSON for each kernel and kind of arguments.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

sys.path.insert(0, str(Path(__file__).parents[1]))
from parts import random_part

from timbre_methods.program import LowRank
from timbre_server.engine.context import AttentionCall
from timbre_server.engine.kv_cache import KVCache, LayerShape
from timbre_server.engine.paged_attention import SequenceRows
from timbre_server.engine.paged_decode import MAX_DIM, DecodeStep
from timbre_server.engine.triton_layers import in_triton
from timbre_server.native.formats import FORMATS
from timbre_server.operators.catalogue import all_operators
from timbre_server.operators.materialise import materialise
from timbre_server.operators.row_table import RowTable, Span
from timbre_server.operators.triton import catalogue

IN, OUT = 64, 48
TABLE = RowTable([Span(1, ((0, 0.5), (1, 0.5))), Span(1), Span(40, ((2, 1.0),))])


def source_of(kernel: JITFunction[Any], arguments: dict[str, Any]) -> ASTSource:
    """With what a launch would tell the compiler of its arguments."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}

    def described(value: Any, path: tuple[int, ...], parameter: Any) -> Any:
        if isinstance(value, tuple):
            return type(value)(*(described(each, (*path, i), parameter) for i, each in enumerate(value)))
        is_one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or is_one:
            constants[path] = value
            return "constexpr"
        if not parameter.do_not_specialize and (isinstance(value, torch.Tensor) or value % 16 == 0):
            attributes[path] = [["tt.divisibility", 16]]
        return mangle_type(value)

    for place, parameter in enumerate(kernel.params):
        signature[parameter.name] = described(arguments[parameter.name], (place,), parameter)
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def compiling(target: GPUTarget, seen: set[str]) -> Callable[..., None]:
    """What stands in for a launch."""

    def run(kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        named = {name: options.pop(name) for name in kernel.arg_names if name in options}
        source = source_of(kernel, dict(zip(kernel.arg_names, args, strict=False)) | named)
        key = f"{kernel.__name__} {source.signature} {source.constants} {source.attrs} {options}"
        if key not in seen:
            seen.add(key)
            compiled = triton.compile(source, target=target, options=options)
            text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
            atomics = re.findall(r"^\s*(?:@\S+ )?(?:atom|red|global_atomic)[._]\S+", text, re.MULTILINE)
            found = {"kernel": kernel.__name__, "shared": compiled.metadata.shared, "atomics": atomics}
            print(json.dumps(found))

    return run


def launches() -> Iterator[None]:
    """One operator's after the other, and the engine's."""
    kinds = {operator.part for operator in catalogue.operators()}
    for operator in all_operators(kernels="triton"):
        if operator.part not in kinds and type(operator).__name__ != "RoutedOperator":
            continue
        generator = torch.Generator().manual_seed(1)
        parts = [random_part(operator, IN, OUT, generator) for _ in range(3)]
        bound = operator.bind([{slot: [part] for slot, part in enumerate(parts)}], TABLE)
        x_TI, y_TO = torch.randn(TABLE.num_rows, IN), torch.randn(TABLE.num_rows, OUT)
        bound.sums(x_TI)
        bound.input_change(0, x_TI)
        bound.output_change(0, y_TO)
        bound.own_product(0, x_TI)
        if operator.part is LowRank:
            for dtype in FORMATS:
                alike = [LowRank(part.a_RI.to(dtype), part.b_OR.to(dtype)) for part in parts]
                operator.bind([{slot: [part] for slot, part in enumerate(alike)}], TABLE).sums(x_TI)
                materialise([alike], (OUT, IN), [operator])
            materialise([parts], (OUT, IN), [operator])
        yield


def attention() -> None:
    """With all that may be done to scores."""
    shape, dtype = LayerShape(0, 8, MAX_DIM, MAX_DIM), torch.bfloat16
    cache = KVCache([shape], num_blocks=2, block_size=16, dtype=dtype, device=torch.device("cpu"))
    q_HTD, k_GTD, v_GTD = (torch.randn(heads, 1, MAX_DIM, dtype=dtype) for heads in (16, 8, 8))
    call = AttentionCall(0, q_HTD, k_GTD, v_GTD, 0.1, 7, 50.0, torch.randn(16, dtype=dtype))
    DecodeStep.of(cache, [SequenceRows(0, 1, 5, (1,))]).attend(call)


def layers() -> None:
    """What else they launch, in each type."""
    kernels = in_triton(torch.device("cpu"))
    for dtype in kernels.dtypes:
        q_THD, k_TGD, cos_1TD = (torch.randn(*sizes, 64, dtype=dtype) for sizes in ((3, 9), (3, 3), (1, 3)))
        kernels.rotate(q_THD, k_TGD, cos_1TD, cos_1TD)
        for factor in (None, k_TGD):
            kernels.activate(k_TGD, factor, (1.0, 0.0), k_TGD)


def main() -> None:
    backend, architecture = sys.argv[1:]
    warp_size = 64 if backend == "hip" else 32
    target = GPUTarget(backend, int(architecture) if architecture.isdigit() else architecture, warp_size)
    JITFunction.run = compiling(target, set())
    for _ in launches():
        pass
    attention()
    layers()


if __name__ == "__main__":
    main()
