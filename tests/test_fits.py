"""Fits: weights are the best that are not negative, and latencies are those of confirmed points."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from autocompress.fits import FEWEST, Fit, effects, latency_fit, nonnegative, relative_fit


def problems() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    for rows, columns in ((12, 1), (20, 3), (30, 6), (15, 8)):
        inputs = rng.normal(size=(rows, columns))
        yield inputs, inputs @ rng.normal(size=columns) + 0.1 * rng.normal(size=rows)
        yield np.abs(inputs), np.abs(inputs) @ np.abs(rng.normal(size=columns)) + 0.1 * rng.normal(size=rows)


def residual(inputs: np.ndarray, outputs: np.ndarray, weights: np.ndarray) -> float:
    return float(np.square(outputs - inputs @ weights).sum())


def best_of_all_subsets(inputs: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """Return the non-negative least-squares weights: the best unconstrained fit of a subset that is not negative."""
    count = inputs.shape[1]
    best = np.zeros(count)
    for size in range(1, count + 1):
        for chosen in itertools.combinations(range(count), size):
            fitted, *_ = np.linalg.lstsq(inputs[:, chosen], outputs, rcond=None)
            weights = np.zeros(count)
            weights[list(chosen)] = fitted
            if (fitted >= 0).all() and residual(inputs, outputs, weights) < residual(inputs, outputs, best):
                best = weights
    return best


def test_nonnegative_weights_are_the_best_of_all_subsets() -> None:
    for inputs, outputs in problems():
        found = nonnegative(inputs, outputs)
        assert (found >= 0).all()
        assert found == pytest.approx(best_of_all_subsets(inputs, outputs), abs=1e-5)


def test_nonnegative_weights_are_scipys() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    for inputs, outputs in problems():
        expected, _ = optimize.nnls(inputs, outputs)
        assert nonnegative(inputs, outputs) == pytest.approx(expected, abs=1e-5)


def test_a_column_of_zeros_has_no_weight() -> None:
    inputs = np.column_stack([np.zeros(10), np.arange(10.0)])
    assert nonnegative(inputs, 2 * np.arange(10.0)) == pytest.approx([0, 2])


def test_latencies_are_fitted_as_they_are_once_confirmed() -> None:
    rng = np.random.default_rng(0)
    work = np.column_stack([np.ones(120), rng.uniform(0, 1, 120)])
    true = work @ np.array([0.1, 0.8])
    confirmed = np.arange(120) % 4 == 0
    searched = 1.1 * true * rng.lognormal(0, 0.05, 120)
    # Confirmed are those that seemed fast in the search, which says nothing of what they are like once confirmed.
    ratios = np.where(confirmed, true * rng.lognormal(0, 0.01, 120), searched)
    found, alike = latency_fit(work, ratios, confirmed)
    assert alike[confirmed] == pytest.approx(ratios[confirmed])
    assert np.median(alike / true) == pytest.approx(1, abs=0.02)
    assert work @ found.weights == pytest.approx(true, rel=0.03)


@pytest.mark.parametrize("count", [0, FEWEST - 1, 120])
def test_without_enough_of_both_kinds_latencies_are_taken_as_they_are(count: int) -> None:
    work = np.column_stack([np.ones(120), np.linspace(0, 1, 120)])
    ratios = work @ np.array([0.1, 0.8])
    found, alike = latency_fit(work, ratios, np.arange(120) < count)
    assert alike == pytest.approx(ratios)
    assert work @ found.weights == pytest.approx(ratios, rel=1e-3)
    assert found.spread < 1e-3


def test_latencies_that_were_disturbed_hardly_move_a_fit() -> None:
    rng = np.random.default_rng(1)
    work = np.column_stack([np.ones(200), rng.uniform(0, 1, 200)])
    true = work @ np.array([0.1, 0.8])
    disturbed = np.where(np.arange(200) % 8 == 0, 1.4, 1.0) * rng.lognormal(0, 0.01, 200)
    found = relative_fit(work, true * disturbed)
    assert work @ found.weights == pytest.approx(true, rel=0.01)


def test_a_fit_goes_on_from_an_earlier_one() -> None:
    rng = np.random.default_rng(2)
    work = np.column_stack([np.ones(200), rng.uniform(0, 1, (200, 3))])
    ratios = work @ np.array([0.1, 0.5, 0.0, 0.3]) * rng.lognormal(0, 0.1, 200)
    known = None
    for count in range(150, 201):
        known = relative_fit(work[:count], ratios[:count], known)
    assert known is not None
    assert work @ known.weights == pytest.approx(work @ relative_fit(work, ratios).weights, rel=0.005)


def test_what_was_timed_anew_counts_for_more() -> None:
    work = np.column_stack([np.ones(120), np.linspace(0, 1, 120)])
    confirmed = np.arange(120) % 2 == 0
    # What no factor between the two makes up for.
    ratios = np.where(confirmed, work @ np.array([0.12, 0.77]), work @ np.array([0.1, 0.8]))

    def off(found: Fit) -> float:
        return float(np.abs(work @ found.weights / ratios - 1)[confirmed].mean())

    alike = relative_fit(work, ratios)
    found, _ = latency_fit(work, ratios, confirmed)
    sure = relative_fit(work, ratios, sure=np.where(confirmed, 1.0, 0.01))
    assert off(sure) < 0.1 * off(alike)
    assert off(sure) < off(found) < 0.95 * off(alike)


def parts(rng: np.random.Generator, rows: int = 200, kinds: int = 12) -> np.ndarray:
    """Return shares of parts of which each row has three."""
    shares = np.zeros((rows, kinds))
    for row in shares:
        row[rng.choice(kinds - 1, size=3, replace=False)] = 0.25
    return shares


def test_parts_that_a_fit_does_not_see_are_found() -> None:
    rng = np.random.default_rng(3)
    shares, true = parts(rng), np.zeros(12)
    true[[2, 5]] = 0.4, -0.2
    confirmed = np.arange(200) % 3 == 0
    found = effects(shares, shares @ true + rng.normal(0, 0.03, 200), confirmed)
    assert found[[2, 5]] == pytest.approx([0.4, -0.2], abs=0.1)
    assert np.abs(np.delete(found, [2, 5])).max() < 0.1
    assert found[11] == 0, "what no row has"
    assert np.abs(shares @ (found - true)).mean() < 0.3 * np.abs(shares @ true).mean()


@pytest.mark.parametrize("noise", [0.02, 0.045, 0.13])
@pytest.mark.parametrize("seed", range(5))
def test_noise_is_not_taken_for_effects(noise: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shares = parts(rng)
    found = effects(shares, rng.normal(0, noise, 200), np.arange(200) % 3 == 0)
    assert np.square(shares @ found).mean() < np.square(0.35 * noise).mean()


def test_single_disturbed_measurements_hardly_make_an_effect() -> None:
    rng = np.random.default_rng(5)
    shares = parts(rng)
    off = rng.normal(0, 0.03, 200)
    off[::40] = 3.0  # four times as long
    assert np.abs(shares @ effects(shares, off, np.zeros(200, dtype=bool))).max() < 0.06


def test_no_part_takes_next_to_nothing() -> None:
    shares = np.zeros((40, 2))
    shares[::2, 0] = 0.05
    assert effects(shares, np.where(np.arange(40) % 2, 0.0, -0.1), np.zeros(40, dtype=bool)).min() >= -0.75


def test_one_confirmed_measurement_is_no_evidence_that_its_parts_fit() -> None:
    rng = np.random.default_rng(6)
    shares, true = parts(rng), np.zeros(12)
    true[2] = 0.4
    confirmed = np.zeros(200, dtype=bool)
    confirmed[int(np.flatnonzero(shares[:, 2])[0])] = True
    assert effects(shares, shares @ true + rng.normal(0, 0.03, 200), confirmed)[2] == pytest.approx(0.4, abs=0.1)
