"""The product of a base layer, and what faster ways to it can do.

Legend: I in features, O out features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor

from timbre_server.native.joining import Joining

Product = Callable[[Tensor], Tensor]
"""``x -> W x + b``."""


@runtime_checkable
class WideProduct(Protocol):
    """A `Product` that need not round its sums to the type of x."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def in_float32(self, x: Tensor) -> Tensor: ...


@runtime_checkable
class JoinedProduct(Protocol):
    """A `Product` that adapters may join before it is rounded, so that nothing else lies in float32."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def joined(self, x: Tensor, joining: Joining, y: Tensor | None = None) -> Tensor | None: ...


class LayerProduct:
    """All that a layer's product can do."""

    def __init__(self, product: Product) -> None:
        self.rounded = product
        # Where sums need not be rounded they are not, whoever adds to them: a row's bits are its own.
        self.sums = product.in_float32 if isinstance(product, WideProduct) else product
        self._joined = product.joined if isinstance(product, JoinedProduct) else None

    def joined(self, x: Tensor, joining: Joining | None, y: Tensor | None = None) -> Tensor | None:
        """With all that adapters add, in y where there is one; None: they are to add it by themselves."""
        return None if joining is None or self._joined is None else self._joined(x, joining, y)
