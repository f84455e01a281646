"""The figures of a front, for notebooks and pictures."""

from __future__ import annotations

import json
from typing import Any

import pytest
from helpers_records import SEARCH, front_of, make_candidate

from autocompress.decisions import PruneNeurons
from autocompress.plan import CompressionPlan
from autocompress.report.figures import Over, front_figure

ATTACK = "</script><img src=x onerror=alert(1)>"


def traces(figure: Any) -> dict[str, dict[str, Any]]:
    data = json.loads(figure.to_json(engine="json"))["data"]
    return {trace["name"]: trace for trace in data if trace["hoverinfo"] != "skip"}


def test_the_figure_has_front_others_and_reference_in_their_units() -> None:
    figure = front_figure(front_of(SEARCH), SEARCH)
    assert figure.layout.xaxis.title.text.startswith("latency, ms (median)")
    assert "bars: 95 % intervals" in figure.layout.xaxis.title.text
    assert figure.layout.yaxis.title.text == "accuracy, %"
    by_name = {trace.name: trace for trace in figure.data if trace.name != "edge"}
    assert set(by_name) == {"other candidates", "breaks a constraint", "Pareto front", "uncompressed reference"}
    line = by_name["Pareto front"]
    assert list(line.x) == pytest.approx([4.0, 12.8, 14.4]), "in order of latency"
    assert list(line.y) == pytest.approx([83.0, 87.5, 87.2])
    assert line.mode == "markers"
    assert list(line.marker.size) == list(line.marker.color) == pytest.approx([15, 40, 30])
    assert line.marker.sizemode == "area"
    assert line.marker.colorbar.title.text == "size, MB"
    assert list(by_name["other candidates"].x) == pytest.approx([15.2])
    assert list(by_name["breaks a constraint"].x) == pytest.approx([3.2])
    assert by_name["uncompressed reference"].marker.symbol == "star"


def test_bars_are_wilson_in_accuracy_and_the_ratio_interval_in_latency() -> None:
    candidate = make_candidate(0, accuracy=0.85, ratio=0.5)
    line = front_figure(front_of([candidate]), ()).data[0]
    score = candidate.score
    assert line.error_y.array[0] == pytest.approx(100 * (score.accuracy_high - score.accuracy))
    assert line.error_y.arrayminus[0] == pytest.approx(100 * (score.accuracy - score.accuracy_low))
    assert line.error_x.array[0] == pytest.approx(0.02 * score.latency_ms)
    assert line.error_x.arrayminus[0] == pytest.approx(0.02 * score.latency_ms)


def test_hover_tells_the_whole_point() -> None:
    candidate = make_candidate(7, accuracy=0.85, size_bytes=18_000_000, ratio=0.5)
    (said,) = front_figure(front_of([candidate]), ()).data[0].hovertext
    assert said.split("<br>") == [
        "<b>trial 7</b>",
        "ffn 0: 71 neurons w8a8",
        "accuracy 85.0 % (82.7 to 87.1)",
        "18.0 MB (5.0x smaller)",
        "8.0 ms (7.84 to 8.16 by the paired ratio)",
        "2.00x faster, 1.96 to 2.04",
    ]


def test_the_second_figure_is_over_size() -> None:
    figure = front_figure(front_of(SEARCH), SEARCH, over="size")
    by_name = {trace.name: trace for trace in figure.data if trace.name != "edge"}
    assert figure.layout.xaxis.title.text.startswith("size, MB")
    assert list(by_name["Pareto front"].x) == pytest.approx([15, 30, 40])
    assert by_name["Pareto front"].error_x.array is None
    assert by_name["Pareto front"].marker.colorbar.title.text == "latency, ms (median)"


def test_the_figure_escapes_a_plan_and_offers_no_upload() -> None:
    plan = CompressionPlan(((f"&{ATTACK}", PruneNeurons(keep=2)),))
    figure = front_figure(front_of([make_candidate(0, plan=plan)]), ())
    assert "&amp;&lt;/script&gt;&lt;img" in figure.data[0].hovertext[0].replace("<br>", "")
    assert "sendChartToCloud" in figure.layout.modebar.remove


@pytest.mark.parametrize("over", ["latency", "size"])
def test_the_front_plots_itself(over: Over) -> None:
    figure = front_of(SEARCH).plot(over)
    assert traces(figure).keys() == {"Pareto front", "uncompressed reference"}
    assert figure.layout.xaxis.title.text.startswith(over)


def test_the_line_joins_only_points_that_are_best_in_the_picture() -> None:
    figure = front_figure(front_of(SEARCH), SEARCH)
    (edge,) = [trace for trace in figure.data if trace.name == "edge"]
    assert len(edge.x) >= 1
    assert list(edge.x) == sorted(edge.x)
    assert list(edge.y) == sorted(edge.y)
