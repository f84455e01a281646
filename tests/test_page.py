from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from helpers_records import make_candidate, make_reference
from plotly.offline import get_plotlyjs

from autocompress.decisions import PruneNeurons
from autocompress.front import Front
from autocompress.plan import CompressionPlan
from autocompress.records import Candidate
from autocompress.report.comparison import Comparison
from autocompress.report.figures import front_figure, size_figure
from autocompress.report.page import write_report

OBJECTIVES = ("accuracy", "size_bytes", "latency")
ATTACK = "</script><img src=x onerror=alert(1)>"
SEARCH = [
    make_candidate(0, accuracy=0.875, size_bytes=40_000_000, ratio=0.8),
    make_candidate(1, accuracy=0.872, size_bytes=30_000_000, ratio=0.9),
    make_candidate(2, accuracy=0.83, size_bytes=15_000_000, ratio=0.25),
    make_candidate(3, accuracy=0.80, size_bytes=45_000_000, ratio=0.95),
    make_candidate(4, accuracy=0.86, size_bytes=12_000_000, ratio=0.2, feasible=False),
    make_candidate(5, state="FAIL", failure="logits: not finite"),
]


class Page(HTMLParser):
    """What a browser makes of the page: tags, attributes, texts by tag, and scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.cells: list[str] = []
        self.scripts: list[str] = []
        self.text = ""
        self.open = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.open = tag
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        self.open = ""

    def handle_data(self, data: str) -> None:
        if self.open == "script":
            self.scripts.append(data)
        elif self.open != "style":
            self.text += data
            if self.open == "td":
                self.cells[-1] += data


def front_of(candidates: list[Candidate]) -> Front:
    return Front.of(candidates, make_reference(), OBJECTIVES)


def report(
    folder: Path,
    candidates: list[Candidate],
    *,
    title: str = "a search",
    environment: dict[str, Any] | None = None,
    notes: list[str] | None = None,
    comparison: Comparison | None = None,
) -> str:
    """Write a report and return it without plotly's own script."""
    path = folder / "report.html"
    write_report(
        path,
        title=title,
        front=front_of(candidates),
        candidates=candidates,
        environment={"cpu": "test"} if environment is None else environment,
        notes=notes or (),
        comparison=comparison,
    )
    html = path.read_text(encoding="utf-8")
    bundle = get_plotlyjs()
    assert html.count(bundle) == 1
    return html.replace(bundle, "")


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
    figure = size_figure(front_of(SEARCH), SEARCH)
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


def test_the_front_plots_itself() -> None:
    assert traces(front_of(SEARCH).plot()).keys() == {"Pareto front", "uncompressed reference"}


def test_the_page_opens_with_the_reference_and_three_recommendations(tmp_path: Path) -> None:
    text = Page(report(tmp_path, SEARCH)).text.replace("\xa0", " ")
    assert "The uncompressed reference has 88.0 % (85.8 to 89.9) accuracy, 90.0 MB and 16.0 ms." in text
    assert "Fastest within 1 percentage point of accuracy: trial 0 with 87.5 %" in text
    assert "Smallest within 1 percentage point of accuracy: trial 1 with 87.2 %" in text
    assert "Knee of the front: trial 2 with 83.0 %" in text
    assert "15.0 MB (6.0x smaller), 4.0 ms (4.00x faster, 3.92 to 4.08)" in text


def test_one_point_may_be_recommended_for_everything(tmp_path: Path) -> None:
    text = Page(report(tmp_path, [make_candidate(0, accuracy=0.88)])).text
    assert "Fastest and smallest within 1 percentage point of accuracy, knee of the front: trial 0" in text
    assert text.count("trial 0 with") == 1


def test_what_latencies_drift_is_said_where_it_is_known(tmp_path: Path) -> None:
    assert "drift" not in report(tmp_path, SEARCH)
    scored = [c for c in SEARCH if c.measurement is not None]
    drifting = [dataclasses.replace(c, measurement=c.score.drifting(0.023)) for c in scored]
    assert "interval; on the front it includes a drift of 2.3 % (standard deviation)" in report(tmp_path, drifting)


def test_no_point_within_one_percentage_point_is_said(tmp_path: Path) -> None:
    text = Page(report(tmp_path, [make_candidate(0, accuracy=0.80)])).text
    assert "No point of the front is within 1 percentage point of its accuracy." in text
    assert "Knee of the front: trial 0" in text


def test_tables_hold_the_front_and_all_candidates(tmp_path: Path) -> None:
    page = Page(report(tmp_path, SEARCH))
    front, everything = page.cells[: 3 * 8], page.cells[3 * 8 :]
    assert [front[i] for i in range(0, len(front), 8)] == ["0", "1", "2"]
    assert front[16:24] == [
        "2", "83.0 (80.5 to 85.2)", "15.0", "6.0", "4.0", "4.4", "4.00 (3.92 to 4.08)", "ffn 0: 66 neurons w8a8",
    ]  # fmt: skip
    rows = [everything[i : i + 7] for i in range(0, len(everything), 7)]
    assert [row[0] for row in rows] == ["0", "1", "2", "3", "4", "5"]
    assert rows[2] == ["2", "COMPLETE", "83.0", "15.0", "0.250", "6.8", "ffn 0: 66 neurons w8a8"]
    assert rows[4][1] == "COMPLETE, infeasible"
    assert rows[5] == ["5", "FAIL", "", "", "", "", "logits: not finite"]


def test_the_environment_is_flattened_and_notes_are_listed(tmp_path: Path) -> None:
    environment = {"target": {"runtime": {"name": "openvino"}}, "flags": ["a", "b"], "nodes": [{"cores": 2}], "seed": 7}
    html = report(tmp_path, SEARCH, environment=environment, notes=["first note", "second note"])
    assert "<dt>target.runtime.name</dt><dd>openvino</dd>" in html
    assert "<dt>flags</dt><dd>a, b</dd>" in html
    assert "<dt>nodes</dt><dd>[{&quot;cores&quot;: 2}]</dd>" in html
    assert "<dt>seed</dt><dd>7</dd>" in html
    assert "<li>first note</li><li>second note</li>" in html


@pytest.mark.parametrize(
    "candidates",
    [
        pytest.param([], id="none"),
        pytest.param([make_candidate(0)], id="one"),
        pytest.param([make_candidate(0, state="FAIL"), make_candidate(1, state="FAIL")], id="all failed"),
        pytest.param([make_candidate(0, feasible=False)], id="none feasible"),
        pytest.param([make_candidate(n) for n in range(4)], id="all equal"),
    ],
)
def test_the_page_renders_whatever_came_out(tmp_path: Path, candidates: list[Candidate]) -> None:
    page = Page(report(tmp_path, candidates, environment={}))
    on_front = len(front_of(candidates))
    assert ("The front is empty: no candidate completed within the constraints." in page.text) == (on_front == 0)
    assert page.tags.count("tr") == sum(1 + rows for rows in (on_front, len(candidates)) if rows)
    assert sum("Plotly.newPlot" in script for script in page.scripts) == 2


def test_nothing_from_outside_becomes_markup(tmp_path: Path) -> None:
    plan = CompressionPlan(((ATTACK, PruneNeurons(keep=2)),))
    candidates = [
        make_candidate(0, plan=plan, params={ATTACK: ATTACK}),
        make_candidate(1, plan=plan, ratio=0.7),
        make_candidate(2, plan=plan, ratio=0.3, feasible=False),
        make_candidate(3, state=ATTACK, failure=ATTACK, plan=plan),
    ]
    html = report(
        tmp_path, candidates, title=ATTACK, environment={ATTACK: {ATTACK: [ATTACK, {ATTACK: 1}]}}, notes=[ATTACK]
    )
    harmless, attacked = Page(report(tmp_path, candidates[:0])), Page(html)
    assert set(attacked.tags) - set(harmless.tags) <= {
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "ul",
        "li",
        "strong",
        "span",
    }
    assert not [name for name, _ in attacked.attributes if name.startswith("on")]
    assert attacked.tags.count("script") == harmless.tags.count("script")
    assert ATTACK not in html
    # It is still there to read: title, heading, recommendation, front, two columns of candidates, and so on.
    assert attacked.text.count(ATTACK) >= 8


def dom(file: Path) -> str:
    """Open a page in a browser and return what became of it."""
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("Chromium is not installed")
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom",
         f"--user-data-dir={file.parent / 'profile'}", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    return done.stdout


@pytest.mark.slow
def test_nothing_from_outside_strikes_in_a_browser(tmp_path: Path) -> None:
    strike = """</script></style></title><img src=x onerror="document.body.dataset.struck=1">"""
    (tmp_path / "bare.html").write_text(f"<!doctype html><title>a</title><body>{strike}", encoding="utf-8")
    assert 'data-struck="1"' in dom(tmp_path / "bare.html"), "it does where nothing is done against it"
    plan = CompressionPlan(((strike, PruneNeurons(keep=2)),))
    candidates = [
        make_candidate(0, plan=plan, params={strike: strike}),
        make_candidate(1, plan=plan, ratio=0.7),
        make_candidate(2, state=strike, failure=strike, plan=plan),
    ]
    report(tmp_path, candidates, title=strike, environment={strike: {strike: [strike]}}, notes=[strike])
    opened = dom(tmp_path / "report.html")
    assert opened.count('class="plot-container') == 2, "its own scripts run"
    assert "data-struck=" not in opened


def test_the_page_is_offline_and_says_so_to_the_browser(tmp_path: Path) -> None:
    html = report(tmp_path, SEARCH)
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", html)
    assert "http://" not in html and "https://" not in html
    assert "default-src 'none'" in html
    assert '"showSendToCloud": false' in html


def test_the_page_declares_language_viewport_and_fixed_ids(tmp_path: Path) -> None:
    html = report(tmp_path, SEARCH)
    assert html.startswith('<!doctype html>\n<html lang="en">')
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    ids = [value for name, value in Page(html).attributes if name == "id"]
    assert ids == ["figure-latency", "figure-size"]


def test_the_same_report_is_the_same_file(tmp_path: Path) -> None:
    assert report(tmp_path, SEARCH) == report(tmp_path, SEARCH)


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def refuse(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        report(tmp_path, SEARCH)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_a_lone_surrogate_costs_a_character_not_the_report(tmp_path: Path) -> None:
    html = report(tmp_path, [make_candidate(0, state="FAIL", failure="file \udcff gone")], title="\udcff title")
    assert "file gone" in html


def test_the_line_joins_only_points_that_are_best_in_the_picture() -> None:
    figure = front_figure(front_of(SEARCH), SEARCH)
    (edge,) = [trace for trace in figure.data if trace.name == "edge"]
    assert len(edge.x) >= 1
    assert list(edge.x) == sorted(edge.x)
    assert list(edge.y) == sorted(edge.y)


WORTH = "Was the search worth it?"
LADDER = [
    make_candidate(0, accuracy=0.8, size_bytes=45_000_000, ratio=0.5, origin="uniform"),
    make_candidate(1, accuracy=0.9, size_bytes=45_000_000, ratio=0.5),
]
PREDICTOR = {"latency: mean absolute error": 0.021, ATTACK: float("nan")}


def test_without_a_comparison_the_page_has_no_such_section(tmp_path: Path) -> None:
    html = report(tmp_path, SEARCH)
    assert WORTH not in html
    assert "figure-volume" not in html


def test_the_section_follows_the_size_picture_and_says_what_the_search_gained(tmp_path: Path) -> None:
    comparison = Comparison(0.6, LADDER, random=LADDER[:1], predictor=PREDICTOR)
    html = report(tmp_path, LADDER, comparison=comparison)
    page = Page(html)
    headings = re.findall("<h2>(.*?)</h2>", html)
    assert headings.index(WORTH) == headings.index("Accuracy over size") + 1
    ids = [value for name, value in page.attributes if name == "id"]
    assert ids == ["figure-latency", "figure-size", "figure-volume"]
    text = page.text.replace("\xa0", " ")
    assert "The search covers 1.50 times the hypervolume of the uniform ladder (1 plan that treats" in text
    assert "The reference point has 60.0 % accuracy" in text
    assert "One run of each is shown" in text
    assert page.cells[:5] == ["search", "2", "0.188", "", ""]
    assert "<dt>latency: mean absolute error</dt><dd>2.1 %</dd>" in html
    assert sum("Plotly.newPlot" in script for script in page.scripts) == 3


def test_the_section_is_offline_and_escaped(tmp_path: Path) -> None:
    plan = CompressionPlan(((ATTACK, PruneNeurons(keep=2)),))
    attacks = [make_candidate(0, plan=plan, origin="uniform"), make_candidate(1, plan=plan, origin=ATTACK)]
    html = report(tmp_path, [], comparison=Comparison(0.6, attacks, attacks, {ATTACK: 0.5}))
    assert "http://" not in html and "https://" not in html
    assert ATTACK not in html
    assert "&lt;/script&gt;&lt;img" in html
    assert "img" not in Page(html).tags


def test_a_search_without_candidates_has_a_section_without_a_figure(tmp_path: Path) -> None:
    html = report(tmp_path, [], comparison=Comparison(0.6, []))
    assert "The search tried no candidate, so there is nothing to compare." in html
    assert "figure-volume" not in html


def test_without_ladder_and_random_search_the_caption_names_neither(tmp_path: Path) -> None:
    html = report(tmp_path, LADDER, comparison=Comparison(0.6, LADDER[1:]))
    assert "part of the search" not in html
    assert "One run of each" not in html
    assert "predictors" not in html
