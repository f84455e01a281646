"""Candidates as a frame, as CSV files, as a terminal table and as one line of progress.

Everything shown is read from `Candidate` and `Front`; nothing is computed here but unit conversions. The wording of
the numbers is shared with `page.py`, so that the terminal and the page say the same thing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocompress.front import Front
from autocompress.records import Candidate, Drop, Measurement

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table


def _score(field: str) -> Callable[[Candidate], Any]:
    return lambda candidate: None if candidate.measurement is None else getattr(candidate.measurement, field)


# Int64 is the integer type that can miss a value: without it one failed candidate turns all sizes into floats.
_COLUMNS: dict[str, tuple[str, Callable[[Candidate], Any]]] = {
    "number": ("int64", lambda c: c.number),
    "state": ("object", lambda c: c.state),
    "plan_id": ("object", lambda c: c.plan.plan_id),
    "accuracy": ("float64", _score("accuracy")),
    "accuracy_low": ("float64", _score("accuracy_low")),
    "accuracy_high": ("float64", _score("accuracy_high")),
    "accuracy_drop": ("float64", _score("accuracy_drop")),
    "accuracy_drop_low": ("float64", _score("accuracy_drop_low")),
    "accuracy_drop_high": ("float64", _score("accuracy_drop_high")),
    "loss": ("float64", _score("loss")),
    "divergence": ("float64", _score("divergence")),
    "size_bytes": ("Int64", _score("size_bytes")),
    "latency_ms": ("float64", _score("latency_ms")),
    "latency_p90_ms": ("float64", _score("latency_p90_ms")),
    "latency_ratio": ("float64", _score("latency_ratio")),
    "latency_ratio_low": ("float64", _score("latency_ratio_low")),
    "latency_ratio_high": ("float64", _score("latency_ratio_high")),
    "latency_waited": ("float64", _score("latency_waited")),
    "latency_drift": ("float64", _score("latency_drift")),
    "latency_adjusted": ("float64", _score("latency_adjusted")),
    "peak_memory_bytes": ("Int64", _score("peak_memory_bytes")),
    "seconds": ("float64", _score("seconds")),
    "feasible": ("boolean", lambda c: None if c.measurement is None else c.feasible),
    "origin": ("object", lambda c: c.origin),
    "plan": ("object", lambda c: c.plan.words()),
    "failure": ("object", lambda c: c.failure),
}

BETTER = {
    "accuracy": "more accurate",
    "loss": "of a lower loss",
    "divergence": "closer to the full model",
    "size_bytes": "smaller",
    "latency": "faster",
    "peak_memory": "with less memory",
}
"""What a point is that is better in an objective."""
_SAME_POINTS, _SAME_SHARE = 0.05, 0.005
"""Differences below these are not worth a word: what is shown would be +0.0 or 1.00."""

# With one of these in front, spreadsheet programs read a text cell as a formula.
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def frame(candidates: Iterable[Candidate]) -> pd.DataFrame:
    """Return one row a candidate.

    Args:
        candidates: in the order of the rows.

    Returns:
        The fixed columns, also when there is no candidate, then one ``param.<name>`` column per decision parameter
        that any candidate has, sorted by name. What a failed candidate lacks is missing (NaN, None or NA).
    """
    import pandas as pd

    rows = list(candidates)
    columns: dict[str, Any] = {
        name: pd.Series([read(c) for c in rows], dtype=dtype) for name, (dtype, read) in _COLUMNS.items()
    }
    for name in sorted({name for c in rows for name in c.params}):
        columns[f"param.{name}"] = pd.Series([c.params.get(name) for c in rows], dtype="object").convert_dtypes()
    return pd.DataFrame(columns)


def write_csv(candidates: Iterable[Candidate], path: Path) -> None:
    """Write `frame` as CSV; a text cell that a spreadsheet would run as a formula gets a single quote in front.

    Args:
        candidates: in the order of the rows.
        path: file to write or replace, in a folder that exists.

    Raises:
        OSError: if it cannot be written; what was there before is then untouched.
    """
    table = frame(candidates)
    for name in table.columns:
        if table[name].dtype.kind not in "biuf":
            table[name] = table[name].astype("object").map(_disarm)
    table.columns = [_disarm(name) for name in table.columns]
    write_aside(path, table.to_csv(index=False, lineterminator="\n"))


def _disarm(cell: object) -> object:
    if not isinstance(cell, str):
        return cell
    marked = f"'{cell}" if cell.startswith(_FORMULA_STARTS) else cell
    # Before Python 3.13 the csv module does not quote a bare carriage return, which then starts a new row.
    return marked.replace("\r\n", "\n").replace("\r", "\n")


def write_aside(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 to a file next to ``path`` and rename it, so that no reader ever sees half of it.

    Raises:
        OSError: if it cannot be written; what was there before is then untouched.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # A lone surrogate in a failure reason must not cost the whole report.
        aside.write_bytes(text.encode("utf-8", errors="replace"))
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def one_line(text: str) -> str:
    """Return ``text`` on one line, without the control characters that could drive a terminal."""
    return " ".join("".join(ch if ch.isprintable() else " " for ch in text).split())


def short(value: float) -> str:
    """Say megabytes or milliseconds: one decimal, below 1 two significant digits."""
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def times_smaller(score: Measurement, reference: Measurement) -> str:
    """Say by how much the artefact is smaller than the reference's."""
    factor = reference.size_bytes / score.size_bytes
    return f"{factor:.1f}x smaller" if factor >= 1 else f"{1 / factor:.1f}x larger"


def times_faster(score: Measurement, *, interval: bool = False) -> str:
    """Say by how much the artefact is faster than the reference; below 1 it is slower.

    Args:
        score: of the artefact; it carries the paired ratio.
        interval: whether to add the ratio's 95 % interval.
    """
    said = f"{1 / score.latency_ratio:.2f}x {'faster' if score.latency_ratio <= 1 else 'as fast'}"
    if not interval:
        return said
    return f"{said}, {1 / score.latency_ratio_high:.2f} to {1 / score.latency_ratio_low:.2f}"


def trade_words(point: Measurement, other: Measurement, better: str = "accuracy") -> str:
    """Say what one gets and gives by taking ``other`` instead of ``point``; both were scored on the same rows.

    A difference in accuracy that is within the point's own interval is marked: so few rows do not tell them apart.
    ``better`` is the objective in which the other one is; what it is worth there is said, too.
    """
    said = []
    gained = 100 * (other.accuracy - point.accuracy)
    if abs(gained) >= _SAME_POINTS:
        within = point.accuracy_low <= other.accuracy <= point.accuracy_high
        said.append(f"{gained:+.1f} points of accuracy{' (within the interval)' if within else ''}")
    for ratio, less, more in (
        (other.latency_ratio / point.latency_ratio, "faster", "slower"),
        (other.size_bytes / point.size_bytes, "smaller", "larger"),
    ):
        if abs(ratio - 1) >= _SAME_SHARE:
            said.append(f"{max(ratio, 1 / ratio):.2f}x {less if ratio < 1 else more}")
    if better in ("loss", "divergence"):
        said.append(f"{better} {getattr(other, better):.3g} and not {getattr(point, better):.3g}")
    if better == "peak_memory" and other.peak_memory_bytes and point.peak_memory_bytes:
        said.append(f"{point.peak_memory_bytes / other.peak_memory_bytes:.2f}x less memory")
    return ", ".join(said) or "the same"


def candidate_words(candidate: Candidate) -> str:
    """Say what a candidate is, in short: its score without intervals, or why it has none, and its plan."""
    score = candidate.measurement
    if score is None:
        return f"{candidate.state}, {one_line(candidate.failure or 'no reason given')}"
    said = f"{100 * score.accuracy:.1f} %, {short(size_mb(score))} MB, {short(score.latency_ms)} ms"
    return f"{said} ({times_faster(score)}), {one_line(candidate.plan.words())}"


def candidate_line(candidate: Candidate, done: int, total: int, reference: Measurement) -> str:
    """Say one finished candidate on one line of plain text.

    Args:
        candidate: the one that finished.
        done: number of finished candidates, this one included.
        total: number that the search will try.
        reference: score of the uncompressed model in the same runtime.
    """
    head = f"[{done:>{max(3, len(str(total)))}}/{total}] trial {candidate.number}"
    score = candidate.measurement
    if score is None:
        how = "stopped early" if candidate.state == "PRUNED" else "FAILED"
        return f"{head}  {how}: {one_line(candidate.failure or 'no reason given')}"
    parts = [
        head,
        f"{100 * score.accuracy:.1f} %",
        f"{short(score.size_bytes / 1e6)} MB ({times_smaller(score, reference)})",
        f"{short(score.latency_ms)} ms ({times_faster(score)})",
        f"{score.seconds:.1f} s",
        one_line(candidate.plan.words()),
    ]
    if not candidate.feasible:
        parts.append("(infeasible)")
    if score.disturbed:
        parts.append(f"(timed on a busy machine: {100 * score.latency_waited:.0f} % of the time without a core)")
    return "  ".join(parts)


FRONT_HEADINGS = (
    "trial",
    "accuracy, %",
    "size, MB",
    "times smaller",
    "latency, ms",
    "p90, ms",
    "times faster",
    "plan",
)


def front_rows(front: Front) -> list[tuple[str, ...]]:
    """Return a row of words for each point of a front, under `FRONT_HEADINGS`."""
    rows: list[tuple[str, ...]] = []
    for candidate in front.points:
        score = candidate.score
        low, high = 1 / score.latency_ratio_high, 1 / score.latency_ratio_low
        rows.append(
            (
                str(candidate.number),
                accuracy_words(score).replace(" %", ""),
                short(size_mb(score)),
                f"{front.reference.size_bytes / score.size_bytes:.1f}",
                short(score.latency_ms),
                short(score.latency_p90_ms),
                f"{1 / score.latency_ratio:.2f} ({low:.2f} to {high:.2f})",
                candidate.plan.words(),
            )
        )
    return rows


def front_table(front: Front, *, plans: bool = True) -> Table:
    """Return the front as a table for the terminal, in the front's order; without ``plans`` where they have no room."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    reference = front.reference
    caption = (
        f"reference: {100 * reference.accuracy:.1f} %, {short(reference.size_bytes / 1e6)} MB, "
        f"{short(reference.latency_ms)} ms; in brackets 95 % intervals"
    )
    if not front.points:
        caption = f"no candidate completed within the constraints; {caption}"
    table = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left", pad_edge=False, show_edge=False)
    table.collapse_padding = True
    for heading in ("trial", "accuracy, %", "MB", "times smaller", "ms", "times faster"):
        # On a narrow terminal the intervals may break, single numbers never.
        table.add_column(heading, justify="right", no_wrap=" " not in heading)
    if plans:
        table.add_column("plan", overflow="fold")
    for candidate in front.points:
        score = candidate.score
        table.add_row(
            str(candidate.number),
            f"{100 * score.accuracy:.1f} ({100 * score.accuracy_low:.1f}-{100 * score.accuracy_high:.1f})",
            short(score.size_bytes / 1e6),
            f"{reference.size_bytes / score.size_bytes:.1f}",
            short(score.latency_ms),
            f"{1 / score.latency_ratio:.2f} ({1 / score.latency_ratio_high:.2f}-{1 / score.latency_ratio_low:.2f})",
            *([escape(one_line(candidate.plan.words()))] if plans else []),
        )
    return table


def plan_lines(front: Front) -> list[str]:
    """Return the plans of a front, a line each."""
    return [f"trial {candidate.number}: {one_line(candidate.plan.words())}" for candidate in front.points]


def cut_words(cut: int, rows: int, tokens: int) -> str:
    """Say how many texts are read in part."""
    return (
        f"{cut} of {rows} search rows ({cut / rows:.0%}) are longer than {tokens} tokens, and what comes after is not "
        "read; see data.max_tokens"
    )


def size_mb(score: Measurement) -> float:
    """Return the size in megabytes of 1e6 bytes."""
    return score.size_bytes / 1e6


def drop_words(drop: Drop) -> str:
    """Say what is lost of the reference's accuracy on the same rows, with its interval."""
    return f"{100 * drop.value:.1f} points ({100 * drop.low:.1f} to {100 * drop.high:.1f})"


def accuracy_words(score: Measurement) -> str:
    """Say an accuracy with its interval, in percent without the sign."""
    return f"{100 * score.accuracy:.1f} % ({100 * score.accuracy_low:.1f} to {100 * score.accuracy_high:.1f})"
