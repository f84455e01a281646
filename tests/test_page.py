from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from helpers_records import SEARCH, front_of, make_candidate
from plotly.offline import get_plotlyjs

from autocompress.anatomy import BlockShape, ModelShape
from autocompress.calm import Calm
from autocompress.decisions import PruneNeurons
from autocompress.plan import CompressionPlan
from autocompress.records import Candidate
from autocompress.report.comparison import Comparison
from autocompress.report.page import Report

MINILM = ModelShape(hidden=384, blocks=(BlockShape(heads=12, head_size=32, neurons=1536),) * 6, vocabulary=30_522)
ATTACK = "</script><img src=x onerror=alert(1)>"


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
        self.in_cell = False
        self.feed(html)
        self.data = next((json.loads(script) for script in self.scripts if script.startswith("{")), {})

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.open = tag
        if tag == "td":
            self.cells.append("")
            self.in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self.open = ""
        self.in_cell = self.in_cell and tag != "td"

    def handle_data(self, data: str) -> None:
        if self.open == "script":
            self.scripts.append(data)
        elif self.open != "style":
            self.text += data
            if self.in_cell:
                self.cells[-1] += data


def report(
    folder: Path,
    candidates: list[Candidate],
    *,
    title: str = "a search",
    environment: dict[str, Any] | None = None,
    notes: list[str] | None = None,
    comparison: Comparison | None = None,
    shape: ModelShape | None = MINILM,
) -> str:
    """Write a report and return it without plotly's own script."""
    path = folder / "report.html"
    Report(
        title=title,
        front=front_of(candidates),
        candidates=candidates,
        environment={"cpu": "test"} if environment is None else environment,
        notes=notes or (),
        comparison=comparison,
        shape=shape,
        command=("autocompress export results/a --trial ", " --format openvino -o a-trial-", ""),
    ).write(path)
    html = path.read_text(encoding="utf-8")
    bundle = get_plotlyjs()
    assert html.count(bundle) == 1
    return html.replace(bundle, "")


def test_the_page_opens_with_the_reference_and_three_recommendations(tmp_path: Path) -> None:
    text = Page(report(tmp_path, SEARCH)).text.replace("\xa0", " ")
    assert "The uncompressed reference has 88.0 % (85.8 to 89.9) accuracy, 90.0 MB and 16.0 ms." in text
    assert "Fastest within 1 percentage point of accuracy trial 0 with 87.5 %" in text
    assert "accuracy, 0.5 points (-0.5 to 1.5) less than the reference's on the same rows, 40.0 MB" in text
    assert "Smallest within 1 percentage point of accuracy trial 1 with 87.2 %" in text
    assert "Knee of the front trial 2 with 83.0 %" in text
    assert "15.0 MB (6.0x smaller), 4.0 ms (4.00x faster, 3.92 to 4.08)" in text


def test_one_point_may_be_recommended_for_everything(tmp_path: Path) -> None:
    text = Page(report(tmp_path, [make_candidate(0, accuracy=0.88)])).text
    assert "Fastest and smallest within 1 percentage point of accuracy, knee of the front trial 0" in text
    assert text.count("trial 0 with") == 1


def test_what_latencies_drift_is_said_where_it_is_known(tmp_path: Path) -> None:
    assert "drift" not in report(tmp_path, SEARCH)
    scored = [c for c in SEARCH if c.measurement is not None]
    drifting = [dataclasses.replace(c, measurement=c.score.drifting(0.023)) for c in scored]
    wanted = "interval; on the front none is narrower than ratios drift between two times, 2.3 % (deviation)"
    assert wanted in report(tmp_path, drifting)
    calm = Calm(scored[0].score.reference_ms / 1.1, spared=0.5)
    adjusted = [dataclasses.replace(c, measurement=calm.adjust(c.score)) for c in scored]
    most = max(c.score.latency_adjusted for c in front_of(adjusted).points) - 1
    said = report(tmp_path, adjusted)
    assert f"ratios are adjusted to the reference's pace, by {100 * most:.1f} % at most" in said
    assert "drift" not in said


def test_no_point_within_one_percentage_point_is_said(tmp_path: Path) -> None:
    text = Page(report(tmp_path, [make_candidate(0, accuracy=0.80)])).text
    assert "No point of the front is within 1 percentage point of its accuracy." in text
    assert "Knee of the front trial 0" in text


def test_the_table_holds_the_front(tmp_path: Path) -> None:
    front = Page(report(tmp_path, SEARCH)).cells[: 3 * 8]
    assert [front[i] for i in range(0, len(front), 8)] == ["0", "1", "2"]
    assert front[16:24] == [
        "2", "83.0 (80.5 to 85.2)", "15.0", "6.0", "4.0", "4.4", "4.00 (3.92 to 4.08)", "ffn 0: 66 neurons w8a8",
    ]  # fmt: skip


def test_failures_are_counted_by_their_reason(tmp_path: Path) -> None:
    failed = [make_candidate(10 + n, state="FAIL", failure="out of memory") for n in range(7)]
    page = Page(report(tmp_path, [*SEARCH, *failed]))
    assert page.cells[3 * 8 :] == ["7", "10, 11, 12, 13, 14", "out of memory", "1", "5", "logits: not finite"]
    assert "What failed, and why" not in report(tmp_path, SEARCH[:5])


def test_the_program_is_given_every_candidate(tmp_path: Path) -> None:
    data = Page(report(tmp_path, SEARCH)).data
    found = data["candidates"]
    assert found["number"] == [0, 1, 2, 3, 4, 5]
    assert found["front"] == [1, 1, 1, 0, 0, 0]
    assert found["feasible"][4] == 0
    assert found["accuracy"] == [87.5, 87.2, 83, 80, 86, None]
    assert found["drop"] == pytest.approx([0.5, 0.8, 5, 8, 2, None])
    assert found["size"] == [40, 30, 15, 45, 12, None]
    assert found["ms"] == pytest.approx([12.8, 14.4, 4, 15.2, 3.2, None])
    assert [[data["parts"][n] for n in plan] for plan in found["plan"]][2] == ["ffn 0: 66 neurons w8a8"]
    assert found["failure"] == {"5": "logits: not finite"}
    assert found["loss"] == [0.4] * 5 + [None]
    assert found["divergence"] == [None] * 6
    assert data["objectives"] == ["accuracy", "size_bytes", "latency"]
    assert data["command"] == ["autocompress export results/a --trial ", " --format openvino -o a-trial-", ""]
    assert data["neighbours"]["2"][0][:2] == ["more accurate", 1]


def test_without_the_shape_of_the_model_there_are_no_pictures(tmp_path: Path) -> None:
    data = Page(report(tmp_path, SEARCH, shape=None)).data
    assert data["shape"] is None
    assert data["pictures"] == [None] * len(SEARCH)


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
    on_front, failed = len(front_of(candidates)), {c.failure for c in candidates if c.state == "FAIL"}
    assert ("The front is empty: no candidate completed within the constraints." in page.text) == (on_front == 0)
    assert page.tags.count("tr") == sum(1 + rows for rows in (on_front, len(failed)) if rows) + bool(candidates)
    assert page.data["candidates"]["number"] == [c.number for c in candidates]


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
    new = {"table", "thead", "tbody", "tr", "th", "td", "ul", "li", "strong", "figure", "figcaption"}
    assert set(attacked.tags) - set(harmless.tags) <= new
    assert not [name for name, _ in attacked.attributes if name.startswith("on")]
    assert attacked.tags.count("script") == harmless.tags.count("script") == 3
    assert ATTACK not in html
    # It is still there to read: title, heading, recommendation, front, and so on.
    assert attacked.text.count(ATTACK) >= 6
    assert any(part.startswith(ATTACK.split()[0]) for part in attacked.data["parts"])


def test_the_page_is_offline_and_says_so_to_the_browser(tmp_path: Path) -> None:
    html = report(tmp_path, SEARCH)
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", html)
    assert "http://" not in html and "https://" not in html
    assert "default-src 'none'" in html
    assert "showSendToCloud: false" in html


def test_the_page_runs_two_scripts_and_no_other(tmp_path: Path) -> None:
    report(tmp_path, SEARCH)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', html)
    allowed = re.findall(r"'sha256-([^']+)'", policy)
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert allowed == [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert "script-src 'sha256-" in policy and "unsafe-inline" not in policy.partition("style-src")[0]


def test_the_page_declares_language_viewport_and_fixed_ids(tmp_path: Path) -> None:
    html = report(tmp_path, SEARCH)
    assert html.startswith('<!doctype html>\n<html lang="en">')
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    ids = [value for name, value in Page(html).attributes if name == "id"]
    assert len(set(ids)) == len(ids)
    assert {"data", "figure-front", "figure-parallel", "detail", "count", "candidates"} <= set(ids)


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


def test_the_section_follows_the_picture_and_says_what_the_search_gained(tmp_path: Path) -> None:
    comparison = Comparison(0.6, LADDER, random=LADDER[:1], predictor=PREDICTOR)
    html = report(tmp_path, LADDER, comparison=comparison)
    page = Page(html)
    headings = re.findall("<h2>(.*?)</h2>", html)
    assert headings.index(WORTH) == headings.index("Candidates") + 1
    assert ("id", "figure-volume") in page.attributes
    assert [trace["name"] for trace in page.data["figures"]["volume"]["data"]] == [
        "uniform ladder", "random search", "search",
    ]  # fmt: skip
    text = page.text.replace("\xa0", " ")
    assert "The search covers 1.50 times the hypervolume of the uniform ladder (1 plan that treats" in text
    assert "The reference point has 60.0 % accuracy" in text
    assert "One run of each is shown" in text
    assert page.cells[:5] == ["search", "2", "0.188", "", ""]
    assert "<dt>latency: mean absolute error</dt><dd>2.1 %</dd>" in html


def test_hypervolume_stands_over_time_where_that_is_known(tmp_path: Path) -> None:
    timed = [dataclasses.replace(c, span=(60.0 * c.number, 60.0 * c.number + 90)) for c in LADDER]
    page = Page(report(tmp_path, timed, comparison=Comparison(0.6, timed)))
    assert ("id", "figure-volume-time") in page.attributes
    [ladder, search] = page.data["figures"]["volume-time"]["data"]
    assert (ladder["x"], search["x"]) == ([0, 2.5], [0, 1.5, 2.5])


def test_the_section_is_offline_and_escaped(tmp_path: Path) -> None:
    plan = CompressionPlan(((ATTACK, PruneNeurons(keep=2)),))
    attacks = [make_candidate(0, plan=plan, origin="uniform"), make_candidate(1, plan=plan, origin=ATTACK)]
    html = report(tmp_path, [], comparison=Comparison(0.6, attacks, attacks, {ATTACK: 0.5}))
    assert "http://" not in html and "https://" not in html
    assert ATTACK not in html
    assert "&lt;/script&gt;&lt;img" in html
    assert Page(html).data["figures"].keys() == {"volume"}
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
