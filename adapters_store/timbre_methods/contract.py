"""The method interface: a file format and a paper, compiled once to operators.

A method has no run-time code and knows neither the server, the store nor batches. To add one, add one
file below this package that defines one `Method` subclass, and one golden test.

What a file leaves out and only the base's own values can give (an SVD, a partition) is computed once, when
the adapter is registered, by ``derive``, and stored beside it: no other machine computes it again. It joins
the file's tensors under names that begin with `DERIVED`, so ``compile`` and ``reference`` find it there.

Laws that the conformance suite holds for every method:

* ``compile`` and ``derive`` on meta tensors give the same shapes and dtypes as on real ones;
* running the compiled program equals ``reference`` to rounding, and shares no arithmetic with it;
* inputs are never modified; prepared tensors may share their memory, so whoever keeps a program copies it;
* every tensor given is used or refused by name; every option that is on is honoured or refused by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor

from timbre_methods.program import AdapterProgram

Tensors = Mapping[str, Tensor]
"""An adapter's tensors by the names in its file, and what `Method.derive` added to them, on one device (meta
when only shapes are asked)."""

DERIVED = "derived."
"""Derived tensors are named ``derived.<module path>.<key>``. No file may hold such a name."""

SiteKind = Literal["linear", "embedding", "norm", "block", "parameter"]


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """One layer of the base that adapters may change, by its kind:

    * ``linear``: ``y0 = W x + b``. A `Conv1D` is already transposed.
    * ``embedding``: a table of rows is the linear layer of one-hot tokens, so ``weight_OI`` is its transpose
      [D, V]: in features are tokens. A base that scales the rows that it looks up scales what is added, too.
    * ``norm``: ``y0 = w ∘ x + b`` of the normalised x; ``weight_OI`` is w [D], as stored (a base that uses
      1 + w stores w).
    * ``block``: a module of the base with linear layers in it and no attention, that turns one tensor of rows
      into one of the same shape (an MLP). It has no weight of its own: ``weight_OI`` is a meta tensor that
      only says its size. What acts there is a `RoutedBlock`.
    * ``parameter``: a bare matrix of a module, or a stack of them such as the weights of its experts, under
      the parameter's own name. ``weight_OI`` is its ``slices`` below each other, as stored; what the module
      does with it is the base's own affair, and adapters change the values alone.

    ``weight_OI`` [O, I] and ``bias_O`` [O] or None, in the base's dtype. They are meta tensors where only
    shapes are known (at upload), real ones where the adapter is loaded. Read-only: a method never writes to
    them.
    """

    path: str
    weight_OI: Tensor
    bias_O: Tensor | None
    kind: SiteKind = "linear"
    is_transposed: bool = False
    """Whether the base, and so a file, stores [I, O]: a `Conv1D` or an embedding. Of a parameter, whether the
    module reads its slices so; they lie in ``weight_OI`` as they are."""
    tied_to: str | None = None
    """The embedding whose very table this head multiplies by."""
    slices: int = 1
    """Of a parameter [slices, rows, I]; one with two dimensions has a single slice."""
    scale: float = 1.0
    """By what an embedding multiplies what it looks up, and what is added to its table."""

    @property
    def in_features(self) -> int:
        return self.weight_OI.shape[-1]

    @property
    def out_features(self) -> int:
        return self.weight_OI.shape[0]


Sites = Mapping[str, Site]
"""Layers of the base by their module path (``model.layers.0.self_attn.q_proj``), in model order. A method is
given those of its own kinds."""

Config = TypeVar("Config")


class Reader(ABC, Generic[Config]):
    """How one kind of adapter is recognised. Stateless; one instance serves all adapters of the kind."""

    name: ClassVar[str]
    """The method's name in manifests, metrics and tables, e.g. ``lora``."""
    paper: ClassVar[str]
    """Title or arXiv number of the paper, or the public code that defines the format."""
    stored: ClassVar[str]
    """What the file holds for one layer, e.g. ``A [r, in], B [out, r]``; for the table of methods."""
    regenerated: ClassVar[str] = "nothing"
    """What the file leaves out, and from what it is made again, e.g. ``places, from the seed``."""
    checked_against: ClassVar[str]
    """Where the numbers of its golden test come from: ``PEFT``, or ``the paper's formula``."""
    scales_bias: ClassVar[bool] = False
    """Whether it changes what the base's bias adds, so that no other bias can take its place."""
    derivation: ClassVar[int] = 1
    """Counted up when `Method.derive` comes to give others of the same files and base than before. What the
    store keeps of an earlier count still serves the adapters that have it, and no new registration."""
    may_be_stacked: ClassVar[bool] = False
    """Whether its configs may say that layers of the base are repeated (`layer_stack`)."""
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({"linear"})
    """The kinds of layers that it adapts; it never sees a site of another."""

    @abstractmethod
    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        """Whether this method reads adapters with this ``adapter_config.json``. Exactly one method may."""

    @abstractmethod
    def parse(self, raw_config: Mapping[str, Any]) -> Config:
        """The typed config. Raises `UnsupportedMethod` for an option that is on and not served, by name,
        and `InvalidConfig` for a value out of its bounds. Options that are off are accepted."""


class Method(Reader[Config]):
    """A kind of adapter that changes linear layers (`prompt_contract` has the others)."""

    def derive(self, config: Config, tensors: Tensors, sites: Sites) -> dict[str, Tensor]:
        """What the file leaves out and the base's values give, by full names that begin with `DERIVED`.

        Called once, at registration, on the CPU, with real sites; also on the meta device, where it must
        give the same shapes. ``tensors`` are the file's alone. Raises as ``compile``.
        """
        return {}

    def weight_in_training(self, site: Site, derived: Tensors) -> Tensor:
        """The site's weight [O, I] as it was while the adapter was trained, which a copy in the file holds:
        the base's, unless training took something out of it. ``derived`` is what `derive` gave."""
        return site.weight_OI

    @abstractmethod
    def compile(self, config: Config, tensors: Tensors, sites: Sites) -> AdapterProgram:
        """The adapter as operators. Runs on the meta device too, so it must not read values.

        ``tensors`` are the file's and what `derive` gave.

        Raises `InvalidTensors` for a missing, surplus or misshapen tensor and `AdapterMismatch` for a
        site that the base lacks, naming the first culprit with found and expected.
        """

    def check_values(self, config: Config, tensors: Tensors, sites: Sites) -> None:
        """What only the values can tell (index ranges, repeats). Real tensors on the CPU, called once at
        upload after `compile` has passed; the values are already known to be finite. Raises
        `InvalidTensors`."""
        return None

    @abstractmethod
    def reference(self, config: Config, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        """The paper's formula at one site, densely, in x's dtype: the adapted layer's output y [T, O] with
        bias. Shares no arithmetic with `compile`. A site that the adapter does not touch gives
        ``W x + b``. For an embedding x is one-hot rows (or any others), for a norm it is normalised; a
        parameter is multiplied by x as if it were a linear layer.

        Of a block it is what the router there gives, [T, E], and zeros [T, 1] where there is none. At a site
        whose gates come from a block each expert has gate 1: no site knows what its block has read."""

    def for_reference(self, config: Config, tensors: Tensors, sites: Sites) -> dict[str, Tensor]:
        """What `reference` needs of other sites than its own, by names as `derive` gives them. Nothing that
        is served reads it, and it is never stored."""
        return {}

    @abstractmethod
    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """A small random valid adapter for these sites: ``adapter_config.json`` and tensors, as the public
        writer of the format would save them. Used by the conformance suite."""
