"""Trainable tokens, as PEFT saves them: new rows for some tokens of an embedding or a head.

``E'[t_k] = rows[k]`` for the tokens that the config lists; the tensor's name says delta, but it holds values.
Where the base's head multiplies by the very table of the embedding, the head's rows are replaced, too: files
have them under both names, and for those that do not the embedding's are taken.

Legend: T tokens in the batch, K trained tokens, I in features, O out features.

Public code: PEFT, ``TRAINABLE_TOKENS``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from timbre_methods.beside import TokenIds, token_parts
from timbre_methods.config import PeftConfig, read_config
from timbre_methods.contract import Method, Site, Sites, Tensors
from timbre_methods.examples import peft_file, random_tensor, whole_number
from timbre_methods.program import AdapterProgram
from timbre_methods.site_tensors import PREFIX, tensors_by_site

KEY = "trainable_tokens_delta"
KEYS = frozenset({KEY})


class TrainableTokensConfig(PeftConfig):
    """The fields that matter at inference."""

    inert = frozenset({"init_weights"})

    token_indices: TokenIds


class TrainableTokens(Method[TrainableTokensConfig]):
    name = "trainable_tokens"
    paper = "PEFT"
    stored = "rows [k, d]; their tokens are in the config"
    checked_against = "PEFT"
    kinds = frozenset({"linear", "embedding"})

    def claims(self, raw_config: Mapping[str, Any]) -> bool:
        return raw_config.get("peft_type") == "TRAINABLE_TOKENS"

    def parse(self, raw_config: Mapping[str, Any]) -> TrainableTokensConfig:
        return read_config(TrainableTokensConfig, raw_config)

    def compile(self, config: TrainableTokensConfig, tensors: Tensors, sites: Sites) -> AdapterProgram:
        found = {each.site.path: each for each in tensors_by_site(tensors, sites, KEYS)}
        parts = token_parts(found, KEY, dict.fromkeys(found, config.token_indices), sites)
        return AdapterProgram({path: (parts[path],) for path in sites if path in parts})

    def reference(self, config: TrainableTokensConfig, tensors: Tensors, site: Site, x_TI: Tensor) -> Tensor:
        weight_OI = site.weight_OI.to(x_TI.dtype, copy=True)
        own = tensors.get(f"{PREFIX}{site.path}.{KEY}", tensors.get(f"{PREFIX}{site.tied_to}.{KEY}"))
        if own is not None:
            table = weight_OI.T if site.kind == "embedding" else weight_OI
            for token, row in zip(config.token_indices, own, strict=True):
                table[token] = row.to(x_TI.dtype)
        y_TO = x_TI @ weight_OI.T
        return y_TO if site.bias_O is None else y_TO + site.bias_O.to(x_TI.dtype)

    def example(self, sites: Sites, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Tensor]]:
        embedding = next(site for site in sites.values() if site.kind == "embedding")
        chosen = [embedding]
        chosen += [s for s in sites.values() if s.tied_to == embedding.path and whole_number(0, 1, generator)]
        order = torch.randperm(embedding.in_features, generator=generator)
        tokens = order[: whole_number(1, 6, generator)].tolist()
        tensors = {
            f"{PREFIX}{site.path}.{KEY}": random_tensor((len(tokens), embedding.out_features), generator)
            for site in chosen
        }
        options = {"token_indices": tokens, "init_weights": True, "exclude_modules": None}
        return peft_file("TRAINABLE_TOKENS", chosen, options), tensors
