"""Blocks of the base whose input chooses among the experts at the layers below."""

from __future__ import annotations

from collections.abc import Collection

from timbre_methods.contract import Site, Sites
from timbre_methods.errors import AdapterMismatch
from timbre_methods.site_tensors import nearest_fact


def block_of(name: str, path: str, sites: Sites) -> Site:
    """The block of the base under a path that a router's name gives. Raises `AdapterMismatch`."""
    site = sites.get(path)
    if site is not None and site.kind == "block":
        return site
    if site is None and not any(other.startswith(f"{path}.") for other in sites):
        raise AdapterMismatch(f"{name[:200]}: {nearest_fact(path, sites)}")
    raise AdapterMismatch(
        f"{name[:200]}: {path[:120]!r} of this base is no block whose input can choose experts: "
        "such a one turns rows into rows of their own size, and has linear layers and no attention in it"
    )


def above(path: str, blocks: Collection[str]) -> str | None:
    """The innermost of these blocks that a layer lies in."""
    while path := path.rpartition(".")[0]:
        if path in blocks:
            return path
    return None
