"""Health, readiness, metrics, ids, logs, the document."""

from __future__ import annotations

import logging
import re
import threading
from pathlib import Path

import pytest

from mini_sglang.api.metrics import Histogram
from mini_sglang.engine.canary import CANARY
from tests.api.serving import Client, serving, settle

SAMPLE = re.compile(r"mini_sglang_[a-z_]+(\{([a-z_]+=\"[^\"]*\",?)*\})? -?[0-9.e+-]+")


def numbers(client: Client) -> dict[str, float]:
    """All samples of the Prometheus text, by name with labels."""
    text = client.get("/metrics").text
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(SAMPLE.fullmatch(line) for line in lines), lines
    pairs = [line.rsplit(" ", 1) for line in lines]
    assert len({name for name, _ in pairs}) == len(pairs)
    return {name: float(value) for name, value in pairs}


def test_health_and_ready(client: Client) -> None:
    health = client.get("/health")
    assert health.status_code == 200
    assert health.json()["status"] == "ok" and health.json()["engines"][0]["state"] == "ready"
    assert client.get("/ready").json() == {"ready": True}
    assert client.head("/health").status_code == 200 and client.head("/health").content == b""


def test_metrics_count_what_happened(client: Client) -> None:
    before = numbers(client)
    client.ask(prompt="m" * 40, max_new_tokens=5, ignore_eos=True)
    client.ask(prompt="m" * 40, max_new_tokens=5, ignore_eos=True)
    client.ask(prompt="m" * 39 + "n", max_new_tokens=5, ignore_eos=True)
    client.post("/generate", json={})
    after = numbers(client)
    grown = {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}
    assert grown['mini_sglang_requests_total{outcome="length"}'] == 3
    assert grown['mini_sglang_http_responses_total{route="/generate",status="200"}'] == 3
    assert grown['mini_sglang_http_responses_total{route="/generate",status="400"}'] == 1
    assert grown["mini_sglang_prompt_tokens_total"] == 120
    assert grown["mini_sglang_completion_tokens_total"] == 15
    assert grown["mini_sglang_cached_tokens_total"] == 40 + 32
    assert grown['mini_sglang_engine_prefill_cache_hits_total{engine="0"}'] == 1
    assert grown['mini_sglang_engine_prefill_cache_misses_total{engine="0"}'] == 2
    assert grown['mini_sglang_engine_prefill_cache_hit_tokens_total{engine="0"}'] == 40
    assert grown['mini_sglang_engine_prefill_cache_miss_tokens_total{engine="0"}'] == 80
    assert grown['mini_sglang_engine_prefix_miss_tokens_total{engine="0"}'] == 40 + 8
    assert grown['mini_sglang_engine_prefix_hit_tokens_total{engine="0"}'] == 32
    assert grown["mini_sglang_ttft_seconds_count"] == 3
    assert grown["mini_sglang_itl_seconds_count"] == 12
    spent = grown["mini_sglang_ttft_seconds_sum"] + grown["mini_sglang_itl_seconds_sum"]
    assert 0 < spent <= grown["mini_sglang_request_seconds_sum"]
    assert grown["mini_sglang_request_seconds_count"] == 3
    assert after['mini_sglang_engine_kv_tokens_total{engine="0"}'] > 0
    assert after['mini_sglang_engine_up{engine="0"}'] == 1


def test_the_same_as_json(client: Client) -> None:
    told = client.get("/metrics", headers={"accept": "application/json"}).json()
    assert told["scheduler_mode"] == "rr" and told["engines"][0]["state"] == "ready"
    assert told["implementation"] == "native"
    assert 'implementation="native"' in client.get("/metrics").text
    assert told["prompt_tokens"] == numbers(client)["mini_sglang_prompt_tokens_total"]
    assert client.get("/metrics?format=json").json()["engines"][0]["inflight"] == 0
    assert client.get("/metrics?format=xml").status_code == 400
    buckets = told["ttft_seconds"]["buckets"]
    assert list(buckets)[-1] == "+Inf" and buckets["+Inf"] == told["ttft_seconds"]["count"]


def test_a_paths_text_never_becomes_a_label(client: Client) -> None:
    for number in range(20):
        client.get(f"/made-up-{number}")
    assert "made-up" not in client.get("/metrics").text


def test_histogram() -> None:
    histogram = Histogram((1, 2))
    for value in (0.5, 1, 1.5, 99):
        histogram.observe(value)
    histogram.observe(2, times=3)
    assert dict(histogram.cumulative()) == {"1": 2, "2": 6, "+Inf": 7} and histogram.sum == 108


@pytest.mark.parametrize(
    "given, kept", [("abc-1.2:3_X", True), ("", False), ("a b", False), ("x" * 129, False), (CANARY, False)]
)
def test_request_ids(client: Client, given: str, kept: bool) -> None:
    for body in ({"prompt": "x", "max_new_tokens": 1}, {}):
        response = client.post("/generate", json=body, headers={"x-request-id": given})
        made = response.headers["x-request-id"]
        assert (made == given) if kept else re.fullmatch("[0-9a-f]{16}", made)
        told = response.json()
        assert told.get("error", told)["request_id"] == made


def test_one_summary_line_a_request_with_its_id(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    body = {"prompt": "x", "max_new_tokens": 3, "ignore_eos": True}
    with caplog.at_level(logging.INFO, "mini_sglang"):
        client.post("/generate", json=body, headers={"x-request-id": "my-id"})
    served = [record.message for record in caplog.records if record.message.startswith("served ")]
    assert len(served) == 1
    for part in ("request=my-id", "reason=length", "prompt=1", "tokens=3", "ttft=0.", "tokens/s="):
        assert part in served[0]
    assert any(line.message.startswith("http request=my-id POST") for line in caplog.records)


def test_log_lines_cannot_be_forged(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mini_sglang"):
        client.get("/a%0Aserved%20request=x", headers={"x-request-id": "a\tb"})
    assert all("\n" not in record.message and "\t" not in record.message for record in caplog.records)


def test_the_document_names_every_route(client: Client) -> None:
    document = client.get("/openapi.json").json()
    assert {"/generate", "/metrics", "/health", "/v1/chat/completions"} <= set(document["paths"])
    schema = document["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["properties"]["top_p"]["exclusiveMinimum"] == 0 and not schema["additionalProperties"]


def test_a_full_queue_refuses_at_once_and_the_rest_completes(tiny_model: Path) -> None:
    """More than fits: 429 with a time to come again, and everything that was accepted completes."""
    statuses: list[int] = []
    bodies: list[str] = []
    with serving(tiny_model, max_inflight_per_engine=1, max_queue=2) as client:

        def ask(number: int) -> None:
            body = {
                "prompt": f"q{number}",
                "max_new_tokens": 300,
                "ignore_eos": True,
                "stream": number % 2 == 0,
            }
            response = client.post("/generate", json=body)
            statuses.append(response.status_code)
            bodies.append(response.text)
            if response.status_code == 429:
                assert int(response.headers["retry-after"]) >= 1
                assert response.json()["error"]["code"] == "overloaded"

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # Where one has ended before the last was asked, more than three are taken.
        taken = statuses.count(200)
        assert taken >= 3 and 0 < statuses.count(429) == 12 - taken
        assert sum('"finish_reason":"length"' in body for body in bodies) == taken
        many = client.post("/generate", json={"prompt": ["x"] * 4})
        assert many.status_code == 429
        assert client.ask(prompt=["x"] * 3, max_new_tokens=1)["outputs"][2]["completion_tokens"] == 1
        stats = client.service.pool.stats()
        assert (stats.inflight, stats.queued, stats.reserved) == (0, 0, 0)


def test_waiting_too_long_is_told_with_a_status(tiny_model: Path) -> None:
    with serving(tiny_model, max_inflight_per_engine=1, queue_timeout=0.1) as client:
        long = {"prompt": "x", "max_new_tokens": 3800, "ignore_eos": True}
        first = threading.Thread(target=client.ask, kwargs=long)
        first.start()
        settle(lambda: client.service.in_flight == 1, "the first request")
        assert client.post("/generate", json=long | {"stream": True}).status_code == 429
        first.join()


def test_a_deadline_is_504_or_an_error_event(tiny_model: Path) -> None:
    long = {"prompt": "x", "max_new_tokens": 3800, "ignore_eos": True}
    with serving(tiny_model, request_timeout=0.1) as client:
        whole = client.post("/generate", json=long)
        assert whole.status_code == 504 and "REQUEST_TIMEOUT" in whole.text
        last = client.lines(**long)[-1]
        assert last["event"] == "error" and last["code"] == "timeout" and "REQUEST_TIMEOUT" in last["message"]
        settle(lambda: client.service.in_flight == 0, "the engine's confirmation", 5)
        assert numbers(client)['mini_sglang_requests_total{outcome="timeout"}'] == 2
