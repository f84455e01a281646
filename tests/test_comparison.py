"""What is said of a search that gains much, little or nothing over its ladder and over a random search."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import pytest
from helpers_records import make_candidate, make_reference

from autocompress.pareto import volume, volume_curve
from autocompress.records import Candidate
from autocompress.report.comparison import (
    HEADINGS,
    Comparison,
    comparison_rows,
    evaluations_until,
    minutes,
    predictor_words,
    reference_words,
    sentences,
    time_figure,
    volume_figure,
)

MAJORITY = 0.6


def candidates_with(volumes: Sequence[float], *, uniform: int = 0) -> list[Candidate]:
    """Return candidates that cover these volumes alone, 0 for a failed one; the first ``uniform`` are the ladder.

    They differ in accuracy only, at half the size and half the latency, so the largest volume is that of all together.
    """
    return [
        make_candidate(
            number,
            accuracy=MAJORITY + 4 * share * (1 - MAJORITY),
            size_bytes=45_000_000,
            ratio=0.5,
            state="COMPLETE" if share else "FAIL",
            origin="uniform" if number < uniform else "sampler",
        )
        for number, share in enumerate(volumes)
    ]


def said(comparison: Comparison) -> str:
    return " ".join(sentences(comparison, make_reference()))


def rows(comparison: Comparison) -> list[tuple[str, ...]]:
    return comparison_rows(comparison, make_reference())


def test_the_numbers_of_a_search_that_was_worth_it() -> None:
    search = candidates_with([0.05, 0.1, 0.0, 0.12, 0.2], uniform=2)
    comparison = Comparison(MAJORITY, search, random=candidates_with([0.01, 0.12, 0.0, 0.03, 0.04]))
    assert rows(comparison) == [
        ("search", "5", "0.200", "", ""),
        ("uniform ladder", "2", "0.100", "2.00", ""),
        ("random search", "5", "0.120", "1.67", "4"),
    ]
    assert all(len(row) == len(HEADINGS) for row in rows(comparison))
    ladder, random = sentences(comparison, make_reference())
    assert ladder == (
        "The search covers 2.00 times the hypervolume of the uniform ladder (2 plans that treat every layer alike, as "
        "a careful person would try by hand): 0.200 after 5 evaluations against 0.100."
    )
    assert random == (
        "The search covers 1.67 times that of a random search, 0.200 against 0.120 after the same 5 evaluations, and "
        "got there after 4."
    )


def test_a_search_that_adds_nothing_to_its_ladder_says_so() -> None:
    text = said(Comparison(MAJORITY, candidates_with([0.1, 0.05], uniform=1)))
    assert text.startswith("The search covers no more than the uniform ladder (1 plan that treats every layer alike")
    assert "0.100 after 2 evaluations against 0.100" in text
    assert text.endswith("No random search was run to hold it against.")


def test_a_random_search_that_did_better_is_admitted() -> None:
    comparison = Comparison(MAJORITY, candidates_with([0.1, 0.1], uniform=1), candidates_with([0.05, 0.2]))
    assert "only 0.50 times that of a random search, 0.100 against 0.200 after the same 2" in said(comparison)
    assert said(comparison).endswith("and never got there: choosing at random did better.")
    assert rows(comparison)[-1] == ("random search", "2", "0.200", "0.50", "never")


def test_a_random_search_that_did_as_well_is_admitted() -> None:
    same = candidates_with([0.05, 0.1], uniform=1)
    comparison = Comparison(MAJORITY, same, same)
    assert said(comparison).endswith("choosing at random would have done.")
    assert rows(comparison)[-1] == ("random search", "2", "0.100", "1.00", "2")


def test_searches_of_different_length_are_compared_after_as_many_evaluations() -> None:
    long, short = candidates_with([0.05, 0.1, 0.2], uniform=1), candidates_with([0.08, 0.08])
    assert rows(Comparison(MAJORITY, long, short)) == [
        ("search", "3", "0.200", "", ""),
        ("search, first 2", "2", "0.100", "", ""),
        ("uniform ladder", "1", "0.050", "4.00", ""),
        ("random search", "2", "0.080", "1.25", "2"),
    ]
    assert "1.25 times that of a random search, 0.100 against 0.080 after the same 2" in said(
        Comparison(MAJORITY, long, short)
    )
    assert rows(Comparison(MAJORITY, short, long))[-1] == ("random search, first 2", "2", "0.100", "0.80", "never")


def test_a_search_without_uniform_plans_has_no_ladder() -> None:
    comparison = Comparison(MAJORITY, candidates_with([0.1]))
    assert rows(comparison) == [("search", "1", "0.100", "", "")]
    assert "0.100 after 1 evaluation; it tried no uniform plan" in said(comparison)
    assert [trace.name for trace in volume_figure(comparison, make_reference()).data] == ["search"]


def test_no_candidate_at_all() -> None:
    comparison = Comparison(MAJORITY, [], random=candidates_with([0.1]))
    assert rows(comparison) == []
    assert said(comparison) == "The search tried no candidate, so there is nothing to compare."
    assert list(volume_figure(Comparison(MAJORITY, []), make_reference()).data[0].y) == [0.0]


def test_a_random_search_without_candidates_is_no_baseline() -> None:
    comparison = Comparison(MAJORITY, candidates_with([0.1]), random=[])
    assert said(comparison).endswith("The random search tried no candidate.")
    assert len(rows(comparison)) == 1


def test_no_volume_divides_nothing() -> None:
    nothing = Comparison(MAJORITY, candidates_with([0.0, 0.0], uniform=1), candidates_with([0.0, 0.0]))
    assert [row[2:] for row in rows(nothing)] == [("0.000", "", ""), ("0.000", "-", ""), ("0.000", "-", "0")]
    assert "has no candidate that counts, and neither has the search after 2 evaluations." in said(nothing)
    assert "A random search has no candidate that counts after the same 2 evaluations" in said(nothing)
    something = Comparison(MAJORITY, candidates_with([0.0, 0.1], uniform=1), candidates_with([0.0, 0.0]))
    assert "counts; the search covers a hypervolume of 0.100 after 2 evaluations." in said(something)
    assert "after the same 2 evaluations; the search covers 0.100." in said(something)
    one_class = Comparison(1.0, candidates_with([0.1, 0.1], uniform=1), candidates_with([0.1]))
    assert rows(one_class)[0][2] == "0.000"
    assert "neither has the search" in said(one_class)


def test_a_tiny_volume_and_a_huge_ratio_stay_readable() -> None:
    comparison = Comparison(MAJORITY, candidates_with([0.0001, 0.2], uniform=1))
    assert rows(comparison)[1] == ("uniform ladder", "1", "0.0001", "2000", "")


def test_infeasible_candidates_count_as_evaluations_only() -> None:
    good = make_candidate(1, accuracy=0.9, size_bytes=9_000_000, ratio=0.1, feasible=False)
    comparison = Comparison(MAJORITY, [*candidates_with([0.1], uniform=1), good])
    assert rows(comparison)[0][1:3] == ("2", "0.100")


@pytest.mark.parametrize(
    ("value", "wanted"), [(0.0, 0), (-1.0, 0), (0.1, 1), (0.1 + 1e-12, 1), (0.15, 3), (0.2, 3), (0.3, None)]
)
def test_evaluations_until_a_value_is_reached(value: float, wanted: int | None) -> None:
    assert evaluations_until([0.1, 0.1, 0.2], value) == wanted
    assert evaluations_until([], 0.1) is None


def test_the_reference_point_is_stated() -> None:
    text = reference_words(Comparison(0.512, []), make_reference())
    assert "51.2 % accuracy" in text
    assert "90.0 MB and latency ratio of 1" in text


def test_errors_of_predictors_are_shown_in_percent() -> None:
    comparison = Comparison(MAJORITY, [], predictor={"latency": 0.0214, "accuracy": float("nan")})
    assert predictor_words(comparison) == {"latency": "2.1 %", "accuracy": "not known"}
    assert predictor_words(Comparison(MAJORITY, [])) == {}


def traces(comparison: Comparison) -> dict[str, dict[str, Any]]:
    figure = volume_figure(comparison, make_reference())
    return {trace["name"]: trace for trace in json.loads(figure.to_json(engine="json"))["data"]}


def test_the_figure_draws_both_curves_from_nothing_and_the_ladder_over_the_longer() -> None:
    search, random = candidates_with([0.05, 0.1, 0.2], uniform=2), candidates_with([0.02, 0.02, 0.02, 0.08])
    drawn = traces(Comparison(MAJORITY, search, random))
    assert list(drawn) == ["uniform ladder", "random search", "search"], "the search is drawn last, so on top"
    assert drawn["search"]["y"] == pytest.approx([0, 0.05, 0.1, 0.2])
    assert drawn["random search"]["y"] == pytest.approx([0, 0.02, 0.02, 0.02, 0.08])
    assert drawn["uniform ladder"]["y"] == pytest.approx([0.1] * 5)
    assert all(trace["line"]["shape"] == "hv" and trace["x0"] == 0 and trace["dx"] == 1 for trace in drawn.values())
    ranks = {name: trace["legendrank"] for name, trace in drawn.items()}
    assert ranks["search"] < ranks["random search"] < ranks["uniform ladder"]


def test_the_figure_looks_like_the_others_and_offers_no_upload() -> None:
    layout = volume_figure(Comparison(MAJORITY, candidates_with([0.1])), make_reference()).layout
    assert layout.xaxis.title.text == "evaluations"
    assert layout.yaxis.title.text == "hypervolume"
    assert layout.xaxis.dtick == 1, "no ticks between whole evaluations"
    assert "sendChartToCloud" in layout.modebar.remove


def test_rows_and_figure_agree_with_the_volumes() -> None:
    search = candidates_with([0.05, 0.0, 0.13], uniform=1)
    comparison, reference = Comparison(MAJORITY, search), make_reference()
    assert comparison.ladder == (search[0],)
    assert rows(comparison)[0][2] == f"{volume(search, reference, MAJORITY):.3f}"
    assert traces(comparison)["search"]["y"][1:] == pytest.approx(volume_curve(search, reference, MAJORITY), abs=1e-6)


def timed(candidates: Sequence[Candidate], spans: Sequence[tuple[float, float]]) -> list[Candidate]:
    return [dataclasses.replace(c, span=span) for c, span in zip(candidates, spans, strict=True)]


def test_minutes_are_those_in_which_candidates_were_under_way() -> None:
    # Two at a time, of which the second is done first; a night later, another command.
    spans = [(1000.0, 1120.0), (1000.0, 1060.0), (1060.0, 1180.0), (40_000.0, 40_030.0), (40_030.0, 40_060.0)]
    found = minutes(timed(candidates_with([0.1] * 5), spans))
    assert found == pytest.approx([2.0, 1.0, 3.0, 3.5, 4.0])
    assert minutes([]) is None
    assert minutes(candidates_with([0.1])) is None
    unknown, known = candidates_with([0.1, 0.1])
    assert minutes([unknown, *timed([known], [(60.0, 120.0)]), unknown]) == [0.0, 1.0, 1.0]


def test_hypervolume_over_time_is_in_the_order_in_which_candidates_were_there() -> None:
    search = timed(candidates_with([0.2, 0.1, 0.0]), [(0.0, 120.0), (0.0, 60.0), (60.0, 180.0)])
    figure = time_figure(Comparison(MAJORITY, search, random=candidates_with([0.1])), make_reference())
    assert figure is not None
    [trace] = figure.data  # of the random search no times are known
    assert trace.name == "search"
    assert list(trace.x) == pytest.approx([0, 1, 2, 3])
    assert list(trace.y) == pytest.approx([0, 0.1, 0.2, 0.2])
    same = timed(candidates_with([0.2] + [0.1] * 9), [(0.0, 60.0 * n) for n in range(1, 11)])
    short = time_figure(Comparison(MAJORITY, same), make_reference())
    assert short is not None
    assert list(short.data[0].x) == [0, 1, 10], "where nothing changes the line goes on by itself"
    both = time_figure(Comparison(MAJORITY, search, random=search[:1]), make_reference())
    assert both is not None
    assert [trace.name for trace in both.data] == ["random search", "search"]
    ladder = dataclasses.replace(search[1], origin="uniform")
    level = time_figure(Comparison(MAJORITY, [search[0], ladder]), make_reference())
    assert level is not None
    assert [trace.name for trace in level.data] == ["uniform ladder", "search"]
    assert [tuple(level.data[0].x), tuple(level.data[0].y)] == [(0, 2), pytest.approx((0.1, 0.1))]
    assert time_figure(Comparison(MAJORITY, candidates_with([0.1])), make_reference()) is None
