"""The vocabulary of mixtures of experts: which experts of an adapter act on a row, and how strongly.

An expert is what a plain adapter would be: parts at sites. A *router* gives each of them a *gate* from the
row itself. Where experts meet is the one difference between mixtures:

* at a site, ``y += Σ_e g_e(x) · E_e(x)``, the gates from that site's input or from the input of a block of
  the base (an MLP) around it;
* after a block, ``y = Σ_e g_e(x) · block_e(x)``: the whole block, its nonlinearity included, once for each
  chosen expert, in which expert e alone acts at the sites below.

A *scout* gives gates before any layer of the adapter acts: it reads what the base alone makes of the token.

Like `program`, whose parts these are, this module holds plain data.

Legend: I in features, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

if TYPE_CHECKING:
    from timbre_methods.program import Diagonal, FromInput

MAX_EXPERTS = 256
"""Of one router."""
MAX_ROW_COPIES = 32
"""So often a row may run through a block, for one adapter or for several of a mix."""


@dataclass(frozen=True, slots=True)
class Rule:
    """From logits to gates, in the order of the fields.

    1. ``reads``: the router multiplies x, or x normalised to mean 0 and variance 1 over its features
       (epsilon 1e-5, no weight): R x̂.
    2. ``logits``: as they are, their absolute values, or divided by their Euclidean norm over all experts.
    3. They are multiplied by ``scale`` (1 / temperature).
    4. ``keep``: all experts; the ``top_k`` with the largest logits, after `Router.preference_E` is added to
       them for this choice alone; or, by ``top_p``, the shortest run of the largest softmax values whose sum
       exceeds ``top_p``, the one that crosses it included. Of equal ones the first are kept.
    5. ``gate``: the softmax over all experts; the softmax over those kept, which is the softmax over all
       divided by its sum over those kept (``renormalised``); the ``logit`` itself; or 1.
    6. Those whose logit of step 2 lies below ``floor`` get 0; the others stay as they are.
    7. With ``again``, those that are not 0 become their softmax among each other.

    All of it in float32. Experts that are not kept have gate 0.
    """

    reads: Literal["input", "normalised"] = "input"
    logits: Literal["plain", "absolute", "unit"] = "plain"
    scale: float = 1.0
    keep: Literal["all", "top_k", "top_p"] = "all"
    top_k: int = 1
    top_p: float = 1.0
    gate: Literal["softmax", "renormalised", "logit", "one"] = "softmax"
    floor: float | None = None
    again: bool = False

    @property
    def is_choice(self) -> bool:
        """Whether one expert acts, with gate 1: then it does not matter where experts meet."""
        keeps_one = self.keep == "top_k" and self.top_k == 1
        return keeps_one and self.gate in ("renormalised", "one") and self.floor is None

    def num_kept(self, num_experts: int) -> int:
        """At most so many of them act on a row."""
        return min(self.top_k, num_experts) if self.keep == "top_k" else num_experts


@dataclass(frozen=True, slots=True, eq=False)
class Router:
    """Logits ``R x + c``: ``weight_EI`` [E, I], ``bias_E`` and ``preference_E`` [E] or None, float32."""

    weight_EI: Tensor
    rule: Rule
    bias_E: Tensor | None = None
    preference_E: Tensor | None = None

    @property
    def num_experts(self) -> int:
        return self.weight_EI.shape[0]

    @property
    def num_kept(self) -> int:
        """At most so many of its experts act on a row."""
        return self.rule.num_kept(self.num_experts)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.weight_EI, self.bias_E, self.preference_E) if t is not None)


@dataclass(frozen=True, slots=True, eq=False)
class Scout:
    """A network that reads h, the base's last hidden state of a token (after its final norm) where no adapter
    acts: ``W h + c`` layer by layer, ReLU between them, all float32.

    The last layer's outputs are the logits [places, E], which ``rule`` turns into gates from its step 2 on.
    Such an adapter takes a pass of the base alone, with keys and values of its own, before each of its own.
    """

    weights: tuple[Tensor, ...]
    """[out, in] of each layer."""
    biases: tuple[Tensor, ...]
    rule: Rule
    num_experts: int

    @property
    def width(self) -> int:
        """Of what it reads."""
        return self.weights[0].shape[1]


@dataclass(frozen=True, slots=True, eq=False)
class Scouted:
    """The gates that the adapter's scout gives for one place; sites that share them have this very object."""

    num_experts: int
    place: int = 0

    @property
    def num_kept(self) -> int:
        """At most so many of its experts act on a row: all, whatever the scout's rule."""
        return self.num_experts


@dataclass(frozen=True, slots=True, eq=False)
class Routed:
    """``y += Σ_e g_e · Σ_{part of experts[e]} change(part, x)``: a mixture at one site.

    ``experts`` has one entry for each of the router's, empty for an expert that does nothing here. Its
    `Diagonal` parts are of the output side and add ``g_e · change(part, y0)``. With ``from_block`` the very
    same router object is also in a `RoutedBlock` above, from whose input the gates come. For the site alone,
    outside of its block or where no scout has read, each expert has gate 1.
    """

    experts: tuple[tuple[FromInput | Diagonal, ...], ...]
    router: Router | Scouted
    from_block: bool = False

    @property
    def own_router(self) -> Router | None:
        """The one that reads this site's input, where there is one."""
        return self.router if isinstance(self.router, Router) and not self.from_block else None


@dataclass(frozen=True, slots=True, eq=False)
class RoutedBlock:
    """At a block of the base: its input decides which experts act at the sites below.

    ``meet``: experts meet at each of those ``sites``, or after the whole ``block``.
    """

    router: Router
    meet: Literal["sites", "block"]

    @property
    def copies(self) -> int:
        """How many times a row runs through the block; more than once where several experts meet after it."""
        is_once = self.meet == "sites" or self.router.rule.is_choice
        return 1 if is_once else self.router.num_kept


def repeated_router_bytes(parts: Iterable[object]) -> int:
    """What routers that several sites share would be counted too often, if each site counted its own."""
    routers = [part.own_router for part in parts if isinstance(part, Routed) and part.own_router]
    return sum(router.nbytes for router in routers) - sum(router.nbytes for router in set(routers))
