"""Accuracy with its interval, what is lost of the reference's, and when a pass over the rows may end early."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autocompress import slot
from autocompress.errors import MeasurementError
from autocompress.records import Z95, Drop
from autocompress.runtimes.base import Session
from autocompress.task import Batch, Split

WRONG_STOPS = 1e-3
"""Chance that an accuracy pass is ended for a candidate that would have reached the front."""
LOOKS = (1 / 4, 1 / 2)
"""Shares of the rows after which that is decided in one pass."""


@dataclass(frozen=True)
class Accuracy:
    """Share of right predictions with its 95 % Wilson interval, mean cross-entropy, and the predictions' hash."""

    value: float
    low: float
    high: float
    loss: float
    rows: int
    predictions: str

    def fields(self) -> dict[str, Any]:
        """Return the values by the names of the fields that a `Measurement` keeps them in."""
        return {
            "accuracy": self.value,
            "accuracy_low": self.low,
            "accuracy_high": self.high,
            "loss": self.loss,
            "rows": self.rows,
            "predictions": self.predictions,
        }


def wilson(hits: int, rows: int) -> tuple[float, float]:
    """Return the 95 % score interval of a share (Wilson 1927)."""
    share, z2 = hits / rows, Z95**2
    centre = (share + z2 / (2 * rows)) / (1 + z2 / rows)
    half = Z95 / (1 + z2 / rows) * math.sqrt(share * (1 - share) / rows + z2 / (4 * rows * rows))
    # Rounding must not leave a share of 0 or 1 outside its own interval.
    return 0.0 if hits == 0 else centre - half, 1.0 if hits == rows else centre + half


def logits_of(session: Session, rows: Split, batches: Iterable[Batch]) -> np.ndarray:
    """Run all ``rows`` through an artefact, in ``batches`` that hold each of them once.

    Returns:
        ``rows x classes``, float32, in row order.

    Raises:
        MeasurementError: if any logit is not finite.
    """
    found: np.ndarray | None = None
    for batch in batches:
        with slot.working():
            logits = session.run(batch.arrays())
        if found is None:
            found = np.full((len(rows), logits.shape[1]), np.nan, dtype=np.float32)
        found[batch.rows.numpy()] = logits
    if found is None:
        raise MeasurementError("accuracy: there are no rows to score on")
    require_finite(found, len(rows))
    return found


def require_finite(logits: np.ndarray, rows: int) -> None:
    """Raise `MeasurementError` if any of ``logits`` (``rows x classes``) is not finite."""
    bad = int((~np.isfinite(logits)).any(axis=1).sum())
    if bad:
        raise MeasurementError(f"logits: {bad} of {rows} rows are not finite")


def accuracy(logits: np.ndarray, rows: Split) -> Accuracy:
    """Score ``logits`` (``rows x classes``) against the rows' classes."""
    labels = np.array(rows.labels)
    predicted = logits.argmax(axis=1)
    hits = int((predicted == labels).sum())
    loss = float(-_log_probabilities(logits)[np.arange(len(labels)), labels].mean())
    low, high = wilson(hits, len(labels))
    return Accuracy(hits / len(labels), low, high, loss, len(labels), predictions_hash(logits))


def drop(logits: np.ndarray, reference: np.ndarray, rows: Split) -> Drop:
    """Hold ``logits`` against those of the ``reference`` (both ``rows x classes``) on the same rows.

    Most rows are classified alike, which two intervals of their own know nothing of. This is the adjusted Wald interval
    for paired rows (Bonett and Price 2012, "Adjusted Wald Confidence Interval for a Difference of Binomial Proportions
    Based on Paired Data"): from the rows that one of both alone gets right, one more of each and two more in all.
    """
    labels = np.array(rows.labels)
    right, expected = logits.argmax(axis=1) == labels, reference.argmax(axis=1) == labels
    lost, gained = int((expected & ~right).sum()), int((right & ~expected).sum())
    more = len(labels) + 2
    lost_share, gained_share = (lost + 1) / more, (gained + 1) / more
    centre = lost_share - gained_share
    half = Z95 * math.sqrt((lost_share + gained_share - centre**2) / more)
    return Drop((lost - gained) / len(labels), max(-1.0, centre - half), min(1.0, centre + half))


def divergence(logits: np.ndarray, reference: np.ndarray) -> float:
    """Return the mean Kullback-Leibler divergence of ``logits`` from ``reference`` (``rows x classes``), in nats."""
    return float(divergences(logits, reference).mean())


def divergences(logits: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return that of each row, ``rows``."""
    wanted = _log_probabilities(reference)
    # A divergence is not negative; rounding can make a tiny one so.
    terms = (np.exp(wanted) * (wanted - _log_probabilities(logits))).sum(axis=1)
    return np.asarray(np.maximum(0.0, terms))


def _log_probabilities(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


@dataclass(frozen=True)
class Bound:
    """The cost that a candidate must undercut to stand on the front, and when it is known that it cannot.

    Args:
        guide: ``accuracy``, ``loss`` or ``divergence``.
        cost: of the best point that is not beaten in any other objective; accuracies are negative.
    """

    guide: str
    cost: float

    def out_of_reach(self, logits: np.ndarray, done: Sequence[int], rows: Split, reference: np.ndarray) -> str | None:
        """Return the reason why a candidate cannot undercut the cost, judged by a random part of the rows, or None.

        Losses and divergences of single rows are not negative, so that the sum so far bounds the mean from below: no
        candidate is stopped wrongly. Hits are drawn without replacement: the chance that one which reaches the front
        shows as few as were seen is hypergeometric, and it is stopped where that is below ``WRONG_STOPS`` over the
        number of looks.

        Args:
            logits: ``rows x classes``; only the rows in ``done`` are read.
            done: rows that were run, a random part.
            rows: the split.
            reference: the uncompressed model's logits.
        """
        labels, seen = np.array(rows.labels)[list(done)], logits[list(done)]
        if self.guide == "accuracy":
            hits = int((seen.argmax(axis=1) == labels).sum())
            needed = math.floor(-self.cost * len(rows) + 1e-9) + 1
            chance = _hypergeometric(hits, len(rows), needed, len(done))
            if chance >= WRONG_STOPS / len(LOOKS):
                return None
            return f"{hits} hits in {len(done)} of {len(rows)} rows; the front needs {needed} (chance {chance:.1e})"
        if self.guide == "loss":
            parts = -_log_probabilities(seen)[np.arange(len(done)), labels]
        else:
            parts = divergences(seen, reference[list(done)])
        least = float(parts.sum()) / len(rows)
        if least < self.cost:
            return None
        return f"{self.guide} at least {least:.3g} after {len(done)} of {len(rows)} rows; the front has {self.cost:.3g}"


def _hypergeometric(hits: int, rows: int, good: int, drawn: int) -> float:
    """Return the chance of at most ``hits`` good ones among ``drawn`` of ``rows`` of which ``good`` are good."""
    if good > rows:
        return 0.0
    least = max(0, drawn - (rows - good))
    if hits < least:
        return 0.0
    # Each term from the one before: of 100,000 rows a binomial coefficient has thousands of digits.
    term = math.comb(good, least) * math.comb(rows - good, drawn - least)
    ways = term
    for k in range(least, min(hits, drawn, good)):
        term = term * (good - k) * (drawn - k) // ((k + 1) * (rows - good - drawn + k + 1))
        ways += term
    return ways / math.comb(rows, drawn)


def predictions_hash(logits: np.ndarray) -> str:
    """Return the SHA-256 of the predicted classes of ``logits`` (``rows x classes``), in row order."""
    return hashlib.sha256(logits.argmax(axis=1).astype("<i4").tobytes()).hexdigest()
