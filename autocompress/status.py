"""How far a search is, for those who follow it: a line of words, and what a table and a page are made of."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autocompress.front import Front
from autocompress.pareto import volume

if TYPE_CHECKING:
    from autocompress.evaluate import Workshop
    from autocompress.study import Study


@dataclass(frozen=True)
class SearchStatus:
    """How far a search is.

    Args:
        done: candidates that were evaluated, failed ones included.
        total: candidates in the end.
        failed: of those done.
        stopped: of those done, given up because they could not reach the front.
        front: as it stands.
        gain: hypervolume over that of the uniform plans measured so far; None without any, or if the study inherits.
        seconds_each: wall time a candidate, since this command began to evaluate.
        untrained: students that plans may start from and that are not distilled yet, which takes time of its own.
        stage: what is done once all candidates are evaluated.
    """

    done: int
    total: int
    failed: int
    stopped: int
    front: Front
    gain: float | None
    seconds_each: float = 0.0
    untrained: int = 0
    stage: str = ""

    @property
    def seconds_left(self) -> float:
        """What is left at the present speed."""
        return (self.total - self.done) * self.seconds_each

    def words(self) -> str:
        """Say it on one line."""
        students = "a student" if self.untrained == 1 else f"{self.untrained} students"
        apart = f", training of {students} apart" if self.untrained else ""
        gain = "" if self.gain is None else f", hypervolume {self.gain:.2f}x the uniform plans'"
        rest = self.stage or f"{self.seconds_each:.1f} s each, {self.seconds_left:.0f} s left{apart}"
        return (
            f"{self.done}/{self.total} candidates, {self.failed} failed, {self.stopped} stopped early, "
            f"{len(self.front)} on the front{gain}, {rest}"
        )


def status_of(study: Study, workshop: Workshop, *, total: int | None = None, **more: Any) -> SearchStatus:
    """Return how far the search is that fills ``study``.

    Args:
        study: as it stands.
        workshop: of its run.
        total: candidates in the end; as many as were asked for, without it.
        more: what the study does not tell.
    """
    candidates, reference, majority = study.candidates(), study.reference, workshop.majority
    states = Counter(c.state for c in candidates)
    uniform = [c for c in candidates if c.origin == "uniform"]
    ladder = 0.0 if study.inherits else volume(uniform, reference, majority)
    front = study.front()
    return SearchStatus(
        done=study.finished,
        total=study.run.search.trials if total is None else total,
        failed=states["FAIL"],
        stopped=states["PRUNED"],
        front=front,
        gain=volume(candidates, reference, majority) / ladder if ladder > 0 else None,
        **more,
    )
