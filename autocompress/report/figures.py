"""The figures of a front: accuracy over latency or size, with intervals, hover texts and the reference.

plotly draws a figure's texts as HTML of its own, so whatever comes from outside is escaped here.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from autocompress.front import Front
from autocompress.pareto import nondominated
from autocompress.records import Candidate, Measurement
from autocompress.report.tables import accuracy_words, one_line, short, size_mb, times_faster, times_smaller

if TYPE_CHECKING:
    import plotly.graph_objects as go

FIGURE_HEIGHT = 560
_REMOVED_BUTTONS = [
    "sendChartToCloud",
    "select2d",
    "lasso2d",
    "zoom2d",
    "pan2d",
    "zoomIn2d",
    "zoomOut2d",
    "autoScale2d",
]
_LARGEST_MARKER = 24
"""Diameter in pixels."""
HOVER_CHARACTERS = 44
"""Width at which a plan is broken in a hover label, so that the label fits a page of 400 px."""


@dataclass(frozen=True)
class _View:
    """What a figure shows next to accuracy: the horizontal value, its spread, the colour and the marker's area."""

    x: Callable[[Measurement], float]
    x_title: str
    colour: Callable[[Measurement], float]
    colour_title: str
    spread: Callable[[Measurement], tuple[float, float]] | None = None
    area: Callable[[Measurement], float] | None = None


def _latency_spread(score: Measurement) -> tuple[float, float]:
    """Return how far, in ms, latency reaches below and above its median.

    The interval that was measured is the paired ratio's, in which the machine's drift cancels. It is carried over to
    the median in proportion, so that the bar always holds the point that is drawn.
    """
    unit = score.latency_ms / score.latency_ratio
    low = (score.latency_ratio - score.latency_ratio_low) * unit
    high = (score.latency_ratio_high - score.latency_ratio) * unit
    return max(0.0, low), max(0.0, high)


Over = Literal["latency", "size"]
_VIEWS: dict[Over, _View] = {
    "latency": _View(
        x=lambda score: score.latency_ms,
        x_title="latency, ms (median)",
        colour=size_mb,
        colour_title="size, MB",
        spread=_latency_spread,
        area=size_mb,
    ),
    "size": _View(
        x=size_mb, x_title="size, MB", colour=lambda score: score.latency_ms, colour_title="latency, ms (median)"
    ),
}


def front_figure(front: Front, others: Sequence[Candidate], *, over: Over = "latency") -> go.Figure:
    """Draw accuracy over latency, where marker area and colour are the size, or over size.

    Vertical bars are the Wilson intervals. Horizontal bars are the 95 % interval of the paired ratio to the reference,
    carried over to the median latency in proportion.

    Args:
        front: drawn in colour, its best points in these two axes joined, with its reference as a star.
        others: further candidates, drawn small and grey; failed ones and those on the front are left out.
        over: what accuracy is drawn over.
    """
    import plotly.graph_objects as go

    view = _VIEWS[over]
    figure = go.Figure()
    on_front = {c.number for c in front.points}
    rest = [c for c in others if c.measurement is not None and c.number not in on_front]
    for name, feasible, symbol in (("other candidates", True, "circle"), ("breaks a constraint", False, "x-thin")):
        group = [c for c in rest if c.feasible == feasible]
        if group:
            marker = {"size": 6, "color": "#a8b0ba", "symbol": symbol, "line": {"width": 1.5, "color": "#a8b0ba"}}
            figure.add_trace(_trace(go, name, group, front.reference, view, marker))
    points = sorted(front.points, key=lambda c: view.x(c.score))
    if points:
        marker = _front_marker([c.score for c in points], view)
        trace = _trace(go, "Pareto front", points, front.reference, view, marker)
        _add_bars(trace, [c.score for c in points], view)
        figure.add_trace(trace)
    star = {"symbol": "star", "size": 15, "color": "#d1495b", "line": {"width": 1, "color": "#33363b"}}
    figure.add_trace(
        go.Scatter(
            name="uncompressed reference",
            x=[view.x(front.reference)],
            y=[100 * front.reference.accuracy],
            mode="markers",
            marker=star,
            hovertext=[_score_words(["<b>uncompressed reference</b>"], front.reference, front.reference)],
            hoverinfo="text",
        )
    )
    if points:
        figure.add_trace(_edge(go, points, view))
    bars = "bars: 95 % intervals" + (", horizontal of the paired ratio" if view.spread else "")
    dress(figure, height=FIGURE_HEIGHT)
    figure.update_layout(
        xaxis={
            "title": {"text": f"{view.x_title}<br><span style='font-size:11px'>{bars}</span>"},
            "rangemode": "tozero",
        },
        yaxis={"title": {"text": "accuracy, %"}},
    )
    return figure


def dress(figure: go.Figure, *, height: int) -> None:
    """Give a figure the look that all of a report share.

    Args:
        figure: changed in place.
        height: in pixels.
    """
    figure.update_layout(
        template="plotly_white",
        height=height,
        showlegend=True,
        margin={"l": 62, "r": 24, "t": 40, "b": 24},
        # plotly 7 offers to upload the chart to its cloud by default; a report stays where it is.
        modebar={"remove": _REMOVED_BUTTONS},
        legend={
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": 1.02,
            "yanchor": "bottom",
            "itemsizing": "constant",
        },
        hoverlabel={"align": "left", "bgcolor": "white", "font": {"color": "#1c2430"}},
    )


def _trace(
    go: Any, name: str, group: Sequence[Candidate], reference: Measurement, view: _View, marker: Mapping[str, Any]
) -> Any:
    return go.Scatter(
        name=name,
        x=[view.x(c.score) for c in group],
        y=[100 * c.score.accuracy for c in group],
        mode="markers",
        marker=dict(marker),
        hovertext=[_hover(c, reference) for c in group],
        hoverinfo="text",
    )


def _edge(go: Any, points: Sequence[Candidate], view: _View) -> Any:
    """Join the points that are best in this picture's two axes alone; the others are on the front by a third."""
    shown = np.array([[view.x(c.score), -c.score.accuracy] for c in points])
    best = [c for c, kept in zip(points, nondominated(shown), strict=True) if kept]
    return go.Scatter(
        name="edge",
        x=[view.x(c.score) for c in best],
        y=[100 * c.score.accuracy for c in best],
        mode="lines",
        line={"width": 1.5, "color": "#7a8694"},
        hoverinfo="skip",
        zorder=-1,
        showlegend=False,
    )


def _front_marker(scores: Sequence[Measurement], view: _View) -> dict[str, Any]:
    values = [view.colour(score) for score in scores]
    # Without a span of its own, a colour bar of equal values has no ticks.
    pad = 0.5 if max(values) == min(values) else 0.0
    marker: dict[str, Any] = {
        "color": values,
        "cmin": min(values) - pad,
        "cmax": max(values) + pad,
        "colorscale": "Viridis",
        "size": 11,
        "opacity": 0.9,
        "line": {"width": 1, "color": "#33363b"},
        "colorbar": {
            "title": {"text": view.colour_title, "side": "top"},
            "orientation": "h",
            "y": -0.24,
            "yanchor": "top",
            "thickness": 12,
            "outlinewidth": 0,
        },
    }
    if view.area is not None:
        areas = [view.area(score) for score in scores]
        marker |= {"size": areas, "sizemode": "area", "sizeref": 2 * max(areas) / _LARGEST_MARKER**2, "sizemin": 3}
    return marker


def _add_bars(trace: Any, scores: Sequence[Measurement], view: _View) -> None:
    style = {"type": "data", "symmetric": False, "thickness": 1, "width": 3, "color": "rgba(70, 80, 95, 0.45)"}
    trace.error_y = {
        **style,
        "array": [100 * max(0.0, s.accuracy_high - s.accuracy) for s in scores],
        "arrayminus": [100 * max(0.0, s.accuracy - s.accuracy_low) for s in scores],
    }
    if view.spread is not None:
        spreads = [view.spread(s) for s in scores]
        trace.error_x = {**style, "array": [high for _, high in spreads], "arrayminus": [low for low, _ in spreads]}


def _hover(candidate: Candidate, reference: Measurement) -> str:
    words = textwrap.wrap(one_line(candidate.plan.words()), HOVER_CHARACTERS)
    # plotly reads a hover text as HTML but knows no &quot;.
    lines = [f"<b>trial {candidate.number}</b>", *(escape(line, quote=False) for line in words)]
    if not candidate.feasible:
        lines.append("breaks a constraint")
    return _score_words(lines, candidate.score, reference)


def _score_words(lines: Sequence[str], score: Measurement, reference: Measurement) -> str:
    below, above = _latency_spread(score)
    said = [*lines, f"accuracy {accuracy_words(score)}", f"{short(size_mb(score))} MB"]
    latency = f"{short(score.latency_ms)} ms"
    if score is not reference:
        said[-1] += f" ({times_smaller(score, reference)})"
        latency = f"{latency} ({score.latency_ms - below:.3g} to {score.latency_ms + above:.3g} by the paired ratio)"
        latency = f"{latency}<br>{times_faster(score, interval=True)}"
    return "<br>".join([*said, latency])
