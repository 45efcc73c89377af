"""``/metrics`` in several states: every scrape parses, holds no series twice, and has the names agreed on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import parser
from prometheus_client.openmetrics import parser as openmetrics_parser
from prometheus_client.samples import Sample

from timbre_server.engine.messages import (
    AdapterLoaded,
    AdapterUnloaded,
    Ready,
    StepOutput,
    StepStats,
    TokenEvent,
)
from timbre_server.metrics import Metrics
from timbre_server.request_record import RequestRecord
from timbre_server.tally import Tally

ENGINE = Ready(
    model_name="tiny", model_digest="sha256:b", model_type="llama", dtype="float32", device="cpu",
    vocab_size=64, max_model_len=256, eos_token_ids=(2,), sites=(), block_size=16,
    num_kv_blocks=10, kv_cache_bytes=1 << 20,
    model_bytes=1 << 20, adapter_budget_bytes=1000,
)  # fmt: skip
MODEL = {"model_name": "tiny", "engine": "0"}
RECORD = RequestRecord(
    request_id="r", adapters=(), arrived_s=10.0, first_token_s=10.5, finished_s=12.5, prompt_tokens=7,
    cached_tokens=4, generation_tokens=5, max_tokens=16, n=2, finish_reason="stop",
)  # fmt: skip
FAMILIES = set((Path(__file__).parent / "metric_families.txt").read_text().split())


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Subject:
    """Metrics with clocks in the test's hand."""

    def __init__(self, max_adapters: int = 256) -> None:
        self.clock = Clock()
        self.names: dict[str, str] = {}
        self.tally = Tally(
            "tiny", 256, max_adapters=max_adapters, clock=self.clock, wall_clock=lambda: 1_700_000_000.0
        )
        self.metrics = Metrics(
            self.tally, ENGINE, name_of=self.names.get, max_adapters=max_adapters, wall_clock=lambda: 5.0
        )

    def samples(self) -> list[Sample]:
        """One scrape, whose text must parse and hold no series and no family twice."""
        text = self.metrics.render()[0].decode()
        families = list(parser.text_string_to_metric_families(text))
        assert [
            name for name, count in Counter(family.name for family in families).items() if count > 1
        ] == []
        found = [sample for family in families for sample in family.samples]
        keys = Counter((sample.name, tuple(sorted(sample.labels.items()))) for sample in found)
        assert [key for key, count in keys.items() if count > 1] == []
        return found

    def value(self, name: str, labels: Mapping[str, str] | None = None) -> float | None:
        values = [
            sample.value for sample in self.samples() if (sample.name, sample.labels) == (name, labels or {})
        ]
        assert len(values) <= 1
        return values[0] if values else None

    def lora_info(self) -> dict[str, str]:
        (sample,) = [sample for sample in self.samples() if sample.name == "vllm:lora_requests_info"]
        assert sample.value == 5.0
        return dict(sample.labels)


def step(*, resident_adapters: tuple[str, ...] = (), **stats: object) -> StepOutput:
    resident = {"num_resident_adapters": len(resident_adapters), "resident_adapters": resident_adapters}
    return StepOutput(StepStats(**{**resident, **stats}))  # type: ignore[arg-type]


def busy() -> Subject:
    subject = Subject()
    tally = subject.tally
    tally.on_output(
        step(
            step_seconds=0.03, num_running=3, num_waiting=5, num_waiting_for_adapter=2, num_kv_blocks_used=4,
            batch_tokens=20, prompt_tokens=17, generation_tokens=3, distinct_adapters=2,
            prefix_queried_tokens=30, prefix_hit_tokens=10, preemptions=1,
            resident_adapters=("d1", "d2"), waiting_adapters=("d3",),
            resident_adapter_bytes=200,
        )
    )  # fmt: skip
    subject.names.update({"d1": "pirate", "d2": "json", "d3": "telegram"})
    for adapters in ((), ("pirate",), ("pirate", "json")):
        tally.on_finished(replace(RECORD, adapters=adapters))
    tally.on_answered("/v1/completions", 200)
    tally.on_upload(1000)
    return subject


def failed() -> Subject:
    subject = Subject()
    tally = subject.tally
    event = TokenEvent("r", finish_reason="error", error_code="invalid_logits")
    tally.on_output(
        StepOutput(
            StepStats(),
            (event,),
            (AdapterLoaded("d", error_code="adapter_load_failed"),),
            (AdapterUnloaded("e", "evicted"), AdapterUnloaded("never here", "absent")),
        )
    )
    tally.on_finished(replace(RECORD, first_token_s=None, generation_tokens=0, finish_reason="error"))
    tally.on_rejected("tokens")
    tally.on_answered("_unmatched", 404)
    tally.on_recipe("ties", is_stored=False)
    tally.on_upload(None)
    return subject


def crowded() -> Subject:
    subject = Subject()
    for index in range(1000):
        subject.tally.on_finished(replace(RECORD, adapters=(f"a{index}",)))
        subject.names[f"d{index}"] = f"a{index}"
    digests = tuple(f"d{index}" for index in range(1000))
    subject.tally.on_output(
        step(resident_adapters=digests, waiting_adapters=digests[:50], resident_adapter_bytes=900)
    )
    return subject


STATES = {"fresh": Subject, "busy": busy, "failed": failed, "crowded": crowded}


@pytest.mark.parametrize("state", STATES)
def test_every_state_has_the_same_families_and_no_series_twice(state: str) -> None:
    subject = STATES[state]()
    text = subject.metrics.render()[0].decode()
    names = {family.name for family in parser.text_string_to_metric_families(text)}
    assert {name for name in names if not name.startswith("process_")} == FAMILIES
    subject.samples()


@pytest.mark.parametrize("state", STATES)
def test_a_scrape_that_asks_for_openmetrics_gets_it(state: str) -> None:
    body, content_type = STATES[state]().metrics.render("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert list(openmetrics_parser.text_string_to_metric_families(body.decode()))


@pytest.mark.parametrize("state", STATES)
def test_vllm_series_have_vllms_labels(state: str) -> None:
    extra = {
        "vllm:request_success_total": {"finished_reason"}, "vllm:num_requests_waiting_by_reason": {"reason"},
        "vllm:cache_config_info": {"block_size", "num_gpu_blocks", "cache_dtype"},
    }  # fmt: skip
    others = {
        "vllm:admission_rejections_total": {"model_name", "reason"},
        "vllm:lora_requests_info": {"max_lora", "running_lora_adapters", "waiting_lora_adapters"},
    }
    for sample in STATES[state]().samples():
        if sample.name.startswith("vllm:"):
            expected = others.get(sample.name, set(MODEL) | extra.get(sample.name, set()))
            assert set(sample.labels) - {"le"} == expected, sample.name


def test_a_fresh_server_shows_zeros_for_what_alerts_look_at() -> None:
    subject = Subject()
    for reason in ("stop", "length", "abort", "error"):
        assert subject.value("vllm:request_success_total", {**MODEL, "finished_reason": reason}) == 0
    for reason in ("requests", "tokens"):
        assert subject.value("vllm:admission_rejections_total", {"model_name": "tiny", "reason": reason}) == 0
    assert subject.value("timbre_adapter_loads_total", {"result": "failed"}) == 0
    assert subject.value("vllm:time_to_first_token_seconds_count", MODEL) == 0


def test_a_busy_server_shows_what_it_does() -> None:
    subject = busy()
    expected = {
        "vllm:num_requests_running": 3, "vllm:num_requests_waiting": 5, "vllm:kv_cache_usage_perc": 0.4,
        "vllm:generation_tokens_total": 3, "vllm:prompt_tokens_total": 17,
        "vllm:prompt_tokens_cached_total": 12, "vllm:num_preemptions_total": 1,
        "vllm:prefix_cache_queries_total": 30, "vllm:prefix_cache_hits_total": 10,
        "vllm:time_to_first_token_seconds_sum": 1.5, "vllm:e2e_request_latency_seconds_sum": 7.5,
        "vllm:request_time_per_output_token_seconds_sum": 1.5, "vllm:request_params_n_sum": 6,
        "vllm:iteration_tokens_total_sum": 20,
    }  # fmt: skip
    assert {name: subject.value(name, MODEL) for name in expected} == expected
    for reason, count in (("capacity", 3), ("deferred", 2)):
        assert subject.value("vllm:num_requests_waiting_by_reason", {**MODEL, "reason": reason}) == count
    assert subject.value("timbre_adapter_requests_total", {"adapter": "pirate"}) == 2
    assert subject.value("timbre_adapter_requests_total", {"adapter": "_base"}) == 1
    assert subject.value("timbre_adapter_generation_tokens_total", {"adapter": "json"}) == 5
    assert subject.value("timbre_adapter_bytes", {"tier": "cpu"}) == 200
    assert subject.value("timbre_engine_last_step_timestamp_seconds") == 1_700_000_000.0
    assert subject.value("timbre_requests_total", {"route": "/v1/completions", "code": "200"}) == 1


def test_failures_are_counted_where_they_belong() -> None:
    subject = failed()
    assert subject.value("vllm:corrupted_requests_total", MODEL) == 1
    assert subject.value("vllm:request_success_total", {**MODEL, "finished_reason": "error"}) == 1
    assert subject.value("vllm:time_to_first_token_seconds_count", MODEL) == 0
    assert subject.value("timbre_adapter_loads_total", {"result": "failed"}) == 1
    assert subject.value("timbre_adapter_evictions_total", {"reason": "evicted"}) == 1
    assert subject.value("timbre_adapter_evictions_total", {"reason": "unloaded"}) == 0
    assert subject.value("timbre_upload_total", {"result": "refused"}) == 1
    assert subject.value("timbre_upload_bytes_total") == 0
    assert subject.value("timbre_recipes_total", {"kind": "ties", "result": "refused"}) == 1


def test_a_thousand_adapters_have_a_bounded_number_of_series_and_nothing_is_lost() -> None:
    subject = crowded()
    rows = {
        sample.labels["adapter"]: sample.value
        for sample in subject.samples()
        if sample.name == "timbre_adapter_requests_total"
    }
    assert len(rows) == 257
    assert (rows["_other"], rows["a999"], "a0" in rows, sum(rows.values())) == (744, 1, False, 1000)


def test_experts_are_counted_by_mixture_in_a_bounded_number_of_series() -> None:
    subject = Subject()
    subject.names["d"] = "chorus"
    told = [{f"d{number}": (1,) * 64} for number in range(100)]
    for tokens in (*told, {"d": (3, 0, 1)}, {"d": (1, 1, 0)}):
        subject.tally.on_output(StepOutput(StepStats(expert_tokens=tokens)))
    rows = [sample for sample in subject.samples() if sample.name == "timbre_expert_tokens_total"]
    found = {sample.labels["expert"]: sample.value for sample in rows if sample.labels["adapter"] == "chorus"}
    assert found == {"0": 4, "1": 1, "2": 1}
    assert (len(rows), sum(sample.value for sample in rows)) == (1025, 6406)


def test_lora_info_is_one_series_of_disjoint_sets_however_often_they_change() -> None:
    subject = Subject()
    for index in range(200):
        subject.names[f"d{index}"] = f"a{index}"
        here = tuple(f"d{i}" for i in range(max(0, index - 3), index))
        subject.tally.on_output(
            step(resident_adapters=here, waiting_adapters=(f"d{index}", *here[:1]), resident_adapter_bytes=40)
        )
        info = subject.lora_info()
        running, waiting = (
            set(filter(None, info[f"{kind}_lora_adapters"].split(","))) for kind in ("running", "waiting")
        )
        assert running == {f"a{i}" for i in range(max(0, index - 3), index)}
        assert waiting == {f"a{index}"}
        assert len(running | waiting) <= int(info["max_lora"])


def test_lora_info_tells_the_room_that_is_left() -> None:
    subject = Subject()
    subject.names.update({"d1": "a1", "d2": "a2"})
    subject.tally.on_output(step(resident_adapters=("d1", "d2"), resident_adapter_bytes=400))
    assert subject.lora_info() == {
        "max_lora": "5",
        "running_lora_adapters": "a2,a1",
        "waiting_lora_adapters": "",
    }
    subject.tally.on_output(
        step(resident_adapters=("d1",), num_resident_adapters=4, resident_adapter_bytes=800)
    )
    assert subject.lora_info()["max_lora"] == "5"


def test_lora_info_names_no_more_than_it_has_series_for() -> None:
    info = crowded().lora_info()
    running = info["running_lora_adapters"].split(",")
    assert (len(running), running[0], info["waiting_lora_adapters"]) == (256, "a999", "")


def test_an_adapter_that_nobody_asked_for_by_name_is_left_out() -> None:
    subject = Subject()
    subject.tally.on_output(step(resident_adapters=("d1",), resident_adapter_bytes=1))
    assert subject.lora_info()["running_lora_adapters"] == ""


def test_buckets_are_cumulative_and_end_in_infinity() -> None:
    subject = busy()
    buckets = [
        (sample.labels["le"], sample.value)
        for sample in subject.samples()
        if sample.name == "vllm:time_to_first_token_seconds_bucket"
    ]
    assert [buckets[index] for index in (0, 8, 9, 10, -1)] == [
        ("0.001", 0), ("0.25", 0), ("0.5", 3), ("0.75", 3), ("+Inf", 3),
    ]  # fmt: skip
