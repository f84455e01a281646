"""What the page's program reads: every candidate by columns, in as few characters as it takes.

Ten thousand candidates must fit a page that a browser opens at once, so numbers have five digits and what many
candidates share - a block, as it is compressed - is written once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from autocompress.anatomy import ModelShape
from autocompress.front import Front, Preference
from autocompress.records import Candidate, Measurement
from autocompress.report.blocks import Picture
from autocompress.report.tables import BETTER, one_line, size_mb, trade_words

_DIGITS = 5
_BETWEEN = "; "
"""Between the parts of a plan's words."""
_BEST: dict[str, Preference] = {"fastest": "latency", "smallest": "size", "most accurate": "accuracy"}
"""Points that the page names within its limits, by what they are."""
K = TypeVar("K")
_NUMBERS: dict[str, Callable[[Measurement], float | None]] = {
    "accuracy": lambda score: _percent(score.accuracy),
    "accuracy_low": lambda score: _percent(score.accuracy_low),
    "accuracy_high": lambda score: _percent(score.accuracy_high),
    "drop": lambda score: _percent(score.accuracy_drop),
    "drop_low": lambda score: _percent(score.accuracy_drop_low),
    "drop_high": lambda score: _percent(score.accuracy_drop_high),
    "size": lambda score: _rounded_up(size_mb(score)),
    "ms": lambda score: _rounded_up(score.latency_ms),
    "p90": lambda score: score.latency_p90_ms,
    "ratio": lambda score: score.latency_ratio,
    "ratio_low": lambda score: score.latency_ratio_low,
    "ratio_high": lambda score: score.latency_ratio_high,
    "memory": lambda score: score.peak_memory_bytes and score.peak_memory_bytes / 1e6,
    "loss": lambda score: score.loss,
    "divergence": lambda score: score.divergence,
    "seconds": lambda score: score.seconds,
}
"""Columns of a score: accuracies in percent, sizes in MB of 1e6 bytes, latencies in ms, divergences in nats."""


def page_data(
    front: Front, candidates: Sequence[Candidate], *, random: Sequence[Candidate] = (), shape: ModelShape | None = None
) -> dict[str, Any]:
    """Return everything that the page draws, as JSON takes it.

    Args:
        front: with its reference.
        candidates: all of the study.
        random: those of the random baseline, of which the front is shown.
        shape: of the uncompressed model; without it there are no pictures of plans.
    """
    places = {candidate.number: place for place, candidate in enumerate(candidates)}
    on_front = {point.number for point in front.points}
    blocks: dict[tuple[Any, ...], int] = {}
    parts: dict[str, int] = {}
    pictures = [None if shape is None else _picture(c, shape, blocks) for c in candidates]
    return {
        "objectives": list(front.objectives),
        "reference": _columns([front.reference]),
        "candidates": {
            "number": [c.number for c in candidates],
            "state": [one_line(c.state) for c in candidates],
            "origin": [one_line(c.origin) for c in candidates],
            "feasible": [int(c.feasible) for c in candidates],
            "front": [int(c.number in on_front) for c in candidates],
            "plan": [[_numbered(part, parts) for part in c.plan.words().split(_BETWEEN)] for c in candidates],
            "failure": {n: one_line(c.failure) for n, c in enumerate(candidates) if c.failure},
            **_columns([c.measurement for c in candidates]),
        },
        "random": _columns([c.score for c in Front.of(random, front.reference, front.objectives).points]),
        # By places among the candidates.
        "best": {
            name: [places[point.number] for point in front.ranked(prefer) if point.number in places]
            for name, prefer in _BEST.items()
        },
        "neighbours": {point.number: _neighbours(front, point) for point in front.points},
        "shape": None if shape is None else _sizes(shape),
        "blocks": list(blocks),
        "parts": [one_line(part) for part in parts],
        "pictures": pictures,
    }


def _columns(scores: Sequence[Measurement | None]) -> dict[str, list[float | None]]:
    return {name: [None if s is None else _short(read(s)) for s in scores] for name, read in _NUMBERS.items()}


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _rounded_up(value: float) -> float:
    """Return what the page can offer as a limit that lets ``value`` through, to `pick`, too."""
    unit: float = 10.0 ** (math.floor(math.log10(value)) + 1 - _DIGITS)
    return math.ceil(value / unit - 1e-6) * unit


def _short(value: float | None) -> float | None:
    if value is None or not math.isfinite(value):
        return None
    found = float(f"{value:.{_DIGITS}g}")
    return int(found) if found.is_integer() else found


def _neighbours(front: Front, point: Candidate) -> list[tuple[str, int, str]]:
    return [
        (BETTER[near.better], near.point.number, trade_words(point.score, near.point.score, near.better))
        for near in front.neighbours(point)
    ]


def _picture(candidate: Candidate, shape: ModelShape, blocks: dict[tuple[Any, ...], int]) -> list[Any] | None:
    """Return a candidate's picture with the numbers of its blocks in ``blocks``, which new ones are added to."""
    found = Picture.of(candidate.plan, shape)
    if found is None:
        return None
    numbers = [_numbered(tuple(vars(block).values()), blocks) for block in found.blocks]
    return [found.hidden, found.rows, found.embedding_bits, found.head_bits, found.tokens, found.runs, numbers]


def _numbered(what: K, known: dict[K, int]) -> int:
    """Return the number of ``what`` among all that are known, to which it is added."""
    return known.setdefault(what, len(known))


def _sizes(shape: ModelShape) -> dict[str, int]:
    first = shape.blocks[0]
    return {
        "blocks": len(shape.blocks),
        "heads": max(block.heads for block in shape.blocks),
        "head_size": first.head_size,
        "neurons": max(block.neurons for block in shape.blocks),
        "hidden": shape.hidden,
        "rows": shape.vocabulary,
    }
