"""What a parameter explains, against values computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers_records import make_candidate

from autocompress.report.importance import FEWEST, explained, importance_figure, importances


def test_two_groups_by_hand() -> None:
    # Means 1.5, 3.5 and 2.5: SST 5, SSB 4, SSW 1, so MSW is 1/2 and omega squared (4 - 1/2) / (5 + 1/2).
    assert explained(["a", "a", "b", "b"], [1.0, 2.0, 3.0, 4.0]) == pytest.approx(3.5 / 5.5)


def test_what_makes_no_difference_explains_nothing() -> None:
    assert explained(["a", "b", "a", "b"], [1.0, 1.0, 2.0, 2.0]) == 0
    assert explained(["a", "a", "a"], [1.0, 2.0, 3.0]) == 0, "one group"
    assert explained(["a", "b", "c"], [1.0, 2.0, 3.0]) == 0, "as many groups as results"
    assert explained(["a", "a", "b", "b"], [1.0, 1.0, 1.0, 1.0]) == 0, "nothing to explain"


def test_what_decides_everything_explains_everything() -> None:
    assert explained([1, 1, 2, 2], [0.5, 0.5, 0.9, 0.9]) == pytest.approx(1)


def test_chance_is_taken_off() -> None:
    rng = np.random.default_rng(0)
    found = [explained(rng.integers(0, 5, 60).tolist(), rng.normal(size=60).tolist()) for _ in range(200)]
    assert np.mean(found) < 0.03, "eta squared would say 4 / 59 in the mean"


def test_parameters_are_judged_where_they_are_and_the_largest_comes_first() -> None:
    candidates = [
        make_candidate(
            n,
            accuracy=0.7 + 0.1 * (n % 2),
            ratio=math.exp(-(n % 4 // 2)) / 2,
            params={"bits": n % 2, "heads": n % 4 // 2, **({"rare": n} if n < FEWEST - 1 else {})},
        )
        for n in range(40)
    ]
    found = importances(candidates, ("latency", "accuracy"))
    assert set(found) == {"bits", "heads"}, "too few have the other"
    assert found["bits"] == pytest.approx({"latency": 0, "accuracy": 1})
    assert found["heads"] == pytest.approx({"latency": 1, "accuracy": 0})
    figure = importance_figure(found)
    assert [trace.name for trace in figure.data] == ["latency", "accuracy"]
    assert sorted(figure.data[0].y) == ["bits", "heads"]


def test_failed_candidates_and_those_from_elsewhere_do_not_count() -> None:
    failed = [make_candidate(n, state="FAIL", params={"bits": n % 2}) for n in range(40)]
    assert importances([*failed, *(make_candidate(n) for n in range(40, 80))], ("accuracy",)) == {}


def test_a_name_is_no_markup() -> None:
    figure = importance_figure({"<b>bits": {"accuracy": 0.5}})
    assert list(figure.data[0].y) == ["&lt;b&gt;bits"]
