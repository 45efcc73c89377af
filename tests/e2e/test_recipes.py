"""Recipes on a real server: what a merged, mixed or compressed adapter answers, while others generate."""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from timbre_client.export.mixtures import arrow

TARGETS = ["q_proj", "v_proj", "down_proj"]
WEIGHTS = {"recipe-one": 0.9, "recipe-two": -0.6}
PARENTS = [{"name": name, "weight": weight} for name, weight in WEIGHTS.items()]
PROMPT_IDS = [7, 80, 3, 200, 41, 41, 9, 120, 66, 5, 17, 230]


@pytest.fixture(scope="module")
def wrapped(tiny_model: Path, tiny_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tiny model with two LoRAs in PEFT, which the server has too; and an (IA)³ that only it has."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    torch.manual_seed(5)
    model: Any = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in WEIGHTS:
            config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS)
            if model is None:
                model = peft.get_peft_model(copy.deepcopy(base), config, adapter_name=name)
            else:
                model.add_adapter(name, config)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = 0.25 * torch.randn(parameter.shape)
        root = tmp_path_factory.mktemp("recipes")
        model.save_pretrained(str(root))
    gains = {
        f"base_model.model.model.layers.{layer}.self_attn.v_proj.ia3_l": 1 + torch.randn(24, 1)
        for layer in (0, 1)
    }
    (root / "recipe-ia3").mkdir()
    save_file(gains, root / "recipe-ia3" / "adapter_model.safetensors")
    config = {"peft_type": "IA3", "target_modules": ["v_proj"], "feedforward_modules": []}
    (root / "recipe-ia3" / "adapter_config.json").write_text(json.dumps(config))
    for name in (*WEIGHTS, "recipe-ia3"):
        answer = tiny_server.upload(name, root / name)
        assert answer.status_code == 201, answer.text
    return model


def cook(server: Any, path: str = "/v1/recipes", **body: Any) -> dict[str, Any]:
    with server.client() as client:
        answer = client.post(path, json=body)
    assert answer.status_code == 201, answer.text
    return dict(answer.json())


def logprobs(server: Any, model: str, **fields: Any) -> Tensor:
    body = {"model": model, "prompt": PROMPT_IDS, "max_tokens": 1, "echo": True, "logprobs": 0, **fields}
    with server.client() as client:
        answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return torch.tensor(
        answer.json()["choices"][0]["logprobs"]["token_logprobs"][1 : len(PROMPT_IDS)]
    ).double()


def adapted_layers(wrapped: Any) -> Iterator[tuple[str, Any]]:
    modules = wrapped.get_base_model().named_modules()
    return ((path, layer) for path, layer in modules if hasattr(layer, "lora_A"))


def logprobs_of(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        rows = torch.log_softmax(model(torch.tensor([PROMPT_IDS])).logits[0, :-1].double(), -1)
    return rows.gather(1, torch.tensor(PROMPT_IDS)[1:, None])[:, 0]


@pytest.mark.parametrize(
    ("kind", "theirs", "numbers"),
    [
        ("svd", "svd", {"rank": 5}),
        ("ties", "ties_svd", {"rank": 6, "density": 0.4}),
        ("magnitude_prune", "magnitude_prune_svd", {"rank": 6, "density": 0.4}),
    ],
)
def test_a_merge_answers_as_peft_s(
    wrapped: Any, tiny_server: Any, kind: str, theirs: str, numbers: dict[str, Any]
) -> None:
    made = cook(tiny_server, name=f"merged-{kind}", kind=kind, parents=PARENTS, **numbers)
    assert made["relative_error"] > 0.01
    wrapped.add_weighted_adapter(
        list(WEIGHTS), list(WEIGHTS.values()), kind, theirs, numbers["rank"], density=numbers.get("density")
    )
    wrapped.set_adapter(kind)
    found = logprobs(tiny_server, f"merged-{kind}@1")
    torch.testing.assert_close(found, logprobs_of(wrapped), atol=2e-4, rtol=0)
    assert (found - logprobs(tiny_server, "tiny")).abs().max() > 0.05, "the merge must be heard"


def test_a_named_mix_answers_as_the_mix_that_it_stands_for(wrapped: Any, tiny_server: Any) -> None:
    parents = [*PARENTS, {"name": "recipe-ia3", "weight": 0.5}]
    mix = cook(tiny_server, name="named-mix", kind="linear", parents=parents)
    names = ["named-mix"] * 4
    with ThreadPoolExecutor(8) as pool:
        named = list(pool.map(lambda name: logprobs(tiny_server, name), names))
        asked = list(pool.map(lambda _: logprobs(tiny_server, "tiny", adapters=parents), names))
    for one, other in zip(named, asked, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    with tiny_server.client() as client:
        answer = client.post("/v1/completions", json={"model": "named-mix", "prompt": "Hi", "max_tokens": 1})
        assert answer.headers["x-timbre-adapter-digest"] == mix["digest"]
        assert client.delete("/v1/adapters/recipe-ia3").status_code == 409
        assert client.delete("/v1/adapters/named-mix").status_code == 200


def test_members_of_a_collection_answer_as_before_where_the_basis_is_wide(
    wrapped: Any, tiny_server: Any
) -> None:
    members = [{"parent": name, "name": f"{name}-small"} for name in WEIGHTS]
    answer = cook(tiny_server, "/v1/recipes/compress", kind="joint_full", rank=8, members=members)
    for member, name in zip(answer["data"], WEIGHTS, strict=True):
        assert member["relative_error"] < 1e-6
        assert member["prepared_bytes"] == 2 * 3 * 8 * 8 * 4
        expected = logprobs(tiny_server, name)
        torch.testing.assert_close(logprobs(tiny_server, f"{name}-small"), expected, atol=1e-4, rtol=0)


def test_a_mixture_answers_as_the_expert_that_its_router_chooses(wrapped: Any, tiny_server: Any) -> None:
    parents = [{"name": name} for name in WEIGHTS]
    layers = {path: layer.in_features for path, layer in adapted_layers(wrapped)}
    for chosen, name in enumerate(WEIGHTS):
        bias = torch.full((2,), -30.0).index_fill_(0, torch.tensor(chosen), 30.0)
        router = {f"{path}.router.weight": torch.zeros(2, width) for path, width in layers.items()}
        content = save({**router, **{f"{path}.router.bias": bias.clone() for path in layers}})
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        with tiny_server.client() as client:
            assert client.put(f"/v1/blobs/{digest}", content=content).status_code == 201
        cook(tiny_server, name=f"only-{name}", kind="routed", parents=parents, router=digest)
        expected = logprobs(tiny_server, name)
        torch.testing.assert_close(logprobs(tiny_server, f"only-{name}"), expected, atol=1e-4, rtol=0)


def test_an_arrow_answers_as_the_one_that_was_bound_at_home(
    wrapped: Any, tiny_server: Any, tmp_path: Path
) -> None:
    experts: dict[str, list[Any]] = {}
    for name in WEIGHTS:
        for path, layer in adapted_layers(wrapped):
            pair = (layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach())
            experts.setdefault(path, []).append(tuple(factor.numpy() for factor in pair))
    answer = tiny_server.upload("at-home", arrow(tmp_path, experts, scales=[1.5, 1.5], top_k=1))
    assert answer.status_code == 201, answer.text
    parents = [{"name": name} for name in WEIGHTS]
    cook(tiny_server, name="at-the-server", kind="arrow", parents=parents, top_k=1)
    expected, found = (logprobs(tiny_server, name) for name in ("at-home", "at-the-server"))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    for name in WEIGHTS:
        assert (found - logprobs(tiny_server, name)).abs().max() > 0.01, "both experts must be heard"


def test_recipes_are_counted_by_kind_and_result(wrapped: Any, tiny_server: Any) -> None:
    def counts() -> dict[str, float]:
        with tiny_server.client() as client:
            lines = client.get("/metrics").text.splitlines()
        rows = [line.rsplit(" ", 1) for line in lines if line.startswith("timbre_recipes_total{")]
        return {row: float(value) for row, value in rows}

    before = counts()
    cook(tiny_server, name="counted", kind="lorahub", parents=PARENTS)
    with tiny_server.client() as client:
        refused = client.post(
            "/v1/recipes", json={"name": "x", "kind": "svd", "parents": [{"name": "parrot"}]}
        )
    assert refused.status_code == 404
    ok = 'timbre_recipes_total{kind="lorahub",result="ok"}'
    bad = 'timbre_recipes_total{kind="svd",result="refused"}'
    assert counts() == before | {ok: before.get(ok, 0) + 1, bad: before.get(bad, 0) + 1}
