"""From places in a weight, as files name them, to the rows of a sparse part, and the check of what they say.

A *cell* is a flat row-major place, ``row * I + column``. Two values for one place are refused wherever they
are found: their sum would depend on who reads the file.

Legend: O out features, I in features, N stored values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from timbre_methods.contract import Site
from timbre_methods.errors import InvalidTensors
from timbre_methods.program import Sparse

INDEX_DTYPES = (torch.int32, torch.int64)


def sparse_part(site: Site, rows_N: Tensor, columns_N: Tensor, values_N: Tensor) -> Sparse:
    """The values at their places, in any order; rows are int64. Also on the meta device."""
    if not _are_sorted(rows_N):
        order_N = torch.argsort(rows_N, stable=True)
        rows_N, columns_N, values_N = (each_N[order_N] for each_N in (rows_N, columns_N, values_N))
    counts = rows_N.new_zeros(site.out_features + 1)  # The first is of no row.
    counts[1:].scatter_add_(0, rows_N, torch.ones_like(rows_N))
    return Sparse(
        row_ends=counts.cumsum(0),
        columns_N=columns_N.to(torch.int32, copy=True),
        values_N=values_N.to(torch.float32, copy=True),
        in_features=site.in_features,
    )


def _are_sorted(rows_N: Tensor) -> bool:
    """As those of most files are; nobody can tell on the meta device."""
    return not rows_N.is_meta and bool((rows_N[1:] >= rows_N[:-1]).all())


def sparse_cells(site: Site, cells_N: Tensor, values_N: Tensor) -> Sparse:
    """As `sparse_part`, at flat places."""
    wide_N = cells_N.to(torch.int64)
    return sparse_part(site, wide_N // site.in_features, wide_N % site.in_features, values_N)


def check_count(name: str, site: Site, values_N: Tensor) -> None:
    """Raises `InvalidTensors` for more values than the weight has places; also on the meta device."""
    size = site.out_features * site.in_features
    if len(values_N) > size:
        raise InvalidTensors(f"{name}: found {len(values_N)} values, expected at most {size}")


def check_cells(name: str, site: Site, cells_N: Tensor) -> None:
    """Raises `InvalidTensors` in a tensor's name for a flat place that is not in the weight or repeats."""
    check_range(name, "place", cells_N, site.out_features * site.in_features)
    check_once(name, site, cells_N.to(torch.int64))


def check_places(name: str, site: Site, rows_N: Tensor, columns_N: Tensor) -> None:
    """As `check_cells`, for rows and columns."""
    check_range(name, "row", rows_N, site.out_features)
    check_range(name, "column", columns_N, site.in_features)
    check_once(name, site, rows_N * site.in_features + columns_N)


def check_channels(name: str, index_N: Tensor, features: int) -> None:
    """Raises `InvalidTensors` for a channel that the layer lacks or that repeats."""
    check_range(name, "channel", index_N, features)
    channels, counts = torch.unique(index_N, return_counts=True)
    if channels.numel() < index_N.numel():
        twice = int(channels[counts.argmax()])
        raise InvalidTensors(f"{name}: found the channel {twice} twice, expected each channel once")


def check_range(name: str, what: str, index_N: Tensor, size: int) -> None:
    """Raises `InvalidTensors` for an index that is not in [0, size)."""
    low, high = int(index_N.min()), int(index_N.max())
    if low < 0 or high >= size:
        wrong = low if low < 0 else high
        raise InvalidTensors(f"{name}: found the {what} {wrong}, expected 0 to {size - 1}")


def check_once(name: str, site: Site, cells_N: Tensor) -> None:
    """Raises `InvalidTensors` for a repeated place, naming its row and column."""
    cells, counts = torch.unique(cells_N, return_counts=True)
    if cells.numel() < cells_N.numel():
        row, column = divmod(int(cells[counts.argmax()]), site.in_features)
        raise InvalidTensors(f"{name}: found the place ({row}, {column}) twice, expected each place once")
