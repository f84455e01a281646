"""What commands print: results on stdout, as lines or JSON, and what happens meanwhile on stderr."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Group

    from autocompress.delivery import Export
    from autocompress.front import Choice
    from autocompress.records import Candidate
    from autocompress.retarget import Moved
    from autocompress.status import SearchStatus
    from autocompress.study import Study

_SECONDS_BETWEEN_LINES = 15.0
"""Between two lines that say how far a search is, off a terminal."""
_WIDE = 120
"""Columns from which on plans have room beside the numbers of a front."""


def progress(line: str) -> None:
    """Print what is being done, with the time of day."""
    typer.echo(f"{time.strftime('%H:%M:%S')} {line}", err=True)


def wait() -> None:
    """Return when the user interrupts."""
    with suppress(KeyboardInterrupt):
        threading.Event().wait()


class Interval(list[float]):
    """A value and the ends of its 95 % interval."""

    def __str__(self) -> str:
        value, low, high = self
        return f"{value:.4g} (95 % interval {low:.4g} to {high:.4g})"


def result(data: Any, as_json: bool) -> None:
    """Print nested values, as JSON or a line each with dotted names."""
    if as_json:
        typer.echo(json.dumps(data, indent=1, default=str))
        return
    from autocompress.report.tables import one_line

    for key, value in _flat(data):  # labels, names of folders and reasons come from elsewhere
        typer.echo(one_line(f"{key}: {value}"))


def _flat(data: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(data, dict):
        return [row for key, value in data.items() for row in _flat(value, f"{prefix}.{key}" if prefix else str(key))]
    in_a_row = isinstance(data, list) and not isinstance(data, Interval)
    return [(prefix, ", ".join(map(str, data)) if in_a_row else data)]


def front_of(study: Study, as_json: bool) -> None:
    """Print the points of a study's front."""
    front = study.front()
    if as_json:
        typer.echo(front.to_frame().to_json(orient="records", indent=1))
        return
    from rich.console import Console

    from autocompress.report.tables import front_table, plan_lines

    console = Console()
    beside = console.width >= _WIDE
    console.print(front_table(front, plans=beside))
    if not beside:
        for line in plan_lines(front):
            typer.echo(line)


@contextmanager
def live() -> Iterator[Callable[[Any], None]]:
    """Yield what is told how far a search is: a table that stays at the bottom of a terminal, else a line at times."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        from rich.live import Live

        # What is printed meanwhile goes above it.
        with Live(console=console, refresh_per_second=4, transient=True) as shown:
            yield lambda found: shown.update(_table_of(found))
        return
    said, stage = time.perf_counter(), ""

    def say(found: Any) -> None:
        nonlocal said, stage
        begun = found.stage.split(":")[0]
        if begun != stage or time.perf_counter() - said >= _SECONDS_BETWEEN_LINES:
            said, stage = time.perf_counter(), begun
            progress(found.words())

    yield say


def _table_of(found: SearchStatus) -> Group:
    """Return how far a search is, with the points of its front that one would look at first."""
    from rich import box
    from rich.console import Group
    from rich.table import Table

    from autocompress.front import wished
    from autocompress.report.tables import accuracy_words, short, size_mb, times_faster, times_smaller

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("of the front")
    for heading in ("trial", "accuracy", "MB", "ms"):
        table.add_column(heading, justify="right", no_wrap=True)
    for names, point in found.front.recommended():
        score, reference = point.score, found.front.reference
        table.add_row(
            wished(names),
            str(point.number),
            accuracy_words(score),
            f"{short(size_mb(score))} ({times_smaller(score, reference)})",
            f"{short(score.latency_ms)} ({times_faster(score)})",
        )
    return Group(table, found.words())


def about(candidate: Candidate) -> dict[str, Any]:
    """Return what is told of a picked or recovered point."""
    score = candidate.score
    return {
        "trial": candidate.number,
        "plan_id": candidate.plan.plan_id,
        "plan": candidate.plan.words(),
        "accuracy": Interval([score.accuracy, score.accuracy_low, score.accuracy_high]),
        **({"accuracy_drop": Interval(score.drop)} if score.drop is not None else {}),
        **({"divergence": score.divergence} if score.divergence is not None else {}),
        "size_bytes": score.size_bytes,
        "latency_ms": score.latency_ms,
        "latency_ratio": Interval([score.latency_ratio, score.latency_ratio_low, score.latency_ratio_high]),
        **({"peak_memory_bytes": score.peak_memory_bytes} if score.peak_memory_bytes else {}),
    }


def about_choice(choice: Choice) -> dict[str, Any]:
    """Return what is told of a picked point, why it was picked, and what its neighbours trade."""
    from autocompress.report.tables import BETTER, trade_words

    traded = {
        BETTER[near.better]: {
            "trial": near.point.number,
            "instead": trade_words(choice.point.score, near.point.score, near.better),
            **({"limits": "broken"} if near.beyond else {}),
        }
        for near in choice.neighbours
    }
    return {**about(choice.point), "why": choice.reason, "neighbours": traded}


def about_exports(candidate: Candidate, exports: Mapping[str, Export]) -> dict[str, Any]:
    """Return what is told of the folders that a point was exported to, by format."""
    return {
        name: {
            "folder": str(shipped.folder),
            "trial": candidate.number,
            "plan": candidate.plan.words(),
            "search_accuracy": shipped.measurement.accuracy,
            "test_accuracy": Interval([shipped.test.value, shipped.test.low, shipped.test.high]),
            "test_accuracy_drop": Interval(shipped.test_drop),
            "selection_optimism": shipped.measurement.accuracy - shipped.test.value,
            "size_bytes": shipped.measurement.size_bytes,
            **_times_of(shipped),
            "agreement_with_scored_candidate": shipped.agreement,
            **({"pushed_to": shipped.pushed} if shipped.pushed else {}),
        }
        for name, shipped in exports.items()
    }


def _times_of(shipped: Export) -> dict[str, Any]:
    if not shipped.timed:
        return {"latency": "not timed: PyTorch unpacks the weights and computes in floats"}
    return {
        "latency_ratio": shipped.measurement.latency_ratio,
        **({} if (chosen_by := shipped.latency_ratio_in_search) is None else {"latency_ratio_in_search": chosen_by}),
        "reloaded_predictions": "identical",
    }


def words_of_measured(found: Mapping[str, Any]) -> str:
    """Say what `autocompress.measure` found, held against what the export stored."""
    if "latency_ratio" not in found:
        return "PyTorch unpacks the weights and computes in floats: this is not the latency that was searched for."
    now, low, high = (found[f"latency_ratio{end}"] for end in ("", "_low", "_high"))
    stored = found["stored_latency_ratio"]
    where = "" if found["same_machine"] else ", which is of another machine"
    verdict = "within" if low <= stored <= high else "beyond"
    moved = found["latency_adjusted"] - 1
    adjusted = f" It is adjusted by {100 * moved:+.1f} % to the reference's pace in the search." if moved else ""
    return (
        f"{1 / now:.2f}x as fast as the reference, {1 / high:.2f} to {1 / low:.2f} with 95 % confidence; the export "
        f"stored {1 / stored:.2f}x{where}: {verdict} this interval.{adjusted} Ratios are of lower quartiles of runs in "
        "turn, milliseconds are medians, so that they do not divide to the same."
    )


def about_moves(moved: Sequence[Moved]) -> list[dict[str, Any]]:
    """Return what is told of points that were measured elsewhere."""
    return [
        {
            "trial": each.number,
            "latency_ratio": each.before.latency_ratio,
            "was_on_front": each.was_on_front,
            "new_trial": each.candidate and each.candidate.number,
            "new_latency_ratio": each.candidate and each.candidate.score.latency_ratio,
            "is_on_front": each.is_on_front,
        }
        for each in moved
    ]
