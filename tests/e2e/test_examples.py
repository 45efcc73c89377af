"""The example adapters on the model that they were made for: each speaks its own voice, and nobody else's."""

from __future__ import annotations

import ast
import json
import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from timbre_server.engine.embedded_model import embedded_model_folder

EXAMPLES = Path(__file__).parents[2] / "examples"
VOICES = {"pirate": "lora", "headline": "fourierft", "telegram": "shira", "json": "ia3"}
MIXTURES = {"solo": "llava_mole", "duet": "mixlora"}
MIN_SHARE = {"solo": 0.7, "duet": 0.4}
"""Of the expert that was trained for a kind of text, in the gates of that kind's held-out answers."""
LINES_EACH = 10
CLEAR_MARGIN = 0.3
"""Nats a token."""


@dataclass(frozen=True)
class Line:
    """One held-out question and answer, as token ids in the model's own chat form."""

    prompt_ids: list[int]
    answer_ids: list[int]


@pytest.fixture(scope="module")
def model_folder(request: pytest.FixtureRequest) -> Path:
    return embedded_model_folder(Path(request.config.cache.mkdir("timbre_embedded_model")))


@pytest.fixture(scope="module")
def server(serve: Callable[..., Any], model_folder: Path) -> Any:
    flags = ("--model", model_folder, "--served-model-name", "base", "--dtype", "float32")
    return serve(*flags, "--examples-dir", EXAMPLES / "adapters", "--kv-cache-mib", 256)


@pytest.fixture(scope="module")
def lines(model_folder: Path) -> dict[str, list[Line]]:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    found: dict[str, list[Line]] = {}
    for voice in VOICES:
        texts = (EXAMPLES / "data" / f"{voice}.heldout.jsonl").read_text("utf-8").splitlines()[:LINES_EACH]
        for pair in map(json.loads, texts):
            messages = [{"role": "user", "content": pair["prompt"]}]
            prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            ids = tokenizer.encode(prompt, add_special_tokens=False)
            answer = tokenizer.encode(pair["answer"], add_special_tokens=False)
            found.setdefault(voice, []).append(Line(ids, answer))
    return found


def loss(server: Any, model: str, line: Line) -> float:
    """Mean negative log-probability of the answer's tokens, by the server's own figures."""
    body = {"model": model, "prompt": line.prompt_ids + line.answer_ids, "max_tokens": 0}
    with server.client() as client:
        answer = client.post("/v1/completions", json=body | {"echo": True, "logprobs": 0})
    assert answer.status_code == 200, answer.text
    values = answer.json()["choices"][0]["logprobs"]["token_logprobs"]
    return -statistics.fmean(values[len(line.prompt_ids) :])


def losses(server: Any, asked: list[tuple[str, Line]]) -> list[float]:
    """All at once, so that they meet in the same batches."""
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda pair: loss(server, *pair), asked))


def test_each_voice_lowers_its_own_held_out_loss_and_changes_nobody_elses(
    server: Any, lines: dict[str, list[Line]]
) -> None:
    every = [(voice, line) for voice, own in lines.items() for line in own]
    before = losses(server, [("base", line) for _, line in every])

    crowd = [pair for voice, line in every for pair in ((voice, line), ("base", line))]
    together = losses(server, crowd)
    with_adapter, base = together[::2], together[1::2]

    assert base == pytest.approx(before, abs=1e-4), "the base must not change"
    for voice in VOICES:
        own = [index for index, (name, _) in enumerate(every) if name == voice]
        adapted = statistics.fmean(with_adapter[index] for index in own)
        plain = statistics.fmean(before[index] for index in own)
        assert adapted < plain - CLEAR_MARGIN, f"{voice}: {plain:.2f} -> {adapted:.2f}"


def test_a_voice_is_worse_than_its_owner_at_anothers_lines(server: Any, lines: dict[str, list[Line]]) -> None:
    for voice, other in zip(VOICES, [*list(VOICES)[1:], "pirate"], strict=True):
        own, foreign = (
            statistics.fmean(losses(server, [(name, line) for line in lines[voice][:4]]))
            for name in (voice, other)
        )
        assert own < foreign


@pytest.mark.parametrize(("voice", "method"), VOICES.items())
def test_the_examples_are_one_of_each_family(server: Any, voice: str, method: str) -> None:
    with server.client() as client:
        assert client.get(f"/v1/adapters/{voice}").json()["method"] == method


@pytest.fixture(scope="module")
def cues() -> dict[str, str]:
    """The system message of each kind of text, in the order of the experts."""
    tree = ast.parse((EXAMPLES / "mixture.py").read_text("utf-8"))
    (value,) = (
        n.value for n in tree.body if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == "CUES"
    )
    assert isinstance(value, ast.Call)
    return dict(ast.literal_eval(value.args[0]))


def answer_with_routing(server: Any, mixture: str, cue: str, question: str) -> dict[str, Any]:
    """The first choice of a short greedy answer."""
    messages = [{"role": "system", "content": cue}, {"role": "user", "content": question}]
    body = {"model": mixture, "messages": messages, "max_tokens": 8, "temperature": 0}
    with server.client() as client:
        answer = client.post("/v1/chat/completions", json=body | {"return_routing": True})
    assert answer.status_code == 200, answer.text
    return dict(answer.json()["choices"][0])


@pytest.mark.parametrize(("mixture", "method"), MIXTURES.items())
def test_a_mixture_routes_each_kind_of_text_to_its_expert(
    server: Any, cues: dict[str, str], mixture: str, method: str
) -> None:
    asked = []
    for expert, (kind, cue) in enumerate(cues.items()):
        texts = (EXAMPLES / "data" / f"{kind}.heldout.jsonl").read_text("utf-8").splitlines()[:4]
        asked += [(expert, cue, json.loads(text)["prompt"]) for text in texts]
    with ThreadPoolExecutor(16) as pool:
        choices = list(pool.map(lambda own: answer_with_routing(server, mixture, *own[1:]), asked))
    shares: dict[int, list[float]] = {}
    for (expert, _, _), choice in zip(asked, choices, strict=True):
        places = [p for token in choice["routing"] for told in token.values() for p in told.values()]
        shares.setdefault(expert, []).extend(
            dict(zip(place["experts"], place["gates"], strict=True)).get(expert, 0.0) for place in places
        )
    assert {expert: statistics.fmean(own) for expert, own in shares.items()} == pytest.approx(
        dict.fromkeys(range(4), 1.0), abs=1 - MIN_SHARE[mixture]
    )
    with server.client() as client:
        assert client.get(f"/v1/adapters/{mixture}").json()["method"] == method
