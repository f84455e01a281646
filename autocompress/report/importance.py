"""Which parameters of a search decided what: the share of an objective's variance that each explains by itself."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from autocompress.records import OBJECTIVES, Candidate
from autocompress.report.figures import dress
from autocompress.report.tables import one_line

if TYPE_CHECKING:
    import plotly.graph_objects as go

FEWEST = 20
"""Candidates that must have a parameter before anything is said of it."""
SHOWN = 15
"""Parameters in the figure."""
_COLOURS = ("#31688e", "#35b779", "#d98a1f", "#8f5bb0", "#7a8694")


def explained(values: Sequence[Any], results: Sequence[float]) -> float:
    """Return the share of the variance of ``results`` that groups of equal ``values`` explain, within 0..1.

    That is omega squared of a one-way analysis of variance (Hays 1963, "Statistics for Psychologists"), which takes off
    what groups explain by chance: (SSB - (k - 1) MSW) / (SST + MSW) with k groups.
    """
    found = np.asarray(results, dtype=float)
    groups: dict[str, list[int]] = {}
    for place, value in enumerate(values):
        groups.setdefault(repr(value), []).append(place)
    count, total = len(groups), float(((found - found.mean()) ** 2).sum())
    if count < 2 or count >= len(found) or total == 0:
        return 0.0
    within = sum(float(((found[rows] - found[rows].mean()) ** 2).sum()) for rows in groups.values())
    spread = within / (len(found) - count)
    return min(1.0, max(0.0, (total - within - (count - 1) * spread) / (total + spread)))


def importances(candidates: Sequence[Candidate], objectives: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return, by parameter and objective, what it explains among the candidates that have it; the largest first.

    Sizes and latencies count by their logarithm: what is twice as fast is so at either end.

    Args:
        candidates: only those that were measured count, within the constraints or not.
        objectives: by their names in a run file.
    """
    measured = [c for c in candidates if c.measurement is not None and c.params]
    found: dict[str, dict[str, float]] = {}
    for name in sorted({name for c in measured for name in c.params}):
        having = [c for c in measured if name in c.params]
        if len(having) < FEWEST:
            continue
        by_objective = {}
        for objective in objectives:
            field, direction = OBJECTIVES[objective]
            results = np.array([float(getattr(c.score, field)) for c in having])
            scaled = np.log(results) if direction == "minimize" and (results > 0).all() else results
            by_objective[objective] = explained([c.params[name] for c in having], scaled.tolist())
        found[name] = by_objective
    return dict(sorted(found.items(), key=lambda item: -max(item[1].values())))


def importance_figure(found: dict[str, dict[str, float]]) -> go.Figure:
    """Draw the most important parameters as bars, one for each objective.

    Args:
        found: what `importances` returned; not empty.
    """
    import plotly.graph_objects as go

    shown = list(found)[:SHOWN][::-1]  # a horizontal bar chart begins at the bottom
    figure = go.Figure()
    for objective, colour in zip(next(iter(found.values())), _COLOURS, strict=False):
        figure.add_trace(
            go.Bar(
                name=objective.removesuffix("_bytes").replace("_", " "),
                y=[escape(one_line(name), quote=False) for name in shown],
                x=[round(found[name][objective], 4) for name in shown],
                orientation="h",
                marker={"color": colour},
                hovertemplate="%{x:.0%}",
            )
        )
    dress(figure, height=120 + 34 * len(shown))
    figure.update_layout(
        xaxis={"title": {"text": "share of the variance"}, "tickformat": ".0%", "range": [0, 1]},
        yaxis={"automargin": True},
        barmode="group",
    )
    return figure
