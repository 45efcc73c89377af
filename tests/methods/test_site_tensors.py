from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from timbre_methods.contract import Site
from timbre_methods.errors import AdapterMismatch, InvalidTensors
from timbre_methods.site_tensors import PREFIX, SiteTensors, nearest_fact, tensors_by_site

KEYS = frozenset({"lora_A.weight", "lora_B.weight"})


@pytest.fixture
def sites(site: Callable[..., Site]) -> dict[str, Site]:
    paths = [f"model.layers.{i}.{part}" for i in range(12) for part in ("attn.q", "attn.k", "mlp.up")]
    return {path: site(path=path) for path in [*paths, "lm_head"]}


def test_tensors_are_grouped_by_site_in_the_bases_order(sites: dict[str, Site]) -> None:
    tensors = {
        f"{PREFIX}lm_head.lora_A.weight": torch.ones(1),
        f"{PREFIX}model.layers.10.mlp.up.lora_B.weight": torch.ones(2),
        f"{PREFIX}model.layers.2.attn.q.lora_A.weight": torch.ones(3),
        f"{PREFIX}lm_head.lora_B.weight": torch.ones(4),
    }
    grouped = [(found.site.path, sorted(found.tensors)) for found in tensors_by_site(tensors, sites, KEYS)]
    assert grouped == [
        ("model.layers.2.attn.q", ["lora_A.weight"]),
        ("model.layers.10.mlp.up", ["lora_B.weight"]),
        ("lm_head", ["lora_A.weight", "lora_B.weight"]),
    ]


@pytest.mark.parametrize(
    ("path", "fact"),
    [
        ("model.layers.12.attn.q", "below 'model.layers' it has 0, 1, 2, 3, 4, 5, 6, 7, ... 11"),
        ("model.layers.3.attn.query", "below 'model.layers.3.attn' it has q, k"),
        ("transformer.h.0.attn", "below '' it has model, lm_head"),
        ("model.layers.3.attn", "below 'model.layers.3.attn' it has q, k"),
        ("lm_head.deeper", "'lm_head' is a linear layer itself"),
        ("model.layers.1x.attn.q", "below 'model.layers' it has 0, 1, 2, 3, 4, 5, 6, 7, ... 11"),
    ],
)
def test_an_unknown_layer_comes_with_the_nearest_fact(path: str, fact: str, sites: dict[str, Site]) -> None:
    assert (
        nearest_fact(path, sites)
        == f"this base has no linear layer {path!r} that can be adapted here; {fact}"
    )
    with pytest.raises(AdapterMismatch, match="no linear layer"):
        list(tensors_by_site({f"{PREFIX}{path}.lora_A.weight": torch.ones(1)}, sites, KEYS))


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("lm_head.base_layer.weight", "modules_to_save"),
        ("model.embed_tokens.lora_embedding_A", "target linear layers only"),
        ("model.embed_tokens.lora_embedding_B", "target linear layers only"),
        ("model.layers.0.attn.q.base_layer.bias", 'bias="none"'),
    ],
)
def test_a_tensor_that_replaces_the_base_is_refused_with_advice(
    name: str, advice: str, sites: dict[str, Site]
) -> None:
    with pytest.raises(InvalidTensors, match=f"{name} is not served: .*{advice}"):
        list(tensors_by_site({PREFIX + name: torch.ones(1)}, sites, KEYS))


def test_an_empty_file_is_refused(sites: dict[str, Site]) -> None:
    with pytest.raises(InvalidTensors, match="holds no tensor"):
        list(tensors_by_site({}, sites, KEYS))


def test_shapes_are_compared_with_sizes_and_letters(sites: dict[str, Site]) -> None:
    found = SiteTensors(sites["lm_head"], {"lora_A.weight": torch.ones(3, 5)})
    assert found.need("lora_A.weight", ("r", 5)).shape == (3, 5)
    with pytest.raises(
        InvalidTensors, match=r"lm_head\.lora_A\.weight: found shape \[3, 5\], expected \[r, 6\]"
    ):
        found.need("lora_A.weight", ("r", 6))
    with pytest.raises(InvalidTensors, match=r"expected \[3, 5, 1\]"):
        found.need("lora_A.weight", (3, 5, 1))
    with pytest.raises(InvalidTensors, match="found dtype float32, expected one of int32"):
        found.need("lora_A.weight", (3, 5), (torch.int32,))
    with pytest.raises(InvalidTensors, match=r"lora_B\.weight is missing, .* holds .*lora_A\.weight"):
        found.need("lora_B.weight", (6, 3))
    assert found.get("lora_B.weight", (6, 3)) is None


def test_a_letter_stands_for_no_empty_size(sites: dict[str, Site]) -> None:
    found = SiteTensors(sites["lm_head"], {"lora_A.weight": torch.ones(0, 5)})
    with pytest.raises(InvalidTensors, match=r"found shape \[0, 5\], expected \[r, 5\]"):
        found.need("lora_A.weight", ("r", 5))
