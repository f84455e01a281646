"""Whether the search was worth it: its hypervolume next to what a careful person would have tried by hand.

The page and its reader get three things from here: rows of a table, a figure and plain sentences. What a search is held
against is the uniform ladder, plans that treat every layer alike, and, where one was run, a random search with as many
evaluations, which is hard to beat in a small space (Bergstra and Bengio, "Random Search for Hyper-Parameter
Optimization", JMLR 13, 2012).
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autocompress.decisions import Student
from autocompress.pareto import volume, volume_curve
from autocompress.records import Candidate, Measurement
from autocompress.report.figures import dress
from autocompress.report.tables import short, size_mb

if TYPE_CHECKING:
    import plotly.graph_objects as go

VOLUME_HEIGHT = 420
"""Height of the figure in pixels."""
HEADINGS = ("tried", "evaluations", "hypervolume", "search, as multiple", "search reached it after")
"""What the columns of `comparison_rows` hold."""
_ROUNDING = 1e-9
_SAME = 0.005
"""Ratios that differ from 1 by less are called the same: two decimals would show 1.00."""


@dataclass(frozen=True)
class Comparison:
    """What a search is held against.

    Args:
        majority: share of the scored rows that have the most frequent class.
        search: in order of number, all but recovered ones; those of origin ``uniform`` are the ladder.
        random: those of the random baseline in order of number, None if there was none.
        predictor: error of a predictor by its name, as a share (0.021 is shown as 2.1 %).
    """

    majority: float
    search: Sequence[Candidate]
    random: Sequence[Candidate] | None = None
    predictor: Mapping[str, float] | None = None

    @property
    def ladder(self) -> tuple[Candidate, ...]:
        """The candidates that treat every layer alike, failed ones too."""
        return tuple(c for c in self.search if c.origin == "uniform")

    @property
    def untrained_ladder(self) -> tuple[Candidate, ...]:
        """Those of the ladder that take no training: the full model's bits, widths, ranks, depths, inputs."""
        return tuple(c for c in self.ladder if not c.plan.of_type(Student))


def comparison_rows(comparison: Comparison, reference: Measurement) -> list[tuple[str, ...]]:
    """Return the rows of a table with `HEADINGS`; empty if the search tried nothing.

    A random search is compared after as many evaluations as both have.

    Args:
        comparison: the search and what it is held against.
        reference: score of the uncompressed model in the same runtime.
    """
    if not comparison.search:
        return []
    curve = volume_curve(comparison.search, reference, comparison.majority)
    rows: list[tuple[str, ...]] = [("search", str(len(curve)), _volume_words(curve[-1]), "", "")]
    random, shared = _random(comparison, reference)
    if 0 < shared < len(curve):
        rows.append((f"search, first {shared}", str(shared), _volume_words(curve[shared - 1]), "", ""))
    ladders = {"uniform ladder": comparison.ladder}
    if comparison.untrained_ladder != comparison.ladder:
        ladders["uniform ladder without students"] = comparison.untrained_ladder
    for name, plans in ladders.items():
        if plans:
            ladder = volume(plans, reference, comparison.majority)
            rows.append((name, str(len(plans)), _volume_words(ladder), _ratio_words(curve[-1], ladder), ""))
    if shared:
        there = random[shared - 1]
        name = "random search" if shared == len(random) else f"random search, first {shared}"
        reached = evaluations_until(curve, there)
        said = _ratio_words(curve[shared - 1], there)
        rows.append((name, str(shared), _volume_words(there), said, "never" if reached is None else str(reached)))
    return rows


def evaluations_until(curve: Sequence[float], value: float) -> int | None:
    """Return after how many evaluations a curve of volumes reaches ``value``, None if it never does."""
    if value <= 0:
        return 0
    return next((n for n, covered in enumerate(curve, 1) if covered >= value - _ROUNDING), None)


def sentences(comparison: Comparison, reference: Measurement) -> list[str]:
    """Say as plain text what the search gained over the ladder and over a random search; arguments as for the rows."""
    if not comparison.search:
        return ["The search tried no candidate, so there is nothing to compare."]
    curve = volume_curve(comparison.search, reference, comparison.majority)
    said = [_against_ladder(comparison, reference, curve[-1])]
    if comparison.random is None:
        return [*said, "No random search was run to hold it against."]
    random, shared = _random(comparison, reference)
    if not shared:
        return [*said, "The random search tried no candidate."]
    return [*said, _against_random(curve, random[shared - 1], shared)]


def reference_words(comparison: Comparison, reference: Measurement) -> str:
    """Say as plain text in which box the hypervolume is taken; arguments as for the rows."""
    return (
        "Hypervolume is the share of the box between the reference point and a perfect model that all candidates "
        "within the constraints cover together. "
        f"The reference point has {100 * comparison.majority:.1f} % accuracy, as by always guessing the most frequent "
        f"class, and the uncompressed model's {short(size_mb(reference))} MB and latency ratio of 1; a perfect model "
        "has 100 % accuracy, no size and no latency. "
        "A candidate that is not better than the reference point in all three adds nothing."
    )


def predictor_words(comparison: Comparison) -> dict[str, str]:
    """Say the errors of the predictors in percent, by name."""
    return {
        name: f"{100 * share:.1f} %" if math.isfinite(share) else "not known"
        for name, share in (comparison.predictor or {}).items()
    }


def volume_figure(comparison: Comparison, reference: Measurement) -> go.Figure:
    """Draw the hypervolume over evaluations: search and random search as steps, the ladder's as a level line.

    Args:
        comparison: the search and what it is held against.
        reference: score of the uncompressed model in the same runtime.
    """
    import plotly.graph_objects as go

    majority = comparison.majority
    curves = {"search": volume_curve(comparison.search, reference, majority)}
    if comparison.random:
        curves["random search"] = volume_curve(comparison.random, reference, majority)
    longest = max(len(curve) for curve in curves.values())
    lines = {name: [0.0, *curve] for name, curve in curves.items()}
    if comparison.ladder:
        # A value at every evaluation, so that the hover label always names the ladder too.
        lines["uniform ladder"] = [volume(comparison.ladder, reference, majority)] * (longest + 1)
    figure = go.Figure()
    for name, style in _LINES.items():
        if name in lines:
            figure.add_trace(
                go.Scatter(
                    name=name,
                    x0=0,
                    dx=1,
                    y=[round(value, 6) for value in lines[name]],
                    mode="lines",
                    line={"shape": "hv", **style},
                    hovertemplate="%{y:.3f}",
                    # The legend begins with the search, the drawing ends with it.
                    legendrank=len(lines) - len(figure.data),
                )
            )
    dress(figure, height=VOLUME_HEIGHT)
    ticks = {"dtick": 1} if longest <= 10 else {}
    figure.update_layout(
        hovermode="x unified",
        xaxis={"title": {"text": "evaluations"}, "rangemode": "tozero", "tickformat": "d", **ticks},
        yaxis={"title": {"text": "hypervolume"}, "rangemode": "tozero"},
    )
    return figure


def minutes(candidates: Sequence[Candidate]) -> list[float] | None:
    """Return after how many minutes of searching each of ``candidates`` was there, in their order.

    Time in which none was asked for and not yet told, as between two commands, does not count. One of which no times
    are known, as where a clock was set back, was there with the one before it. None where no times are known at all.
    """
    spans = [c.span for c in candidates if c.span is not None]
    if not spans:
        return None
    starts, ends = list[float](), list[float]()  # of time in which candidates were under way
    for began, ended in sorted(spans):
        if not starts or began > ends[-1]:
            starts.append(began)
            ends.append(ended)
        ends[-1] = max(ends[-1], ended)
    before = [0.0, *itertools.accumulate(end - start for start, end in zip(starts, ends, strict=True))]
    found: list[float] = []
    for candidate in candidates:
        if candidate.span is None:
            found.append(found[-1] if found else 0.0)
        else:
            ended = candidate.span[1]
            number = bisect.bisect_left(ends, ended)
            found.append((before[number] + ended - starts[number]) / 60)
    return found


def time_figure(comparison: Comparison, reference: Measurement) -> go.Figure | None:
    """Draw the hypervolume over the minutes that it took, training on the way included; None where they are not known.

    Args:
        comparison: the search and what it is held against.
        reference: score of the uncompressed model in the same runtime.
    """
    import plotly.graph_objects as go

    lines: dict[str, tuple[list[float], list[float]]] = {}
    for name, tried in (("search", comparison.search), ("random search", comparison.random or ())):
        if (taken := minutes(tried)) is not None:
            order = sorted(range(len(tried)), key=taken.__getitem__)
            curve = volume_curve([tried[n] for n in order], reference, comparison.majority)
            line = [(0.0, 0.0), *zip((taken[n] for n in order), curve, strict=True)]
            # Where nothing changes the line goes on by itself: thousands of candidates add little to a front.
            shown = [at for n, at in enumerate(line) if n in (0, len(line) - 1) or at[1] != line[n - 1][1]]
            lines[name] = [x for x, _ in shown], [y for _, y in shown]
    if "search" not in lines:
        return None
    if comparison.ladder:
        longest = max(x[-1] for x, _ in lines.values())
        lines["uniform ladder"] = [0.0, longest], [volume(comparison.ladder, reference, comparison.majority)] * 2
    figure = go.Figure()
    for name, style in _LINES.items():
        if name in lines:
            x, y = lines[name]
            figure.add_trace(
                go.Scatter(
                    name=name,
                    x=[round(value, 3) for value in x],
                    y=[round(value, 6) for value in y],
                    mode="lines",
                    line={"shape": "hv", **style},
                    hovertemplate="%{y:.3f} after %{x:.1f} minutes",
                    legendrank=len(lines) - len(figure.data),
                )
            )
    dress(figure, height=VOLUME_HEIGHT)
    figure.update_layout(
        xaxis={"title": {"text": "minutes of searching"}, "rangemode": "tozero"},
        yaxis={"title": {"text": "hypervolume"}, "rangemode": "tozero"},
        showlegend=True,
    )
    return figure


# In the order of drawing, so that the search is never hidden.
_LINES = {
    "uniform ladder": {"width": 2, "color": "#7a8694", "dash": "6px,4px"},
    "random search": {"width": 2, "color": "#d98a1f"},
    "search": {"width": 3, "color": "#31688e"},
}


def _random(comparison: Comparison, reference: Measurement) -> tuple[list[float], int]:
    """Return the random search's curve and the number of evaluations that it has in common with the search."""
    curve = volume_curve(comparison.random or (), reference, comparison.majority)
    return curve, min(len(curve), len(comparison.search))


def _against_ladder(comparison: Comparison, reference: Measurement, covered: float) -> str:
    after = f"after {_count(len(comparison.search), 'evaluation')}"
    if not comparison.ladder:
        return (
            f"The search covers a hypervolume of {_volume_words(covered)} {after}; it tried no uniform plan, so it "
            "cannot be held against what a person would try by hand."
        )
    ladder = volume(comparison.ladder, reference, comparison.majority)
    plans = (
        f"the uniform ladder ({_count(len(comparison.ladder), 'plan')} that treat every layer alike, as a careful "
        "person would try by hand)"
    )
    if len(comparison.ladder) == 1:
        plans = plans.replace("treat ", "treats ")
    if ladder <= 0:
        nothing = f"{plans[0].upper()}{plans[1:]} has no candidate that counts"
        if covered <= 0:
            return f"{nothing}, and neither has the search {after}."
        return f"{nothing}; the search covers a hypervolume of {_volume_words(covered)} {after}."
    numbers = f"{_volume_words(covered)} {after} against {_volume_words(ladder)}"
    if covered / ladder < 1 + _SAME:
        return f"The search covers no more than {plans}: {numbers}."
    return f"The search covers {_ratio_words(covered, ladder)} times the hypervolume of {plans}: {numbers}."


def _against_random(curve: Sequence[float], there: float, shared: int) -> str:
    after = f"after the same {_count(shared, 'evaluation')}"
    covered = curve[shared - 1]
    if there <= 0:
        found = ", and neither has the search" if covered <= 0 else f"; the search covers {_volume_words(covered)}"
        return f"A random search has no candidate that counts {after}{found}."
    numbers = f"{_volume_words(covered)} against {_volume_words(there)} {after}"
    ratio = covered / there
    if abs(ratio - 1) < _SAME:
        return f"The search covers as much as a random search, {numbers}: choosing at random would have done."
    reached = evaluations_until(curve, there)
    arrival = "never got there" if reached is None else f"got there after {reached}"
    only, verdict = ("", "") if ratio > 1 else ("only ", ": choosing at random did better")
    times = f"{only}{_ratio_words(covered, there)} times"
    return f"The search covers {times} that of a random search, {numbers}, and {arrival}{verdict}."


def _volume_words(value: float) -> str:
    return f"{value:.3f}" if value >= 0.01 or value <= 0 else f"{value:.2g}"


def _ratio_words(covered: float, other: float) -> str:
    if other <= 0:
        return "-"
    ratio = covered / other
    return f"{ratio:.2f}" if ratio < 100 else f"{ratio:.0f}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
