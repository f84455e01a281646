"""The report: one HTML file with pictures and tables that opens anywhere, without a network.

Whatever comes from outside (title, plan, failure reason, environment) is escaped; plotly escapes ``<``, ``>`` and ``/``
in a figure's JSON but draws its texts as HTML of its own, so these are escaped as well, and the ``id`` of a figure,
which plotly does not escape, is fixed here. A content security policy keeps the page from loading anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from autocompress.errors import NoFeasiblePointError
from autocompress.front import Front, Preference
from autocompress.records import Candidate, Measurement
from autocompress.report.comparison import (
    HEADINGS,
    Comparison,
    comparison_rows,
    predictor_words,
    reference_words,
    sentences,
    volume_figure,
)
from autocompress.report.figures import front_figure, size_figure
from autocompress.report.tables import (
    accuracy_words,
    one_line,
    short,
    size_mb,
    times_faster,
    times_smaller,
    write_aside,
)

if TYPE_CHECKING:
    import plotly.graph_objects as go

_STYLE = """
:root { color-scheme: light dark; --text: #1c2430; --soft: #5a6675; --page: #fff; --line: #d5dbe3; --head: #f1f4f8; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e9f0; --soft: #a3afbf; --page: #14181f; --line: #37414f; --head: #1f2630; }
}
* { box-sizing: border-box; }
html { overflow-y: scroll; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0 1rem; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
li { margin: .3rem 0; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
figure { margin: 1rem 0; }
figcaption { margin-top: .5rem; }
.picture { background: #fff; color-scheme: light; border: 1px solid var(--line); border-radius: 6px; overflow: hidden; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
tbody tr:last-child td { border-bottom: 0; }
th { background: var(--head); white-space: nowrap; }
td { white-space: nowrap; }
td.words { white-space: normal; min-width: 18rem; }
th.words { width: 50%; }
th.number, td.number { text-align: right; }
dl { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: .25rem 1rem; font-size: .9rem; }
dt { color: var(--soft); }
dd { margin: 0; }
@media (max-width: 600px) {
  dl { grid-template-columns: 1fr; }
  dd { margin-bottom: .4rem; }
  td.words { min-width: 36rem; }
}
"""

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def write_report(
    path: Path,
    *,
    title: str,
    front: Front,
    candidates: Sequence[Candidate],
    environment: Mapping[str, Any],
    notes: Sequence[str] = (),
    comparison: Comparison | None = None,
) -> None:
    """Write the report page.

    Args:
        path: file to write or replace, in a folder that exists.
        title: heading of the page, as plain text.
        front: the front with its reference.
        candidates: all of the study, failed and infeasible ones too.
        environment: how it was measured; nested mappings are shown with dotted names.
        notes: further sentences, as plain text.
        comparison: the search and what it is held against; None leaves the section out.

    Raises:
        OSError: if it cannot be written; what was there before is then untouched.
    """
    heading = escape(one_line(title))
    # With more objectives than a picture has axes the front is no staircase, which looks like a fault if not said.
    names = escape(", ".join(name.removesuffix("_bytes") for name in front.objectives))
    together = f" The front is judged by {names} together." if len(front.objectives) > 2 else ""
    together += " The line joins the points that are best in this picture alone."
    remarks = "".join(f"<li>{escape(one_line(note))}</li>" for note in notes)
    body = f"""<h1>{heading}</h1>
{_together(_opening(front))}
<h2>Accuracy over latency</h2>
{_picture("figure-latency", front_figure(front, candidates), bundle=True, caption=_LATENCY_CAPTION + together)}
<h2>Accuracy over size</h2>
{_picture("figure-size", size_figure(front, candidates), bundle=False, caption=_SIZE_CAPTION + together)}
{_worth(comparison, front.reference) if comparison is not None else ""}
<h2>Pareto front</h2>
{_front_rows(front)}
<h2>All candidates</h2>
{_candidate_rows(candidates)}
<h2>How it was measured</h2>
<p>Accuracy is the share of {front.reference.rows} search rows that the artefact classifies rightly, with its 95 %
Wilson interval. The points were chosen by these rows, so confirm a pick on the held-out test rows. Size is the bytes
of the artefact's model files, 1 MB = 1,000,000 bytes. Latency is the median time of one call in milliseconds; the
ratio is the median over paired runs of candidate over reference, with its 95 % bootstrap
interval{_drifting(front)}.</p>
{_definitions(environment)}
{f"<h2>Notes</h2><ul>{remarks}</ul>" if remarks else ""}"""
    write_aside(
        path,
        f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{heading}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
""",
    )


_LATENCY_CAPTION = (
    "Up and to the left is better. Colour and marker area are the size. Vertical bars are 95 % Wilson intervals; "
    "horizontal bars are the 95 % interval of the paired latency ratio, carried over to the median in proportion."
)
_SIZE_CAPTION = "Up and to the left is better. Colour is the latency. Vertical bars are 95 % Wilson intervals."
_VOLUME_CAPTION = "Higher is better. Failed candidates and those that break a constraint count as evaluations."
_LADDER_CAPTION = " The plans of the uniform ladder are part of the search, so it never ends below them."
_ONE_RUN_CAPTION = " One run of each is shown; with another seed a small difference may turn around."


_WISHES: tuple[tuple[str, Preference, float | None], ...] = (
    ("fastest", "latency", 0.01),
    ("smallest", "size", 0.01),
    ("knee", "knee", None),
)


def _drifting(front: Front) -> str:
    """Say what the intervals of latencies include, if it was found."""
    drift = max((point.score.latency_drift for point in front.points), default=0.0)
    if not drift:
        return ""
    return f"; on the front it includes a drift of {100 * drift:.1f} % (standard deviation) between two times"


def _opening(front: Front) -> str:
    reference = front.reference
    first = (
        f"<p>The uncompressed reference has {accuracy_words(reference)} accuracy, {short(size_mb(reference))} MB and "
        f"{short(reference.latency_ms)} ms."
    )
    if not front.points:
        return f"{first} The front is empty: no candidate completed within the constraints.</p>"
    chosen: dict[int, tuple[Candidate, list[str]]] = {}
    missed = ""
    for name, prefer, drop in _WISHES:
        try:
            point = front.pick(prefer=prefer, max_accuracy_drop=drop)
        except NoFeasiblePointError:
            missed = " No point of the front is within 1 percentage point of its accuracy."
            continue
        chosen.setdefault(point.number, (point, []))[1].append(name)
    items = "".join(f"<li>{_recommendation(point, names, reference)}</li>" for point, names in chosen.values())
    count = "1 point" if len(front) == 1 else f"{len(front)} points"
    return f"{first}{missed} The front has {count}; consider:</p>\n<ul>{items}</ul>"


def _recommendation(point: Candidate, names: Sequence[str], reference: Measurement) -> str:
    score = point.score
    within = " and ".join(name for name in names if name != "knee")
    labels = [f"{within} within 1 percentage point of accuracy"] if within else []
    label = ", ".join(labels + ["knee of the front"] * ("knee" in names))
    return (
        f"<strong>{label[0].upper()}{label[1:]}</strong>: trial {point.number} with {accuracy_words(score)} accuracy, "
        f"{short(size_mb(score))} MB ({times_smaller(score, reference)}), {short(score.latency_ms)} ms "
        f'({times_faster(score, interval=True)}). <span class="soft">{escape(one_line(point.plan.words()))}</span>'
    )


def _worth(comparison: Comparison, reference: Measurement) -> str:
    """Return the section that holds the search against the ladder and a random search."""
    heading = "<h2>Was the search worth it?</h2>"
    said = _together(f"<p>{escape(' '.join(sentences(comparison, reference)))}</p>")
    parts = [heading, said]
    if comparison.search:
        caption = _VOLUME_CAPTION
        caption += _LADDER_CAPTION if comparison.ladder else ""
        caption += _ONE_RUN_CAPTION if comparison.random else ""
        figure = volume_figure(comparison, reference)
        parts += [
            _table("Search and baselines", HEADINGS, comparison_rows(comparison, reference)),
            _together(f'<p class="soft">{escape(reference_words(comparison, reference))}</p>'),
            _picture("figure-volume", figure, bundle=False, caption=caption),
        ]
    if errors := predictor_words(comparison):
        parts.append(f"<p>How far off the search's own predictors were:</p>\n{_definitions(errors)}")
    return "\n".join(parts)


def _together(html: str) -> str:
    """Keep numbers and their units on one line."""
    for unit in ("%", "MB", "ms"):
        html = html.replace(f" {unit}", f"&nbsp;{unit}")
    return html


def _picture(
    name: Literal["figure-latency", "figure-size", "figure-volume"], figure: go.Figure, *, bundle: bool, caption: str
) -> str:
    html = figure.to_html(
        full_html=False,
        include_plotlyjs=bundle,
        div_id=name,
        default_width="100%",
        default_height=f"{figure.layout.height}px",
        config={"responsive": True, "displaylogo": False, "showSendToCloud": False, "plotlyServerURL": ""},
    )
    return f'<figure><div class="picture">{html}</div><figcaption>{caption}</figcaption></figure>'


def _front_rows(front: Front) -> str:
    headings = ("trial", "accuracy, %", "size, MB", "times smaller", "latency, ms", "p90, ms", "times faster", "plan")
    rows = []
    for candidate in front.points:
        score = candidate.score
        low, high = 1 / score.latency_ratio_high, 1 / score.latency_ratio_low
        rows.append(
            (
                str(candidate.number),
                accuracy_words(score).replace(" %", ""),
                short(size_mb(score)),
                f"{front.reference.size_bytes / score.size_bytes:.1f}",
                short(score.latency_ms),
                short(score.latency_p90_ms),
                f"{1 / score.latency_ratio:.2f} ({low:.2f} to {high:.2f})",
                candidate.plan.words(),
            )
        )
    return _table("Pareto front", headings, rows) if rows else "<p>The front is empty.</p>"


def _candidate_rows(candidates: Sequence[Candidate]) -> str:
    headings = ("trial", "state", "accuracy, %", "size, MB", "latency ratio", "seconds", "plan or reason of failure")
    rows = []
    for candidate in candidates:
        score = candidate.measurement
        state = candidate.state if candidate.feasible or score is None else f"{candidate.state}, infeasible"
        numbers = ("", "", "", "")
        if score is not None:
            size, ratio = short(size_mb(score)), f"{score.latency_ratio:.3f}"
            numbers = (f"{100 * score.accuracy:.1f}", size, ratio, f"{score.seconds:.1f}")
        words = candidate.failure if candidate.failure else candidate.plan.words()
        rows.append((str(candidate.number), state, *numbers, words))
    return _table("All candidates", headings, rows) if rows else "<p>No candidate was tried.</p>"


_KINDS = {"plan": "words", "plan or reason of failure": "words", "state": "state", "tried": "state"}
"""Class of a column by its heading, where it does not hold numbers."""


def _table(label: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose columns of plans and reasons hold words that may break; most others hold numbers."""
    kinds = [_KINDS.get(heading, "number") for heading in headings]
    head = "".join(f'<th scope="col" class="{k}">{escape(h)}</th>' for k, h in zip(kinds, headings, strict=True))
    lines = []
    for row in rows:
        cells = zip(kinds, row, strict=True)
        lines.append("".join(f'<td class="{kind}">{escape(one_line(cell))}</td>' for kind, cell in cells))
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _definitions(environment: Mapping[str, Any]) -> str:
    pairs = (
        f"<dt>{escape(one_line(name))}</dt><dd>{escape(one_line(value))}</dd>" for name, value in _flat(environment)
    )
    inside = "\n".join(pairs)
    return f"<dl>\n{inside}\n</dl>" if inside else ""


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        elif isinstance(value, list | tuple) and not any(isinstance(item, Mapping | list | tuple) for item in value):
            yield name, ", ".join(str(item) for item in value)
        elif isinstance(value, list | tuple):
            yield name, json.dumps(value, default=str)
        else:
            yield name, str(value)
