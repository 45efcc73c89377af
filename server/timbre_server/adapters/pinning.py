"""One adapter, or one mix, merged into weights of its own while it has most of a replica's traffic.

A pin loads its adapters, keeps them in memory, and makes their merged weights on a thread of its own. `poll`
puts these in place between two steps. From then on a step whose rows are all of the pinned mix costs what the
base alone costs. Any other step runs as before, all of it on the base's weights: no row of another is
touched, and no step is slower than without the pin, as it may be where rows run apart and both are read.

A pin is of digests: a new version of a name is another adapter. Merged weights count in the budget for
adapters. A pin is not kept over the engine's end.

Legend: I in features, O out features.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from timbre_methods.contract import Sites
from timbre_server.adapters.adapted_model import AdaptedModel
from timbre_server.adapters.layer_product import Product
from timbre_server.adapters.merged_weights import WeightedPrograms, merged_weights, refusal
from timbre_server.adapters.runtime import AdapterRuntime, LoadFailureCode
from timbre_server.native.library import compute_alone

Mix = tuple[tuple[str, float], ...]
"""Digests and weights, in order of digest, as requests have them."""

RefusalCode = Literal["pin_not_served", "pin_conflict", LoadFailureCode]

_log = logging.getLogger(__name__)


class Products(Protocol):
    """How the engine multiplies by a weight that is no layer's."""

    def takes(self, module: nn.Module) -> bool:
        """Whether that can stand in for a layer of the base."""
        ...

    def product_with(self, weight_OI: Tensor, bias_O: Tensor | None) -> Product: ...

    def bytes_with(self, weight_OI: Tensor) -> int: ...


@dataclass(frozen=True, slots=True)
class Pinned:
    """What is merged: the digest of an adapter or of a named mix, and what it takes."""

    digest: str
    num_sites: int
    merged_bytes: int


@dataclass(frozen=True, slots=True)
class PinEnded:
    """The answer to one `pin` or `unpin`; a ``code`` and a ``reason`` say why it was refused."""

    asked: Literal["pin", "unpin"]
    digest: str
    pinned: Pinned | None = None
    code: RefusalCode | None = None
    reason: str = ""


@dataclass(slots=True, eq=False)
class _Pin:
    digest: str
    mix: Mix
    slots: dict[str, int] = field(default_factory=dict)
    """Of those that are in memory, and used by the pin."""
    products: Future[Mapping[str, Product]] | None = None
    merged_bytes: int = 0
    pinned: Pinned | None = None


class Pinning:
    """At most one pin. All methods belong to the loop's thread."""

    def __init__(
        self,
        model: AdaptedModel,
        adapters: AdapterRuntime,
        sites: Sites,
        products: Products,
        on_ended: Callable[[], None] = lambda: None,
    ) -> None:
        """``sites``: the base's own values. ``on_ended`` is called on another thread: it may only wake a loop
        that sleeps."""
        self._model = model
        self._adapters = adapters
        self._sites = {path: sites[path] for path, base in model.linear_layers() if products.takes(base)}
        self._products = products
        self._on_ended = on_ended
        self._thread = ThreadPoolExecutor(1, "adapter-merge", compute_alone)
        self._pin: _Pin | None = None
        self._ended: list[PinEnded] = []

    @property
    def pinned(self) -> Pinned | None:
        return None if self._pin is None else self._pin.pinned

    def pin(self, digest: str, mix: Mix) -> None:
        """Begin to merge ``mix``, which ``digest`` names; `poll` tells the end. Refused beside another."""
        if self._pin is None:
            self._pin = _Pin(digest, mix)
            for each, _ in mix:
                self._adapters.load(each)
        elif self._pin.digest != digest:
            reason = f"{self._pin.digest} is pinned, and one is pinned at a time; unpin it first"
            self._ended.append(PinEnded("pin", digest, code="pin_conflict", reason=reason))
        elif self._pin.pinned is not None:
            self._ended.append(PinEnded("pin", digest, self._pin.pinned))

    def unpin(self, digest: str) -> None:
        """Drop the merged weights, or those that are being made; `poll` answers."""
        if self._pin is None or self._pin.digest != digest:
            what = "nothing" if self._pin is None else self._pin.digest
            reason = f"{digest} is not pinned; {what} is"
            self._ended.append(PinEnded("unpin", digest, code="pin_conflict", reason=reason))
        else:
            self._end(self._pin, "it was unpinned before it was merged")
            self._ended.append(PinEnded("unpin", digest))

    def forget(self, digest: str) -> None:
        """An adapter, or a named mix, is deleted: it is unpinned, alone or with the mix it is part of."""
        if self._pin is not None and digest in (self._pin.digest, *dict(self._pin.mix)):
            self._end(self._pin, "it was deleted before it was merged")

    def poll(self) -> tuple[PinEnded, ...]:
        """Go on with a pin as far as that needs no waiting. Between two steps."""
        pin = self._pin
        if pin is not None and pin.pinned is None:
            if pin.products is None:
                self._acquire(pin)
            elif pin.products.done():
                self._put_in_place(pin, pin.products)
        ended, self._ended = tuple(self._ended), []
        return ended

    def _acquire(self, pin: _Pin) -> None:
        """Use each of its adapters that is in memory; with all of them there, begin to merge."""
        for digest, _ in pin.mix:
            failure = self._adapters.failure(digest)
            if failure is not None:
                self._refuse(pin, failure.code, failure.message)
                return
            slot = None if digest in pin.slots else self._adapters.try_acquire(digest)
            if slot is not None:
                pin.slots[digest] = slot
                self._adapters.hold(pin.slots)
                if self._adapters.is_leaving(digest):
                    self._refuse(pin, "pin_conflict", f"{digest} is being deleted")
                    return
        if len(pin.slots) == len(pin.mix):
            self._begin(pin)

    def _begin(self, pin: _Pin) -> None:
        mix = [(self._model.program(pin.slots[digest]), weight) for digest, weight in pin.mix]
        for (digest, _), (program, _) in zip(pin.mix, mix, strict=True):
            reason = refusal(program, self._sites)
            if reason is not None:
                self._refuse(pin, "pin_not_served", f"adapter {digest} cannot be merged: {reason}")
                return
        paths = tuple(dict.fromkeys(path for program, _ in mix for path in program.sites))
        needed = sum(self._products.bytes_with(self._sites[path].weight_OI) for path in paths)
        if not self._adapters.hold(pin.slots, needed):
            reason = (
                f"the merged weights of {len(paths)} layers take {needed} bytes, which the budget of "
                f"{self._adapters.budget_bytes} bytes has not beside the adapters in use: raise "
                "--adapter-memory-mib"
            )
            self._refuse(pin, "pin_not_served", reason)
            return
        pin.merged_bytes = needed
        pin.products = self._thread.submit(_merged, self._sites, paths, mix, self._products)
        pin.products.add_done_callback(lambda _: self._on_ended())

    def _put_in_place(self, pin: _Pin, future: Future[Mapping[str, Product]]) -> None:
        error = future.exception()
        if error is not None:
            _log.error("merging %s failed", pin.digest, exc_info=error)
            self._refuse(pin, "pin_not_served", f"it could not be merged: {type(error).__name__}")
            return
        products = future.result()
        self._model.merge(tuple((pin.slots[digest], weight) for digest, weight in pin.mix), products)
        pin.pinned = Pinned(pin.digest, len(products), pin.merged_bytes)
        pin.products = None
        self._ended.append(PinEnded("pin", pin.digest, pin.pinned))

    def _refuse(self, pin: _Pin, code: RefusalCode, reason: str) -> None:
        self._let_go(pin)
        self._ended.append(PinEnded("pin", pin.digest, code=code, reason=reason))

    def _end(self, pin: _Pin, reason: str) -> None:
        if pin.pinned is None:
            self._refuse(pin, "pin_conflict", reason)
        else:
            self._let_go(pin)

    def _let_go(self, pin: _Pin) -> None:
        self._pin = None
        self._model.unmerge()
        self._adapters.hold(())
        for digest in pin.slots:
            self._adapters.release(digest)


@torch.inference_mode()
def _merged(
    sites: Sites, paths: tuple[str, ...], mix: WeightedPrograms, products: Products
) -> Mapping[str, Product]:
    """The product with the merged weights of each layer."""
    return {path: products.product_with(*merged_weights(sites[path], mix)) for path in paths}
