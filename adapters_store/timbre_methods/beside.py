"""What PEFT writes into a file beside a method's own tensors, read for all methods in this one place.

* ``modules_to_save``: whole layers, under their plain names (``<path>.weight``, ``<path>.bias``). The names
  tell which: the option matches by endings, so ``norm`` takes ``input_layernorm``, too.
* ``trainable_token_indices``: rows of an embedding for some tokens, ``<path>.token_adapter.
  trainable_tokens_delta``; new values in spite of the name. A head that multiplies by the very table changes
  with it, unless the file has rows of its own for the head.
* ``bias``: trained biases of adapted layers, ``<path>.base_layer.bias``, and with ``all`` of others, too,
  under their plain names. They take the place of the base's, for this adapter's rows alone. Of a module to
  save ``all`` writes it twice, under ``modules_to_save``, too, and the base's own under ``original_module``.
* ``<path>.base_layer.weight`` beside an adapter on an embedding or a head: the base's own weight, as it was
  while the adapter was trained. It must be.

This module knows no method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from timbre_methods.config import first_problem, is_on
from timbre_methods.contract import Site, Sites, Tensors
from timbre_methods.errors import AdapterMismatch, InvalidConfig, InvalidTensors
from timbre_methods.program import Part
from timbre_methods.replaced import replaced_tokens, replacement, stored_shape
from timbre_methods.site_tensors import PREFIX, SiteTensors, check_tensor, nearest_fact

TOKENS = "token_adapter.trainable_tokens_delta"
COPY = "base_layer.weight"
BIAS = "base_layer.bias"
SAVED_BIAS = "modules_to_save.bias"
LEFT_BIAS = "original_module.bias"
CELLS_AT_ONCE = 2**22
"""Values of a copied weight that are compared together."""
MOVED_SLACK = 1e-4
"""How far a copy may be from a weight that was computed again, of that weight's largest value: on another
machine a decomposition in float32 comes out otherwise."""

_KEYS = (COPY, BIAS, TOKENS, "weight", "bias")
_ENDINGS = tuple(f".{key}" for key in _KEYS)

TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=2**31 - 1)]], Field(min_length=1, max_length=2**20)]
"""Ids of tokens; what they must be for a layer is checked with its tensor."""


@dataclass(slots=True)
class Beside:
    """One file divided: what is the method's ``own``, and the rest."""

    own: dict[str, Tensor] = field(default_factory=dict)
    copies: dict[str, Tensor] = field(default_factory=dict)
    """What must be the base's own, or another tensor's equal, by full names."""
    layers: dict[str, SiteTensors] = field(default_factory=dict)
    """Replaced layers by path."""
    biases: dict[str, SiteTensors] = field(default_factory=dict)
    """Adapted layers with a bias of their own by path."""
    rows: dict[str, SiteTensors] = field(default_factory=dict)
    """Layers with rows for some tokens by path."""
    tokens: dict[str, list[int]] = field(default_factory=dict)
    """The tokens of these rows."""

    def parts(self, sites: Sites) -> dict[str, tuple[Part, ...]]:
        """What replaces layers and rows, by path. Raises `InvalidTensors` for what does not fit them."""
        parts = {path: replacement(found) for path, found in self.layers.items()}
        for path, part in token_parts(self.rows, TOKENS, self.tokens, sites).items():
            if path not in self.layers or "weight" not in self.layers[path].tensors:
                parts[path] = (*parts.get(path, ()), part)
            elif path in self.rows:  # Else a tied head with a weight of its own, which is tied no more.
                raise InvalidTensors(
                    f"{self.rows[path].name_of(TOKENS)} is surplus: the file replaces this layer's whole "
                    "weight; leave one of the two out"
                )
        return parts

    def why_not_both(self, site: Site) -> str:
        """What to say where `parts` changes a layer that the method adapts."""
        if site.path in self.layers or site.path in self.rows:
            return f"the file replaces values of {site.path!r} and adapts it, too; expected one of them"
        return (
            f"the file adapts {site.path!r}, which multiplies by the table of {site.tied_to!r}, and replaces "
            "tokens of that table; leave the layer out of target_modules, or train without "
            "trainable_token_indices"
        )


class _Options(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    bias: Annotated[str, Field(pattern=r"^(none|all|[A-Za-z0-9]{1,32}_only)$")] | None = None
    modules_to_save: Annotated[list[str], Field(max_length=1024)] | None = None
    trainable_token_indices: TokenIds | dict[str, TokenIds] | None = None


def read_beside(raw_config: Mapping[str, Any], tensors: Tensors, sites: Sites) -> Beside:
    """Divide a file. Reads no values.

    Raises `InvalidConfig` for an option of the wrong type, and `InvalidTensors` for a missing tensor and for
    a misshapen copy of the base's.
    """
    options = _options(raw_config)
    beside = Beside()
    for name, tensor in tensors.items():
        path, key = _split(name, sites)
        if key == COPY or (key in (SAVED_BIAS, LEFT_BIAS) and options.bias == "all"):
            _check_copy(name, tensor, sites[path], tensors)
            beside.copies[name] = tensor
        elif key == TOKENS:
            if not options.trainable_token_indices:
                raise InvalidTensors(f"{name} is surplus: the config lists no trainable_token_indices")
            beside.rows[path] = SiteTensors(sites[path], {TOKENS: tensor})
            beside.tokens[path] = _tokens_of(path, options.trainable_token_indices)
        elif key == BIAS and options.bias is not None:
            beside.biases[path] = SiteTensors(sites[path], {BIAS: tensor})
        elif key in ("weight", "bias"):
            others = beside.layers[path].tensors if path in beside.layers else {}
            beside.layers[path] = SiteTensors(sites[path], {**others, key: tensor})
        else:
            beside.own[name] = tensor
    missing = next((name for name in _saved_names(options, sites) if name not in tensors), None)
    if missing is not None:
        raise InvalidTensors(f"{missing} is missing, while modules_to_save names its layer")
    if options.trainable_token_indices and not any(name.endswith(f".{TOKENS}") for name in tensors):
        raise InvalidTensors(f"...{TOKENS} is missing, while trainable_token_indices lists tokens")
    return beside


def refuse_strays(beside: Beside, raw_config: Mapping[str, Any], sites: Sites) -> None:
    """Raise `AdapterMismatch` for what only this module would read, of a layer that is none of ``sites``."""
    saved = tuple(_options(raw_config).modules_to_save or ())
    for name in beside.own:
        key = next((key for key in (TOKENS, "weight", "bias") if name.endswith(f".{key}")), None)
        if key is not None:
            path = name.removeprefix(PREFIX).removesuffix(f".{key}")
            if key == TOKENS or (saved and path.endswith(saved)):
                raise AdapterMismatch(f"{name[:200]}: {nearest_fact(path, sites)}")


def check_copies(beside: Beside, sites: Sites, in_training: Callable[[Site], Tensor]) -> None:
    """Raise `AdapterMismatch` for a copied value that is not this base's, to the rounding of its dtype, and
    `InvalidTensors` for a bias that stands in the file twice with different values. ``in_training`` gives the
    weight [O, I] that a copy must hold."""
    for name, copy in beside.copies.items():
        path, key = _split(name, sites)
        site = sites[path]
        if key == SAVED_BIAS:
            if not _equal(copy, beside.layers[path].tensors["bias"]):
                raise InvalidTensors(
                    f"{name[:200]}: found other values than {path}.bias has, expected the same"
                )
            continue
        weight_OI = in_training(site) if key == COPY else site.weight_OI
        base = _stored(replace(site, weight_OI=weight_OI), key)
        slack = 0.0 if weight_OI is site.weight_OI else MOVED_SLACK * float(weight_OI.abs().max())
        step = max(1, CELLS_AT_ONCE // copy[0].numel())
        for start in range(0, len(copy), step):
            if not _equal(copy[start : start + step], base[start : start + step], slack):
                raise AdapterMismatch(
                    f"{name[:200]}: found other values than this base has there: the adapter was trained on "
                    "another base, or its file brings a trained layer; for the first use that base, for the "
                    "second list the layer in modules_to_save"
                )


def _check_copy(name: str, copy: Tensor, site: Site, tensors: Tensors) -> None:
    """Raise `InvalidTensors` for a misshapen copy, and for one of what is not there."""
    key = _split(name, {site.path: site})[1]
    if key == SAVED_BIAS and f"{PREFIX}{site.path}.bias" not in tensors:
        raise InvalidTensors(f"{PREFIX}{site.path}.bias is missing, while the file holds {name[:200]}")
    if key != COPY and site.bias_O is None:
        raise InvalidTensors(f"{name[:200]} is surplus: this layer of the base has no bias")
    check_tensor(name, copy, tuple(_stored(site, key).shape))


def _stored(site: Site, key: str) -> Tensor:
    """What the base, and so a file, holds of a site: its weight for the key of its copy, else its bias."""
    if key != COPY:
        assert site.bias_O is not None
        return site.bias_O
    return site.weight_OI.T if site.is_transposed else site.weight_OI


def token_parts(
    found: Mapping[str, SiteTensors], key: str, tokens: Mapping[str, Sequence[int]], sites: Sites
) -> dict[str, Part]:
    """The parts of trained token rows, by path: at each site in ``found``, and at the heads tied to them.

    Raises `InvalidTensors` for a token that is listed twice or that the base lacks, and for misshapen rows.
    """
    parts = {}
    for path, each in found.items():
        rows_KI = _checked_rows(each, key, tokens[path])
        parts[path] = replaced_tokens(each.site, rows_KI, tokens[path])
        for head in _tied_heads(path, sites):
            if head.path not in found:
                parts[head.path] = replaced_tokens(head, rows_KI, tokens[path])
    return parts


def _checked_rows(found: SiteTensors, key: str, tokens: Sequence[int]) -> Tensor:
    """The rows under a key, one for each token of a list."""
    if found.site.kind == "norm" or (found.site.kind == "linear" and found.site.is_transposed):
        raise InvalidTensors(f"{found.name_of(key)} is surplus: this layer has no row for each token")
    vocabulary, width = stored_shape(found.site)
    if len(set(tokens)) < len(tokens):
        raise InvalidTensors(f"{found.name_of(key)}: a token is listed twice, expected each token once")
    if max(tokens) >= vocabulary:
        raise InvalidTensors(
            f"{found.name_of(key)}: found the token {max(tokens)}, expected 0 to {vocabulary - 1}"
        )
    return found.need(key, (len(tokens), width))


def _tied_heads(path: str, sites: Sites) -> list[Site]:
    return [site for site in sites.values() if site.tied_to == path]


def _tokens_of(path: str, listed: list[int] | dict[str, list[int]]) -> list[int]:
    if isinstance(listed, list):
        return listed
    meant = [tokens for ending, tokens in listed.items() if path.endswith(ending)]
    if not meant or any(tokens != meant[0] for tokens in meant):
        raise InvalidConfig(
            f"adapter_config.json: trainable_token_indices: found {len(meant)} lists for {path!r}, expected 1"
        )
    return meant[0]


def _split(name: str, sites: Sites) -> tuple[str, str]:
    """The site and the key of a tensor that is read here; the key is empty for any other."""
    if name.startswith(PREFIX) and name.endswith(_ENDINGS):
        for key in _KEYS:
            path = name[len(PREFIX) : -len(key) - 1]
            if name.endswith("." + key) and path in sites:
                return path, key
    return _split_wrapped(name, sites)


def _split_wrapped(name: str, sites: Sites) -> tuple[str, str]:
    """As `_split`, of a bias in a module to save, or in the one whose place that took. The module may be one
    around the layer, and then its own copy is under the adapter's name in training."""
    if not (name.startswith(PREFIX) and name.endswith(".bias")):
        return "", ""
    for key in (SAVED_BIAS, LEFT_BIAS):
        outer, _, inner = name[len(PREFIX) : -len("bias")].partition(f".{key.removesuffix('bias')}")
        inner = (inner.partition(".")[2] if key == SAVED_BIAS else inner).removesuffix(".")
        path = f"{outer}.{inner}" if inner else outer
        if path in sites:
            return path, key
    return "", ""


def _saved_names(options: _Options, sites: Sites) -> list[str]:
    """The tensors that modules_to_save promises."""
    endings = tuple(options.modules_to_save or ())
    saved = [site for path, site in sites.items() if endings and path.endswith(endings)]
    weights = [f"{PREFIX}{site.path}.weight" for site in saved]
    return weights + [f"{PREFIX}{site.path}.bias" for site in saved if site.bias_O is not None]


def _equal(copy: Tensor, base: Tensor, slack: float = 0.0) -> bool:
    dtypes = {copy.dtype, base.dtype}
    wide, base = copy.to(torch.float32), base.to(copy.device, torch.float32)
    if len(dtypes) == 1 and not slack:
        return torch.equal(wide, base)
    rtol = max(torch.finfo(dtype).eps for dtype in dtypes)
    return torch.allclose(wide, base, rtol=rtol, atol=max(1e-7, slack))


def _options(raw_config: Mapping[str, Any]) -> _Options:
    given = {key: raw_config[key] for key in _Options.model_fields if is_on(raw_config.get(key))}
    try:
        return _Options.model_validate(given)
    except ValidationError as error:
        raise InvalidConfig(first_problem(error)) from None
