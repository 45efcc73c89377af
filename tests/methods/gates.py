"""The gates of routers, row by row and rule by rule, as `timbre_methods.routing` writes them down.

The tests' own reading; shares nothing with the operators.

Legend: T rows, I in features, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from timbre_methods.routing import Router, Rule, Scout


def gates(router: Router, x_TI: Tensor) -> Tensor:
    """[T, E] in x's dtype."""
    return torch.stack([_row(router, x_I) for x_I in x_TI])


def _row(router: Router, x_I: Tensor) -> Tensor:
    rule, dtype = router.rule, x_I.dtype
    if rule.reads == "normalised":
        x_I = (x_I - x_I.mean()) / (x_I.var(unbiased=False) + 1e-5).sqrt()
    logits_E = router.weight_EI.to(dtype) @ x_I
    if router.bias_E is not None:
        logits_E = logits_E + router.bias_E.to(dtype)
    preference = None if router.preference_E is None else router.preference_E.tolist()
    return _ruled(rule, logits_E, preference)


def of_scout(scout: Scout, h_TD: Tensor) -> Tensor:
    """[T, L, E] in h's dtype."""
    rows = []
    for v in h_TD:
        for number, (weight, bias) in enumerate(zip(scout.weights, scout.biases, strict=True)):
            v = weight.to(v.dtype) @ (v if number == 0 else v.clamp_min(0)) + bias.to(v.dtype)
        places = v.split(scout.num_experts)
        rows.append(torch.stack([_ruled(scout.rule, logits_E, None) for logits_E in places]))
    return torch.stack(rows)


def _ruled(rule: Rule, logits_E: Tensor, preference: list[float] | None) -> Tensor:
    if rule.logits == "absolute":
        logits_E = logits_E.abs()
    if rule.logits == "unit":
        logits_E = logits_E / logits_E.square().sum().sqrt()
    scaled_E = logits_E * rule.scale
    kept = _kept(rule, scaled_E, preference)
    softmax_E = torch.softmax(scaled_E, 0)
    gates_E = {
        "softmax": lambda: softmax_E,
        "renormalised": lambda: softmax_E / softmax_E[kept].sum(),
        "logit": lambda: scaled_E,
        "one": lambda: torch.ones_like(scaled_E),
    }[rule.gate]()
    found_E = torch.zeros_like(scaled_E)
    for e in kept:
        if rule.floor is None or logits_E[e] >= rule.floor:
            found_E[e] = gates_E[e]
    left = found_E.nonzero().flatten()
    if rule.again and len(left):
        found_E[left] = torch.softmax(found_E[left], 0)
    return found_E


def _kept(rule: Rule, scaled_E: Tensor, preference: list[float] | None) -> list[int]:
    everyone = list(range(len(scaled_E)))
    preference = preference or [0.0] * len(everyone)
    best_first = sorted(everyone, key=lambda e: (-(float(scaled_E[e]) + preference[e]), e))
    if rule.keep == "all":
        return everyone
    if rule.keep == "top_k":
        return best_first[: rule.top_k]
    mass, kept = 0.0, []
    for e in best_first:
        if mass > rule.top_p:
            break
        kept.append(e)
        mass += float(torch.softmax(scaled_E, 0)[e])
    return kept
