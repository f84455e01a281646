"""The report: one HTML file that opens anywhere, without a network.

What it says in words and tables stands in the file; pictures, limits and the panel of a point are drawn by ``page.js``
from the data that the file holds (`data.py`). Whatever comes from outside (title, plan, failure reason, environment) is
escaped, and a content security policy runs two scripts alone, which it knows by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocompress.anatomy import ModelShape
from autocompress.front import CLOSE, KNEE, Front
from autocompress.records import Candidate, Measurement
from autocompress.report.comparison import (
    HEADINGS,
    Comparison,
    comparison_rows,
    predictor_words,
    reference_words,
    sentences,
    time_figure,
    volume_figure,
)
from autocompress.report.data import page_data
from autocompress.report.importance import importance_figure, importances
from autocompress.report.tables import (
    FRONT_HEADINGS,
    accuracy_words,
    drop_words,
    front_rows,
    one_line,
    short,
    size_mb,
    times_faster,
    times_smaller,
    write_aside,
)

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, kw_only=True)
class Report:
    """A report of one study.

    Args:
        title: heading of the page, as plain text.
        front: the front with its reference.
        candidates: all of the study, failed and infeasible ones too.
        environment: how it was measured; nested mappings are shown with dotted names.
        notes: further sentences, as plain text.
        comparison: the search and what it is held against; None leaves the section out.
        shape: of the uncompressed model; without it there are no pictures of plans.
        command: that exports a point, in parts between which its number stands.
        standing: how far the search is, as plain text, where it goes on.
        version: of what is shown; a page that is served asks for it, and loads itself anew when it has changed.
    """

    title: str
    front: Front
    candidates: Sequence[Candidate]
    environment: Mapping[str, Any]
    notes: Sequence[str] = ()
    comparison: Comparison | None = None
    shape: ModelShape | None = None
    command: Sequence[str] = ("autocompress export RESULTS --trial ", " --format openvino -o OUT")
    standing: str = ""
    version: str = ""

    def write(self, path: Path) -> None:
        """Write or replace the page at ``path``, in a folder that exists.

        Raises:
            OSError: if it cannot be written; what was there before is then untouched.
        """
        write_aside(path, self.html())

    def html(self) -> str:
        """Return the page."""
        heading = escape(one_line(self.title))
        figures: dict[str, go.Figure] = {}
        sections = [
            f"<h1>{heading}</h1>",
            f'<p class="standing">{escape(one_line(self.standing))}</p>' if self.standing else "",
            _together(_opening(self.front)),
            "<h2>Candidates</h2>",
            _explorer(self.front),
            _worth(self.comparison, self.front.reference, figures) if self.comparison is not None else "",
            _why(self.candidates, self.front.objectives, figures),
            "<h2>Pareto front</h2>",
            _front_rows(self.front),
            _failures(self.candidates),
            "<h2>All candidates</h2>",
            _candidate_rows(self.candidates),
            "<h2>How it was measured</h2>",
            _measured(self.front),
            _definitions(self.environment),
            _remarks(self.notes),
        ]
        random = (self.comparison.random or ()) if self.comparison is not None else ()
        data = page_data(self.front, self.candidates, random=random, shape=self.shape)
        drawn = {name: json.loads(figure.to_json()) for name, figure in figures.items()}
        data |= {"command": self.command, "figures": drawn, "version": self.version}
        return _document(heading, "\n".join(part for part in sections if part), data)


def _document(heading: str, body: str, data: Mapping[str, Any]) -> str:
    from plotly.offline import get_plotlyjs

    here = resources.files("autocompress.report")
    style = (here / "page.css").read_text(encoding="utf-8")
    scripts = get_plotlyjs(), (here / "page.js").read_text(encoding="utf-8")
    # Within a script element nothing but its end, or a comment, is read as markup.
    held = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{heading}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
<script type="application/json" id="data">{held}</script>
<script>{scripts[0]}</script>
<script>{scripts[1]}</script>
</body>
</html>
"""


def _policy(scripts: Sequence[str]) -> str:
    """Return a policy by which a browser runs these scripts and no other, and loads nothing."""
    hashes = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{found}'" for found in hashes)
    # plotly makes the programs that draw lines on a GPU from text; what comes from outside is not among that. A page
    # that is served asks where it comes from for its version; one that was opened as a file has nobody to ask.
    allowed += " 'unsafe-eval'; connect-src 'self'"
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"


def _explorer(front: Front) -> str:
    """Return the picture of all candidates with what governs it; the program fills it."""
    # With more objectives than a picture has axes the front is no staircase, which looks like a fault if not said.
    names = escape(", ".join(name.removesuffix("_bytes").replace("_", " ") for name in front.objectives))
    together = f" The front is judged by {names} together." if len(front.objectives) > 2 else ""
    axes = "".join(
        f'<label>{said} <select id="axis-{axis}"></select></label>'
        for axis, said in (("x", "across"), ("y", "up"), ("z", "colour, size, depth"))
    )
    limits = "".join(
        f'<div><label for="limit-{name}">{said} <output id="limit-{name}-value" for="limit-{name}"></output></label>'
        f'<input type="range" id="limit-{name}" min="0" max="0" step="1"></div>'
        for name, said in (("drop", "accuracy drop at most"), ("latency", "latency at most"), ("size", "size at most"))
    )
    return f"""<div class="controls">{axes}<label><input type="checkbox" id="log"> logarithmic</label>
<label><input type="checkbox" id="solid"> in 3-D</label></div>
<fieldset><legend>Limits</legend>
<div class="limits">{limits}</div>
<div class="controls"><label><input type="checkbox" id="only"> show only what keeps to them</label>
<button type="button" id="reset">No limits</button></div>
<p id="count" role="status"></p>
</fieldset>
<div class="explore">
<figure><div id="figure-front"></div><figcaption>{_CAPTION}{together}<span id="thinned"></span></figcaption></figure>
<section id="detail" aria-label="Selected candidate" aria-live="polite"></section>
</div>
<noscript><p>The picture and the table of all candidates need JavaScript; that of the front does not.</p></noscript>"""


_CAPTION = (
    "Each marker is a model that was built and measured; select one to see what was done to it and how to export it. "
    "Bars are 95 % intervals: Wilson's of accuracies, and of latencies that of the paired ratio, carried over to the "
    "median in proportion. The line joins the points that are best in this picture alone."
)
_VOLUME_CAPTION = "Higher is better. Failed candidates and those that break a constraint count as evaluations."
_TIME_CAPTION = (
    "The same over time, from the first candidate that was asked for on, without time in which none was under way: the "
    "training of a student counts where it was first asked for; what was interrupted, and what follows the last "
    "candidate, does not. What was in the bank was not made again."
)
_SECOND_CAPTION = " The random search came second and found the students there."
_LADDER_CAPTION = " The plans of the uniform ladder are part of the search, so it never ends below them."
_ONE_RUN_CAPTION = " One run of each is shown; with another seed a small difference may turn around."


def _measured(front: Front) -> str:
    return f"""<p>Accuracy is the share of {front.reference.rows} search rows that the artefact classifies rightly, with
its 95 % Wilson interval. The points were chosen by these rows, so confirm a pick on the held-out test rows.
Divergence is the mean Kullback-Leibler divergence from the uncompressed model's class probabilities on these rows.
Size is the bytes of the artefact's model files, 1 MB = 1,000,000 bytes. Milliseconds are the median time of one call.
The ratio of candidate to reference is that of the lower quartiles of their runs, taken in turn, with its 95 %
bootstrap interval{_ratios(front)}; it is not the quotient of the milliseconds, which disturbed runs move more.</p>"""


def _remarks(notes: Sequence[str]) -> str:
    said = "".join(f"<li>{escape(one_line(note))}</li>" for note in notes)
    return f"<h2>Notes</h2><ul>{said}</ul>" if said else ""


def _ratios(front: Front) -> str:
    """Say how wide the intervals of latencies are at least, and what their ratios are adjusted for, if it was found."""
    drift = max((point.score.latency_drift for point in front.points), default=0.0)
    moved = max((abs(point.score.latency_adjusted - 1) for point in front.points), default=0.0)
    said = ""
    if drift:
        said += f"; on the front none is narrower than ratios drift between two times, {100 * drift:.1f} % (deviation)"
    if moved:
        said += f", and ratios are adjusted to the reference's pace, by {100 * moved:.1f} % at most"
    return said


def _opening(front: Front) -> str:
    reference = front.reference
    first = (
        f"<p>The uncompressed reference has {accuracy_words(reference)} accuracy, {short(size_mb(reference))} MB and "
        f"{short(reference.latency_ms)} ms."
    )
    if not front.points:
        return f"{first} The front is empty: no candidate completed within the constraints.</p>"
    chosen = front.recommended()
    close = any(reference.accuracy - point.score.accuracy <= CLOSE + 1e-9 for point in front.points)
    missed = "" if close else " No point of the front is within 1 percentage point of its accuracy."
    items = "".join(f"<li>{_recommendation(point, names, reference)}</li>" for names, point in chosen)
    count = "1 point" if len(front) == 1 else f"{len(front)} points"
    return f'{first}{missed} The front has {count}; of these, consider:</p>\n<ul class="cards">{items}</ul>'


def _recommendation(point: Candidate, names: Sequence[str], reference: Measurement) -> str:
    score = point.score
    within = " and ".join(name for name in names if name != KNEE)
    labels = [f"{within} within 1 percentage point of accuracy"] if within else []
    label = ", ".join(labels + ["knee of the front"] * (KNEE in names))
    lost = "" if score.drop is None else f", {drop_words(score.drop)} less than the reference's on the same rows"
    return (
        f"<strong>{label[0].upper()}{label[1:]}</strong> {_link(point.number, 'trial ')} with {accuracy_words(score)} "
        f"accuracy{lost}, {short(size_mb(score))} MB ({times_smaller(score, reference)}), {short(score.latency_ms)} ms "
        f'({times_faster(score, interval=True)}). <span class="soft">{escape(one_line(point.plan.words()))}</span>'
    )


def _link(number: int, before: str = "") -> str:
    """Return a button that shows a candidate."""
    return f'<button type="button" class="link" data-trial="{number}">{before}{number}</button>'


def _worth(comparison: Comparison, reference: Measurement, figures: dict[str, go.Figure]) -> str:
    """Return the section that holds the search against the ladder and a random search; adds its figure."""
    heading = "<h2>Was the search worth it?</h2>"
    said = _together(f"<p>{escape(' '.join(sentences(comparison, reference)))}</p>")
    parts = [heading, said]
    if comparison.search:
        caption = _VOLUME_CAPTION
        caption += _LADDER_CAPTION if comparison.ladder else ""
        caption += _ONE_RUN_CAPTION if comparison.random else ""
        figures["volume"] = volume_figure(comparison, reference)
        parts += [
            _table("Search and baselines", HEADINGS, comparison_rows(comparison, reference)),
            _together(f'<p class="soft">{escape(reference_words(comparison, reference))}</p>'),
            _place("volume", caption),
        ]
        if (over_time := time_figure(comparison, reference)) is not None:
            figures["volume-time"] = over_time
            parts.append(_place("volume-time", _TIME_CAPTION + (_SECOND_CAPTION if comparison.random else "")))
    if errors := predictor_words(comparison):
        parts.append(f"<p>How far off the search's own predictors were:</p>\n{_definitions(errors)}")
    return "\n".join(parts)


def _why(candidates: Sequence[Candidate], objectives: Sequence[str], figures: dict[str, go.Figure]) -> str:
    """Return what made candidates good or bad: their plans on the whole, and parameters; adds a figure."""
    parts = []
    if sum(c.usable for c in candidates) > 1:
        parts += ["<h2>Plans at a glance</h2>", _place("parallel", _PARALLEL_CAPTION)]
    if found := importances(candidates, objectives):
        figures["importance"] = importance_figure(found)
        parts += ["<h2>Which parameters mattered</h2>", _place("importance", _IMPORTANCE_CAPTION)]
    return "\n".join(parts)


def _place(name: str, caption: str) -> str:
    return f'<figure><div id="figure-{name}"></div><figcaption>{caption}</figcaption></figure>'


_PARALLEL_CAPTION = (
    "A line for each point of the front and, where there are not too many, for each candidate beside it, coloured by "
    "its accuracy. Drag along an axis to keep a range of it, and again beside the range to let go."
)
_IMPORTANCE_CAPTION = (
    "Share of the variance that a parameter explains by itself, among the candidates that have it (omega squared of a "
    "one-way analysis of variance; sizes and latencies by their logarithm). The search did not draw candidates evenly, "
    "so it tells what made a difference among these."
)


def _together(html: str) -> str:
    """Keep numbers and their units on one line."""
    for unit in ("%", "MB", "ms"):
        html = html.replace(f" {unit}", f"&nbsp;{unit}")
    return html


def _front_rows(front: Front) -> str:
    rows: list[tuple[str | int, ...]] = [(int(row[0]), *row[1:]) for row in front_rows(front)]
    return _table("Pareto front", FRONT_HEADINGS, rows) if rows else "<p>The front is empty.</p>"


def _failures(candidates: Sequence[Candidate]) -> str:
    """Return what went wrong, the most frequent reason first."""
    numbers: dict[str, list[int]] = {}
    for candidate in candidates:
        if candidate.state == "FAIL":
            numbers.setdefault(one_line(candidate.failure or "no reason given"), []).append(candidate.number)
    if not numbers:
        return ""
    ordered = sorted(numbers.items(), key=lambda item: (-len(item[1]), item[1]))
    rows = [(str(len(found)), ", ".join(map(str, found[:_EXAMPLES])), reason) for reason, found in ordered]
    return f"<h2>What failed, and why</h2>\n{_table('Failures', ('candidates', 'trials', 'reason'), rows)}"


_EXAMPLES = 5


def _candidate_rows(candidates: Sequence[Candidate]) -> str:
    """Return the head of the table that the program fills."""
    if not candidates:
        return "<p>No candidate was tried.</p>"
    headings = ("trial", "state", "accuracy, %", "size, MB", "latency ratio", "seconds", "plan or reason of failure")
    table = _table("All candidates", headings, ()).replace("<tbody>", '<tbody id="candidates">')
    return table.replace('class="scroll"', 'class="scroll tall"') + '\n<button type="button" id="more" hidden></button>'


_KINDS = {
    "plan": "words",
    "plan or reason of failure": "words",
    "reason": "words",
    "state": "state",
    "tried": "state",
    "trials": "state",
}
"""Class of a column by its heading, where it does not hold numbers."""


def _table(label: str, headings: Sequence[str], rows: Iterable[Sequence[str | int]]) -> str:
    """Return a table whose columns of plans and reasons hold words that may break; most others hold numbers.

    A cell that is an integer is the number of a candidate, which is shown when it is pressed.
    """
    kinds = [_KINDS.get(heading, "number") for heading in headings]
    head = "".join(f'<th scope="col" class="{k}">{escape(h)}</th>' for k, h in zip(kinds, headings, strict=True))
    lines = []
    for row in rows:
        cells = zip(kinds, row, strict=True)
        lines.append("".join(f'<td class="{kind}">{_cell(cell)}</td>' for kind, cell in cells))
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}"><table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _cell(cell: str | int) -> str:
    return _link(cell) if isinstance(cell, int) else escape(one_line(cell))


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
