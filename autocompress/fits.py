"""Least-squares fits of what plans cost, small enough to be made anew for each proposal."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FEWEST = 12
"""Measured candidates from which on fits are used."""
_BELIEVED = 0.03
"""Relative residual up to which a measured latency counts in full: what disturbs a run often makes it much longer."""
_ONCE, _CONFIRMED = 0.022, 0.014
"""Relative standard deviations of latencies that were measured in a search and timed anew: what explains how far both
are from careful ones in ``results/benchmarks/search-cost.json``, where these are as far off as those of a front."""
_ROUNDS, _MORE_ROUNDS = 12, 2
"""Times that a fit is weighted anew, from nothing and from an earlier fit to most of the same."""
_CHANGES_OF_SETS = 3
"""Times the number of weights that the active set may grow."""
_EFFECTS = (0.03, 0.06, 0.12, 0.25)
"""Relative standard deviations of effects, of which, and of none, the likeliest is taken."""
_MOST = 0.75
"""No effect is taken to be larger: a part that takes no time would make its plans look better than all others."""
_FARTHEST = 6.0
"""Standard deviations from a fit at which a measurement counts as no farther away."""
_NORMAL = 1.4826
"""A normal distribution's standard deviation over the median of what its values are away."""


@dataclass
class Fit:
    """A least-squares fit with the spread of its residuals."""

    weights: np.ndarray
    spread: float


def least_squares(inputs: np.ndarray, outputs: np.ndarray, *, ridge: float) -> Fit:
    """Fit ``inputs @ weights`` (``rows x features``) to ``outputs`` with a penalty in units of each feature."""
    scale = np.maximum(np.abs(inputs).max(axis=0), 1e-12)
    scaled = inputs / scale
    penalty = ridge * len(outputs) * np.eye(scaled.shape[1])
    penalty[0, 0] = 0.0
    weights = np.linalg.solve(scaled.T @ scaled + penalty + 1e-12 * np.eye(len(penalty)), scaled.T @ outputs)
    left = outputs - scaled @ weights
    freedom = max(1, len(outputs) - np.linalg.matrix_rank(scaled))
    return Fit(weights / scale, float(np.sqrt(np.square(left).sum() / freedom)))


def relative_fit(
    inputs: np.ndarray, outputs: np.ndarray, start: Fit | None = None, sure: np.ndarray | None = None
) -> Fit:
    """Fit non-negative weights to ratios of ``outputs``, which are > 0, so that few that are far off move it little.

    By Huber's loss, as rounds of weighted least squares; see Holland and Welsch (1977), "Robust regression using
    iteratively reweighted least-squares".

    Args:
        inputs: ``rows x features``.
        outputs: ``rows``.
        start: an earlier fit to most of the same.
        sure: ``rows``, the inverse of each one's standard deviation, up to a factor that leaves the largest at 1.
    """
    sure = np.ones(len(outputs)) if sure is None else sure
    spread = inputs.std(axis=0)
    scale = np.where(spread > 1e-9, spread, 1.0)
    penalty = np.sqrt(1e-4 * len(outputs)) * np.eye(inputs.shape[1])
    penalty[0, 0] = 0.0
    wanted = np.zeros(len(penalty))
    weights = None if start is None else start.weights
    for _ in range(_ROUNDS if start is None else _MORE_ROUNDS):
        trust = sure
        if weights is not None:
            off = np.abs(np.log(np.maximum(inputs @ weights, 1e-4 * outputs) / outputs))
            trust = sure * np.sqrt(np.minimum(1.0, _BELIEVED / np.maximum(off, 1e-9)))
        stacked = np.vstack([inputs / scale * (trust / outputs)[:, None], penalty])
        weights = nonnegative(stacked, np.concatenate([trust, wanted])) / scale
    assert weights is not None
    left = inputs @ weights / outputs - 1
    freedom = max(1, len(outputs) - int((weights > 0).sum()))
    return Fit(weights, float(np.sqrt(np.square(left).sum() / freedom)))


def latency_fit(
    work: np.ndarray, ratios: np.ndarray, confirmed: np.ndarray, start: Fit | None = None
) -> tuple[Fit, np.ndarray]:
    """Fit ratios as they are once confirmed, where there are such; return them as such, too.

    In a search other workers compute beside, which small models and the reference do not bear alike: the factor between
    the two comes from the confirmed ones, which are compared with a fit to the others, since those of them that were
    measured too fast are more likely to be confirmed.
    """
    if min(confirmed.sum(), (~confirmed).sum()) < FEWEST:
        return relative_fit(work, ratios, start), ratios
    searched = relative_fit(work[~confirmed], ratios[~confirmed], start)
    factor = float(np.median(ratios[confirmed] / (work[confirmed] @ searched.weights)))
    sure = np.where(confirmed, 1.0, _CONFIRMED / _ONCE)
    alike = np.where(confirmed, ratios, factor * ratios)
    return relative_fit(work, alike, start, sure), alike


def effects(shares: np.ndarray, off: np.ndarray, confirmed: np.ndarray) -> np.ndarray:
    """Return by what share the parts of a sum are off by themselves, which a fit by their sizes does not see.

    Effects are taken as drawn around zero (Robinson 1991, "That BLUP is a good thing", eq. 1.2), with the variance that
    makes what was measured likeliest: parts that were seen little, or that explain little, stay where the fit has them.
    Measurements that scatter more than they are known to count for less, so that noise is not taken for effects.

    Args:
        shares: ``rows x parts``, of each part in the fitted sum of a row.
        off: ``rows``, relative residuals of the fit.
        confirmed: ``rows``, which were timed anew.
    """
    deviations = np.where(confirmed, _CONFIRMED, _ONCE)
    for alike in (confirmed, ~confirmed):
        if alike.any():
            deviations[alike] *= max(1.0, _NORMAL * float(np.median(np.abs(off[alike] / deviations[alike]))))
    off = np.clip(off / deviations, -_FARTHEST, _FARTHEST)
    shares = shares / deviations[:, None]
    square, product = shares.T @ shares, shares.T @ off
    likeliest, found = 0.0, np.zeros(len(product))
    for deviation in _EFFECTS:
        certainty = np.eye(len(product)) / deviation**2 + square
        drawn = np.linalg.solve(certainty, product)
        # The logarithm of the marginal likelihood over that without effects, twice.
        _, volume = np.linalg.slogdet(certainty * deviation**2)
        if (likelihood := float(product @ drawn - volume)) > likeliest:
            likeliest, found = likelihood, drawn
    return np.clip(found, -_MOST, _MOST)


def nonnegative(inputs: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """Return the non-negative least-squares weights, by the active sets of Lawson and Hanson on the normal equations.

    See Bro and de Jong (1997), "A fast non-negativity-constrained least squares algorithm".
    """
    square, product = inputs.T @ inputs, inputs.T @ outputs
    weights, free = np.zeros(len(product)), np.zeros(len(product), dtype=bool)
    enough = 1e-10 * max(1.0, float(np.abs(product).max(initial=0.0)))
    for _ in range(_CHANGES_OF_SETS * len(weights)):
        slope = np.where(free, -np.inf, product - square @ weights)
        if not (slope > enough).any():
            break
        free[int(slope.argmax())] = True
        while True:
            wanted = np.zeros(len(weights))
            wanted[free] = np.linalg.lstsq(square[np.ix_(free, free)], product[free], rcond=None)[0]
            below = free & (wanted <= 0)
            if not below.any():
                weights = wanted
                break
            # As far towards it as all stay non-negative; what reaches zero is fixed there.
            step = float((weights[below] / np.maximum(weights[below] - wanted[below], 1e-300)).min())
            weights = weights + step * (wanted - weights)
            free &= ~(below & (weights <= 1e-14))
            weights[~free] = 0.0
    return weights
