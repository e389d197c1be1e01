"""What a report says and draws, against the same figures taken from the JSON by hand."""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_sglang.bench.report.content import (
    BarChart,
    Chart,
    LineChart,
    Report,
    StripChart,
    number,
    several,
    wide_apart,
)
from mini_sglang.bench.report.load import _ecdf
from mini_sglang.bench.report.prepare import prepare
from mini_sglang.bench.report.reading import clean, read_source
from mini_sglang.errors import MiniSglangError
from tests.bench.records import (
    Json,
    all_records,
    envelope,
    kernels_record,
    load_row,
    local_record,
    peer_row,
    peer_run,
    request,
    serve_record,
    sweep_record,
    write,
)


def report(folder: Path, **records: Json) -> Report:
    return prepare([read_source(path) for path in write(folder, **records)])


def chart(found: Report, slug: str, section: int = 0) -> Any:
    (one,) = [chart for chart in found.sections[section].charts if chart.slug == slug]
    return one


def charts(found: Report) -> list[Chart]:
    return [chart for section in found.sections for chart in section.charts]


def cells(found: Report, section: int = 0, table: int = 0) -> list[tuple[str, ...]]:
    return [row.cells for row in found.sections[section].tables[table].rows]


@pytest.mark.parametrize("kind", ["local", "server"])
@pytest.mark.parametrize("seed", range(3))
def test_throughput_bars_are_the_rows_and_dots_the_rounds(tmp_path: Path, kind: str, seed: int) -> None:
    record = local_record(kind, seed)
    bars = chart(report(tmp_path, a=record), "throughput").bars
    rows = {row["title"]: row for row in record["rows"]}
    assert {bar.label for bar in bars} == set(rows)
    for bar in bars:
        row = rows[bar.label]
        assert bar.ours is (row["peer"] == "ours")
        if not row["valid"]:
            assert (bar.value, bar.points, bar.reason) == (None, (), row["reason"])
            continue
        runs = [run for run in record["runs"] if run["peer"] == row["peer"]]
        rates = []
        for place in range(3):
            turns = [run for run in runs if run["round"] == place]
            rates.append(sum(len(run["ids"][0]) for run in turns) / sum(run["seconds"] for run in turns))
        assert bar.points == pytest.approx(rates)
        # The row's own figure, which these records take as the median of the rounds.
        assert bar.value == row["tokens_per_s"] == pytest.approx(statistics.median(bar.points))
    values = [bar.value for bar in bars if bar.value is not None]
    assert values == sorted(values, reverse=True) and bars[-1].value is None


def test_first_tokens_are_those_of_every_answer_that_counts(tmp_path: Path) -> None:
    record = local_record()
    found = chart(report(tmp_path, a=record), "ttft")
    titles = {row["title"]: row["peer"] for row in record["rows"] if row["valid"]}
    assert {strip.label for strip in found.strips} == set(titles)
    for strip in found.strips:
        firsts = [run["times"][0][0] for run in record["runs"] if run["peer"] == titles[strip.label]]
        assert strip.values == pytest.approx([1e3 * first for first in firsts])
        assert strip.median == pytest.approx(1e3 * sorted(firsts)[4])


def test_first_token_without_the_times_of_all(tmp_path: Path) -> None:
    runs = [
        peer_run("ours", 2.0, times=None, first=0.5),
        peer_run("ours", 2.0, times=[None, [0.25, 0.5]], first=0.75),
    ]
    (strip,) = chart(report(tmp_path, a=envelope("local", [peer_row("ours", 32.0)], runs)), "ttft").strips
    assert strip.values == (250.0,)
    runs[0] = {**runs[0], "first": 0.5}
    (strip,) = chart(report(tmp_path, a=envelope("local", [peer_row("ours", 32.0)], runs)), "ttft").strips
    assert strip.values == (500.0, 250.0)


def test_a_round_with_a_run_that_does_not_count_is_left_out_and_said_to_be(tmp_path: Path) -> None:
    runs = [
        peer_run("ours", 2.0, round=1, turn=1),
        peer_run("ours", 1.0, round=1, turn=2, valid=False, reason="63 of 64"),
        peer_run("ours", 4.0, round=2, turn=1),
        peer_run("ours", 3.0, round=2, turn=2),
    ]
    found = report(tmp_path, a=envelope("local", [peer_row("ours", 128 / 7)], runs))
    (bar,) = chart(found, "throughput").bars
    assert bar.points == pytest.approx((128 / 7,))
    assert len(chart(found, "ttft").strips[0].values) == 3
    assert "ours (bf16): 1 run left out of the charts: 63 of 64" in found.sections[0].notes


def test_runs_go_to_the_row_of_their_group(tmp_path: Path) -> None:
    groups = ("bf16, one stream", "bf16, 8 at once", "fp32, one stream", "fp32, 8 at once")
    rows = [peer_row("ours", 10.0 + i, group=group) for i, group in enumerate(groups)]
    runs = [
        peer_run("ours", 64 / 10, group="bf16", turn=1),
        peer_run("ours", 64 / 11, group="bf16", turn="burst"),
        peer_run("ours", 64 / 13, group="fp32", turn="burst"),
        peer_run("ours", 64 / 12, group="fp32", turn=1),
        # Of nobody's group, or of nobody.
        peer_run("ours", 1.0, group="gguf"),
        peer_run("other", 1.0),
    ]
    found = report(tmp_path, a=envelope("server", rows, runs))
    for place, rate in enumerate((10.0, 11.0, 12.0, 13.0), 1):
        (bar,) = chart(found, f"throughput-{place}").bars
        assert bar.points == pytest.approx((rate,))
    # Without a group it cannot be told which of the rows it belongs to.
    runs = [peer_run("ours", 1.0)]
    assert chart(report(tmp_path, a=envelope("server", rows, runs)), "throughput-1").bars[0].points == ()


def test_tokens_that_a_server_only_counts(tmp_path: Path) -> None:
    runs = [peer_run("ours", 2.0, ids=[[]], output_tokens=50)]
    found = report(tmp_path, a=envelope("server", [peer_row("ours", 25.0)], runs))
    assert chart(found, "throughput").bars[0].points == (25.0,)


def sides(ours: float, peer: float, spread: float, agree: float = 1.0) -> Json:
    """Two peers with two rounds each, ``spread`` below and above their rate."""
    rows = [
        peer_row("ours", ours, title="mini-sglang"),
        peer_row("vllm", peer, title="vLLM", ratio=ours / peer, agree=agree),
    ]
    rounds = [(row, sign) for row in rows for sign in (-1, 1)]
    runs = [
        peer_run(row["peer"], 64 / (row["tokens_per_s"] * (1 + sign * spread)), round=sign)
        for row, sign in rounds
    ]
    return envelope("local", rows, runs)


def test_findings_say_who_is_ahead_and_where_nobody_is(tmp_path: Path) -> None:
    def said(record: Json) -> str:
        return " ".join(report(tmp_path, a=record).sections[0].findings)

    assert said(sides(40, 20, 0.1)) == "bf16: mini-sglang gives 40.0 tokens/s. That is 2.00 times vLLM."
    assert "Behind vLLM, which is 2.00 times as fast." in said(sides(20, 40, 0.1))
    assert "2.00 times as fast with 31% of its ids the reference's own" in said(sides(20, 40, 0.1, 0.31))
    assert "Not clearly apart from vLLM (1.10 times): rounds of both overlap." in said(sides(22, 20, 0.1))
    record = sides(40, 20, 0.1)
    record["rows"][1].update(valid=False, reason="60 of 64 tokens")
    assert said(record).endswith("tokens/s. No valid figure from vLLM.")
    record["rows"][0].update(valid=False, reason="it fell over")
    assert "no valid figure of mini-sglang" in said(record)


def test_a_row_that_its_runs_do_not_bear_out_is_told_of(tmp_path: Path) -> None:
    record = sides(40, 20, 0.1)
    assert report(tmp_path, a=record).sections[0].notes == [
        "“Ids agree”: the share of greedy ids that the float32 reference chooses too."
    ]
    record["rows"][0]["tokens_per_s"] = 60.0
    (note, _) = report(tmp_path, a=record).sections[0].notes
    assert "its row says 60.0 tokens/s" in note and "36.0 to 44.0" in note


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_ecdf_is_the_share_of_values_at_or_below(values: list[float]) -> None:
    line = _ecdf("x", values, 0)
    assert line.y[0] == 0.0 and line.y[-1] == 100.0
    # After the last step at an x, the line is at the share of values up to it.
    last = dict(zip(line.x, line.y, strict=True))
    for x, y in last.items():
        assert y == pytest.approx(100 * sum(value <= x for value in values) / len(values))
    assert list(line.x) == sorted(line.x) and set(line.x) == set(values)


def test_waits_under_load_leave_failed_requests_out(tmp_path: Path) -> None:
    record = serve_record()
    # One that failed before its first token, and one after it.
    record["runs"].append(request(61, 1.0, 90.0, error="reset"))
    first, whole = chart(report(tmp_path, a=record), "ttft").lines
    good = [run for run in record["runs"] if run["error"] is None]
    assert len(good) == len(record["runs"]) - 2
    assert list(first.x[1:]) == pytest.approx(sorted(1e3 * (run["first"] - run["sent"]) for run in good))
    assert list(whole.x[1:]) == pytest.approx(sorted(1e3 * (run["end"] - run["sent"]) for run in good))
    assert report(tmp_path, a=record).sections[0].notes == [
        "1 request failed: 503 Service Unavailable",
        "1 request failed: reset",
    ]


def test_cache_hit_rate_over_time(tmp_path: Path) -> None:
    runs = [
        request(0, 2.0, 2.1, cached=50),
        request(1, 1.0, 1.1, cached=0, prompt_tokens=300),
        request(2, 3.0, 3.1, cached=None),
        request(3, 4.0, 4.1, cached=90),
        request(4, 5.0, 5.1, cached=10, error="reset"),
    ]
    cache = [{"t": 0.0, "hit_rate": 0.0}, {"t": 5.0, "hit_rate": 0.25}]
    found = chart(report(tmp_path, a=envelope("serve", [load_row(2.0, cache=cache)], runs)), "cache")
    windows, running, single = found.lines
    assert (windows.x, windows.y) == ((0.0, 5.0), (0.0, 25.0))
    assert running.x == single.x == (1.0, 2.0, 4.0)
    assert running.y == pytest.approx((0.0, 100 * 50 / 400, 100 * 140 / 500))
    assert single.y == pytest.approx((0.0, 50.0, 90.0))
    # Where nobody tells, there is no chart.
    runs = [request(0, 2.0, 2.1, cached=None)]
    slugs = [one.slug for one in charts(report(tmp_path, a=envelope("serve", [load_row(2.0)], runs)))]
    assert slugs == ["ttft"]


def test_latency_against_load(tmp_path: Path) -> None:
    record = sweep_record()
    random.Random(0).shuffle(record["rows"])
    found = report(tmp_path, a=record)
    rows = sorted(record["rows"], key=lambda row: row["request_rate"])
    for name in ("ttft", "tpot"):
        for line in chart(found, name).lines:
            assert line.x == tuple(row["request_rate"] for row in rows)
            expected = [row[name][line.label] for row in rows]
            assert line.y[:-1] == pytest.approx([1e3 * value for value in expected[:-1]])
            # Nothing was finished at the last rate: there is no figure, and none is drawn.
            assert expected[-1] is None and line.y[-1] is None
    (output,) = chart(found, "throughput").lines
    assert output.y[:-1] == tuple(row["output_throughput"] for row in rows[:-1]) and output.y[-1] is None
    assert [row.invalid for row in found.sections[0].tables[0].rows][-1] == "no request was finished"
    assert found.sections[0].findings == [
        "Asked for 8 requests a second, the server finishes 6.00, less than 90% of them: from there on it "
        "does not keep up."
    ]
    record["settings"]["end"] = "full at 8 requests/s: too late"
    assert report(tmp_path, a=record).sections[0].findings == ["Full at 8 requests/s: too late."]


@pytest.mark.parametrize(
    "row, load",
    [
        (load_row(4.0), "4"),
        (load_row(None), "8 at a time"),
        (load_row(None, request_rate="inf", concurrency=None), "all at once"),
    ],
)
def test_load_is_named_as_it_was_asked_for(tmp_path: Path, row: Json, load: str) -> None:
    found = report(tmp_path, a=envelope("serve", [row], []))
    assert cells(found)[0][0] == load


def test_several_files_of_a_kind_come_together(tmp_path: Path) -> None:
    found = report(
        tmp_path, ours=sweep_record(), other=sweep_record(2.0), load=serve_record(), more=serve_record(1)
    )
    loads, sweeps = found.sections[-2:]
    assert [line.label for line in loads.charts[0].lines] == ["load", "more"]  # type: ignore[attr-defined]
    for one in sweeps.charts:
        assert isinstance(one, LineChart)
        ours, other = one.lines
        factor = 0.5 if one.slug == "throughput" else 2.0
        assert (ours.label, other.label) == ("ours", "other")
        assert [y for y in other.y if y] == pytest.approx([factor * y for y in ours.y if y])


def test_kernels_beside_the_machines_limits(tmp_path: Path) -> None:
    record = kernels_record()
    found = report(tmp_path, a=record)
    reading = chart(found, "bandwidth")
    assert reading.limit == ("read bandwidth", 40.0)
    decodes = [row for row in record["rows"] if row["rows"] == 1 and row["kernel"] != "norm"]
    assert [bar.value for bar in reading.bars] == [row["gb_s"] for row in decodes]
    products = chart(found, "products")
    most = [row for row in record["rows"] if row["kernel"] == "product" and row["rows"] == 256]
    assert [bar.value for bar in products.bars if bar.ours] == [row["gflop_s"] for row in most]
    assert [bar.value for bar in products.bars if not bar.ours] == [row["torch_gflop_s"] for row in most]
    assert len(cells(found)) == len(record["rows"])
    assert "NOT QUIET: Other processes kept 0.4 cores busy meanwhile" in found.sections[0].findings[-1]
    for run in record["runs"]:
        run["others"] = 0.1
    found = report(tmp_path, a=record)
    assert found.sections[0].notes == ["Other processes kept 0.1 cores busy meanwhile (median of the rows)."]
    assert len(found.sections[0].findings) == 1


def test_every_row_is_in_a_table(tmp_path: Path) -> None:
    records = all_records()
    found = report(tmp_path, **records)
    for place, record in enumerate(records.values()):
        section = found.sections[place]
        assert len(section.tables[0].rows) == len(record["rows"])
        for table in section.tables:
            assert all(len(row.cells) == len(table.columns) for row in table.rows)
    ours = [row for row in found.sections[0].tables[0].rows if row.ours]
    (mine,) = [row for row in records["local"]["rows"] if row["peer"] == "ours"]
    (row,) = ours
    assert row.cells[0] == "mini-sglang" and row.cells[3] == f"{mine['tokens_per_s']:.1f}"
    assert row.cells[5] == f"{1e3 * mine['ttft']:.0f}"
    # Figures that do not count are shown, with the reason why.
    (short,) = [row for row in found.sections[0].tables[0].rows if row.invalid == "60 of 64 tokens"]
    assert short.cells[3] == "70.0"


def test_where_and_how_it_was_measured(tmp_path: Path) -> None:
    record = local_record()
    facts = dict(report(tmp_path, a=record).sections[0].facts)
    assert facts["Command"] == record["command"] and facts["Commit"] == record["commit"]
    assert facts["Machine's limits"] == "40.0 GB/s read, 450 GFLOP/s in bf16 products, with 2 threads"
    for name in ("cpu: Some CPU @ 3.00GHz", "cores: 2", "flags: avx2"):
        assert name in facts["Machine"]
    assert "vllm: 0.32.0" in facts["Versions"] and "rounds: 3" in facts["Settings"]
    record.update(commit=None, limits=None)
    facts = dict(report(tmp_path, a=record).sections[0].facts)
    assert "unknown" in facts["Commit"] and facts["Machine's limits"] == "not measured"


def test_mixed_machines_and_commits_are_said(tmp_path: Path) -> None:
    one, two = local_record(), local_record()
    assert report(tmp_path, a=one, b=two).notices == []
    two["machine"]["cpu"] = "Another CPU"
    two["commit"] = "fedcba987654-dirty"
    machines, commits, dirty = report(tmp_path, a=one, b=two).notices
    assert "2 machines" in machines and "Some CPU" in machines and "Another CPU" in machines
    assert "0123456789ab and fedcba987654-dirty" in commits and "fedcba987654-dirty" in dirty


def damaged(path: tuple[str | int, ...], value: object) -> Json:
    record = local_record()
    spot: Any = record
    for part in path[:-1]:
        spot = spot[part]
    spot[path[-1]] = value
    return record


@pytest.mark.parametrize(
    "path, value, field",
    [
        (("rows",), "none", "rows"),
        (("rows",), [1], "rows[0]"),
        (("rows", 0, "tokens_per_s"), "fast", "rows[0].tokens_per_s"),
        (("rows", 1, "ttft"), -1.0, "rows[1].ttft"),
        (("rows", 0, "ttft"), True, "rows[0].ttft"),
        (("rows", 0, "tokens"), 10**400, "rows[0].tokens"),
        (("rows", 0, "valid"), "yes", "rows[0].valid"),
        (("rows", 0, "title"), ["a"], "rows[0].title"),
        (("rows", 0, "notes"), "slow", "rows[0].notes"),
        (("runs",), {}, "runs"),
        (("runs", 2), None, "runs[2]"),
        (("runs", 0, "ids"), "abc", "runs[0].ids"),
        (("runs", 0, "ids"), [3], "runs[0].ids[0]"),
        (("runs", 0, "times"), [["soon"]], "runs[0].times[0][0]"),
        (("runs", 0, "times"), [[math.nan]], "runs[0].times[0][0]"),
        (("runs", 0, "seconds"), [], "runs[0].seconds"),
        (("machine",), "fast", "machine"),
        (("machine", "cores"), "two", "machine.cores"),
        (("limits", "bandwidth_gb_s"), "all", "limits.bandwidth_gb_s"),
        (("settings",), [], "settings"),
        (("versions",), 3, "versions"),
    ],
)
def test_a_damaged_file_is_one_sentence(
    tmp_path: Path, path: tuple[str | int, ...], value: object, field: str
) -> None:
    with pytest.raises(MiniSglangError) as error:
        report(tmp_path, broken=damaged(path, value))
    said = str(error.value)
    assert "broken.json" in said and f": {field} is " in said and said.endswith(".") and "\n" not in said


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "7",
        "{}",
        json.dumps({**local_record(), "kind": "quality"}),
        json.dumps({**local_record(), "format": 99}),
        json.dumps({**local_record(), "rows": []}),
        "[" * 100_000,
    ],
)
def test_a_foreign_file_is_one_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(MiniSglangError) as error:
        read_source(path)
    assert "x.json" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(MiniSglangError, match="absent"):
        read_source(tmp_path / "absent.json")


def test_what_is_not_a_number_is_no_figure(tmp_path: Path) -> None:
    record = local_record()
    record["rows"][0].update(ttft=math.nan, itl=math.inf)
    found = report(tmp_path, a=record)
    (row,) = [row for row in found.sections[0].tables[0].rows if row.ours]
    assert row.cells[5:7] == ("–", "–")


def test_alt_texts_have_the_figures(tmp_path: Path) -> None:
    found = report(tmp_path, **all_records())
    for one in charts(found):
        assert len(one.alt) > 40
        if isinstance(one, BarChart):
            assert all(bar.label in one.alt for bar in one.bars)
            assert all(bar.reason in one.alt for bar in one.bars)
            assert all(number(bar.value, one.decimals) in one.alt for bar in one.bars if bar.value)
        if isinstance(one, StripChart):
            assert all(number(strip.median, one.decimals) in one.alt for strip in one.strips)


def test_small_helpers() -> None:
    assert number(None, 1) == "–" and number(12345.67, 1) == "12,345.7"
    assert several(["a"]) == "a" and several(["a", "b", "c"]) == "a, b and c"
    assert not wide_apart([]) and not wide_apart([0, 100]) and wide_apart([1, 21])
    assert clean("a\n\x1b[0mb\u202ec\ud800") == "a [0mb c"
    assert len(clean("x" * 10_000)) < 500
