"""Programs in the storage that they are served from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from timbre_methods.contract import Site
from timbre_methods.program import AdapterProgram, LowRank, Part, Sparse, owned_tensors
from timbre_methods.registry import compile_adapter, methods
from timbre_methods.routing import Routed
from timbre_server.adapters.placement import Layout, placed_program
from timbre_server.adapters.transfer import Transfer
from timbre_server.operators.sliced_ellpack import sliced

GROUP = ("layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj")


@pytest.mark.parametrize("method", ["lora", "fourierft", "shira", "mola"])
def test_factors_of_low_rank_alone_are_rounded_where_that_is_asked_for(method: str) -> None:
    generator = torch.Generator().manual_seed(1)
    sites = {path: Site(path, torch.randn(12, 12, generator=generator), None) for path in GROUP}
    program = compile_adapter(*methods()[method].example(sites, generator), sites)
    rounded = placed_program(
        program, Transfer(torch.device("cpu")), [GROUP], Layout(torch.bfloat16, in_slices=True)
    )

    both = list(zip(plain_parts(program), plain_parts(rounded), strict=True))
    assert any(isinstance(part, LowRank) for part, _ in both) == (method in ("lora", "mola"))
    for plain, after in both:
        before = sliced(plain) if isinstance(plain, Sparse) else plain
        for one, other in zip(owned_tensors(before), owned_tensors(after), strict=True):
            dtype = torch.bfloat16 if isinstance(before, LowRank) else one.dtype
            assert other.dtype == dtype
            assert torch.equal(one.to(dtype), other)


def plain_parts(program: AdapterProgram) -> Iterator[Part]:
    """Those of experts, too, and not their router's."""
    for part in (part for parts in program.sites.values() for part in parts):
        if isinstance(part, Routed):
            yield from (inner for expert in part.experts for inner in expert)
        else:
            yield part
