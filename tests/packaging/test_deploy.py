"""The files under deploy/ agree with each other and with what the server says of itself."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from timbre_server.engine.messages import Ready
from timbre_server.metrics import Metrics
from timbre_server.settings import Settings
from timbre_server.tally import Tally

REPOSITORY = Path(__file__).resolve().parents[2]
DEPLOY = REPOSITORY / "deploy"
MADE_BY_PROMETHEUS = {"up", "ALERTS"}
ADDED_AT_THE_SCRAPE = {"instance", "job", "le"}
SUFFIXES = {
    "counter": ("_total",),
    "gauge": ("",),
    "histogram": ("_bucket", "_sum", "_count"),
}


def scrape() -> str:
    """What /metrics answers after one request of each kind that leaves a series."""
    engine = Ready(
        model_name="tiny",
        model_digest="sha256:" + "0" * 64,
        model_type="llama",
        dtype="float32",
        device="cpu",
        vocab_size=256,
        max_model_len=128,
        eos_token_ids=(),
        sites=(),
        block_size=16,
        num_kv_blocks=8,
        kv_cache_bytes=1024,
        model_bytes=1024,
        adapter_budget_bytes=1024,
    )
    tally = Tally("tiny", 128)
    tally.on_answered("/v1/completions", 200)
    text, _ = Metrics(tally, engine, name_of=lambda digest: None).render()
    return text.decode()


def exported_series() -> dict[str, set[str]]:
    """Labels by series name. Families without a sample yet are there with no labels."""
    series: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(scrape()):
        for suffix in SUFFIXES.get(family.type, ("",)):
            series[f"{family.name}{suffix}"] = set()
        for sample in family.samples:
            series.setdefault(sample.name, set()).update(sample.labels)
    return series


def selectors(node: Any) -> Iterator[Any]:
    """Every vector selector below a parsed PromQL expression."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    for name in ("lhs", "rhs", "expr", "vector_selector", "param"):
        if (child := getattr(node, name, None)) is not None:
            yield from selectors(child)
    for argument in getattr(node, "args", None) or ():
        yield from selectors(argument)


def read_yaml(path: str) -> Any:
    return yaml.safe_load((DEPLOY / path).read_text())


def board() -> dict[str, Any]:
    loaded = json.loads((DEPLOY / "grafana/dashboards/timbre.json").read_text())
    assert isinstance(loaded, dict)
    return loaded


def alert_rules() -> list[dict[str, Any]]:
    groups = read_yaml("prometheus/rules/timbre.yml")["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> dict[str, str]:
    """PromQL by where it stands; the board's variables are given values that Grafana could give them."""
    found = {f"alert {rule['alert']}": rule["expr"] for rule in alert_rules()}
    for panel in board()["panels"]:
        for target in panel.get("targets", ()):
            found[f"panel {panel['title']} {target['refId']}"] = target["expr"]
    found["board annotation"] = board()["annotations"]["list"][0]["expr"]
    return {
        where: text.replace("$__rate_interval", "5m").replace("$instance", ".*")
        for where, text in found.items()
    }


def test_every_series_of_board_and_rules_is_exported() -> None:
    series = exported_series()
    unknown = {
        where: selector.name
        for where, text in expressions().items()
        for selector in selectors(promql_parser.parse(text))
        if selector.name not in series.keys() | MADE_BY_PROMETHEUS
    }
    assert unknown == {}


def test_board_and_rules_select_by_labels_that_exist() -> None:
    series = exported_series()
    unknown = {
        where: (selector.name, matcher.name)
        for where, text in expressions().items()
        for selector in selectors(promql_parser.parse(text))
        if series.get(selector.name)
        for matcher in selector.matchers.matchers
        if matcher.name not in series[selector.name] | ADDED_AT_THE_SCRAPE
    }
    assert unknown == {}


def test_every_expression_names_a_series() -> None:
    silent = [
        where for where, text in expressions().items() if not list(selectors(promql_parser.parse(text)))
    ]
    assert silent == []


def test_every_alert_says_what_is_wrong_and_what_to_do() -> None:
    incomplete = [
        rule["alert"]
        for rule in alert_rules()
        if set(rule["annotations"]) != {"summary", "action"}
        or rule["labels"]["severity"] not in {"page", "ticket"}
    ]
    assert incomplete == []


def test_alerts_name_settings_that_exist() -> None:
    words = re.findall(
        r"\b[a-z]+(?:_[a-z]+)+\b", " ".join(rule["annotations"]["action"] for rule in alert_rules())
    )
    assert set(words) - set(Settings.model_fields) == set()


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_each_alert_fires_when_its_trouble_is_there() -> None:
    subprocess.run(["promtool", "test", "rules", DEPLOY / "prometheus/tests/timbre_test.yml"], check=True)


def test_board_and_provisioning_mean_the_same_data_source() -> None:
    uid = read_yaml("grafana/provisioning/datasources/prometheus.yaml")["datasources"][0]["uid"]
    used = set(re.findall(r'"type": "prometheus",\s+"uid": "([^"]+)"', json.dumps(board(), indent=2)))
    assert used == {uid}


def test_panels_have_their_own_ids_and_do_not_overlap() -> None:
    panels = board()["panels"]
    cells = [
        (x, y)
        for panel in panels
        for place in [panel["gridPos"]]
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) == 23
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_compose_and_prometheus_name_the_same_target() -> None:
    services = read_yaml("compose.yaml")["services"]
    targets = read_yaml("prometheus/prometheus.yml")["scrape_configs"][0]["static_configs"][0]["targets"]
    host, port = targets[0].split(":")
    assert services[host]["ports"] == [f"127.0.0.1:{port}:{port}"]


def test_compose_runs_pinned_images_that_are_watched_and_confined() -> None:
    for service in read_yaml("compose.yaml")["services"].values():
        assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+", service["image"])
        assert service["healthcheck"]["test"][0] == "CMD"
        assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_compose_mounts_what_exists() -> None:
    stack = read_yaml("compose.yaml")
    for service in stack["services"].values():
        for mount in service["volumes"]:
            source = mount.split(":")[0]
            assert source in stack["volumes"] or (DEPLOY / source).is_dir()


def test_image_and_compose_set_settings_that_exist() -> None:
    dockerfile = (REPOSITORY / "Dockerfile").read_text()
    stack = (DEPLOY / "compose.yaml").read_text()
    named = {name.lower() for name in re.findall(r"\bTIMBRE_([A-Z_]+)\b", dockerfile + stack)}
    assert named - set(Settings.model_fields) == set()


def test_the_image_runs_as_nobody_in_particular_and_is_watched() -> None:
    lines = (REPOSITORY / "Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("USER")] == ["USER 10001:10001"]
    assert sum(line.startswith("FROM ") for line in lines) == 2
    assert any(line.startswith("HEALTHCHECK") for line in lines)


def test_the_image_is_given_what_it_copies() -> None:
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    admitted = {line[1:] for line in ignored if line.startswith("!")}
    copies = re.findall(r"^COPY (?!--from)(.+) \S+$", (REPOSITORY / "Dockerfile").read_text(), re.MULTILINE)
    for source in " ".join(copies).split():
        assert any(entry == source or entry.startswith(f"{source}/") for entry in admitted)
        assert (REPOSITORY / source).exists()
