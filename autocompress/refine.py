"""What becomes of a front once all candidates are evaluated: it is reconstructed, recovered, and timed with care."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from autocompress.decisions import RECONSTRUCTED, Recover
from autocompress.errors import ENDS, AutocompressError
from autocompress.evaluate import Workshop
from autocompress.mutation import by_promise
from autocompress.pareto import costs, nondominated_ranks
from autocompress.plan import CompressionPlan
from autocompress.records import QUALITIES, Candidate, Measurement
from autocompress.stopwatch import Stopwatch
from autocompress.study import Study
from autocompress.trained import Progress, silent

_WON_BACK = 0.2
"""Part of what a point lost that a short recovery wins back, about as in ``results/benchmarks/search-rungs.json``."""


def refine(
    study: Study,
    workshop: Workshop,
    clock: Stopwatch,
    *,
    quiet: Callable[[], None] | None,
    progress: Progress,
    stage: Progress,
) -> None:
    """Add what the run file asks to make of the front's points, and time all that stand on it anew.

    Args:
        study: open for writing, with all candidates evaluated.
        workshop: of its run.
        clock: takes the time of recovery and of confirmation.
        quiet: called before anything is timed; returns when nothing else runs.
        progress: told what is being done, a line at a time.
        stage: told what is done next, if there is something to do.
    """
    with clock("recovery"):
        _reconstruct(study, workshop, progress, stage)
        _recover(study, workshop, progress, stage)
    added = True
    while added:  # a latency that does not hold lets others on the front, until nothing is new there
        with clock("confirmation"):
            _confirm(study, workshop, quiet, progress, stage)
        with clock("recovery"):
            added = _reconstruct(study, workshop, progress, stage)


@contextmanager
def or_why_not(failed: str, progress: Progress) -> Iterator[None]:
    """Say why nothing comes of a point, which must not cost the others, unless they would meet that, too."""
    try:
        yield
    except ENDS:
        raise
    except AutocompressError as error:
        progress(f"{failed}: {error}")


def drop_dominated(study: Study, artefacts: Path, latest: Candidate) -> None:
    """Delete the artefacts that ``latest`` pushed off the front, or its own; others may be in the making.

    Those stay that may come back when they are timed anew.
    """
    there = [c for folder in artefacts.iterdir() if (c := study.of_plan(folder.name)) is not None]
    kept = {c.plan.plan_id for c in (*study.front().points, *study.contenders(there))}
    done = {c.plan.plan_id for c in there if c.state == "COMPLETE"} | {latest.plan.plan_id}
    for plan_id in done - kept:
        shutil.rmtree(artefacts / plan_id, ignore_errors=True)


def _reconstruct(study: Study, workshop: Workshop, progress: Progress, stage: Progress) -> bool:
    """Fit the front's pruned points to what was there before they were pruned, if the run file says so.

    Returns:
        Whether any of them had not been.
    """
    if not study.run.search.reconstruct:
        return False
    known, any_added = {c.plan.plan_id for c in study.candidates()}, False
    for candidate in study.front().points:
        if candidate.plan.of_type(Recover) or not candidate.plan.reconstructible:
            continue
        # Blocks that are run several times cannot be.
        with or_why_not(f"trial {candidate.number} cannot be reconstructed", progress):
            plan = candidate.plan.recovered(RECONSTRUCTED)
            if plan.plan_id not in known:
                stage("reconstructing points of the front")
                added, any_added = _add(study, workshop, candidate, plan, "reconstruct", progress), True
                if study.run.search.keep_artefacts == "front":
                    drop_dominated(study, workshop.artefacts, added)
    return any_added


def _add(
    study: Study, workshop: Workshop, candidate: Candidate, plan: CompressionPlan, verb: str, progress: Progress
) -> Candidate:
    """Evaluate what is made of a candidate, and record it."""
    progress(f"{verb}ing trial {candidate.number}")
    added = study.add(plan, workshop.evaluate(plan), origin="recover")
    gained = 100 * (added.score.accuracy - candidate.score.accuracy)
    progress(f"trial {added.number} is trial {candidate.number} {verb}ed: {gained:+.1f} points")
    return added


def _recover(study: Study, workshop: Workshop, progress: Progress, stage: Progress) -> None:
    """Distil the most promising structures (rung 2), as many as the run file asks.

    Best non-dominated rank first, and of these what would add most to the front if it won back a part of what it lost:
    nothing is to be won where nothing was lost.
    """
    wanted = study.run.search.recover
    if wanted:  # those of an earlier command count; what was recovered by hand in another way does not
        wanted -= sum(c.origin == "recover" and _is_as_asked(c.plan, workshop) for c in study.candidates())
    if wanted <= 0:
        return
    usable = [c for c in study.candidates() if c.measurement is not None and c.feasible and c.origin != "recover"]
    known = {c.plan.plan_id for c in study.candidates()}
    for candidate in _by_gain(usable, study):
        # Without structural decisions there is nothing that distillation could win back.
        if not candidate.plan.structural() or wanted <= 0:
            continue
        with or_why_not(f"trial {candidate.number} cannot be recovered", progress):
            plan = workshop.recovering(candidate.plan)
            if plan.plan_id not in known:
                stage("recovering the best points")
                _add(study, workshop, candidate, plan, "recover", progress)
                known.add(plan.plan_id)
                wanted -= 1


def _by_gain(candidates: Sequence[Candidate], study: Study) -> list[Candidate]:
    """Return candidates by rank, and within one by what a recovery is likely to add to the best of all."""
    if not candidates:
        return []
    objectives, qualities = study.run.objectives, [name in QUALITIES for name in study.run.objectives]
    unharmed = costs([dataclasses.replace(candidates[0], measurement=study.reference)], objectives)
    now = costs(candidates, objectives)
    then = np.where(qualities, now + _WON_BACK * (unharmed - now), now)
    ranks = nondominated_ranks(now)
    found: list[Candidate] = []
    for rank in range(int(ranks.max()) + 1):
        of_rank = np.flatnonzero(ranks == rank)
        found += [candidates[of_rank[n]] for n in by_promise(then[of_rank], now[ranks == 0], np.zeros(now.shape[1]))]
    return found


def _is_as_asked(plan: CompressionPlan, workshop: Workshop) -> bool:
    """Return whether a recovered plan is what the run file makes of the one that it comes from."""
    before = plan.without(Recover)
    try:
        again = workshop.recovering(before) == plan
        return again or workshop.recovering(before.recovered(RECONSTRUCTED)) == plan
    except AutocompressError:
        return False


def confirm(
    study: Study,
    workshop: Workshop,
    candidates: Sequence[Candidate],
    *,
    quiet: Callable[[], None] | None = None,
    progress: Progress = silent,
) -> list[Candidate]:
    """Time candidates of a study anew, as its run file says, and record that; returns them as they are then.

    Those are left as they are whose artefact is gone, and cannot be made again as it was.
    """
    points: dict[int, tuple[CompressionPlan, Measurement]] = {}
    for candidate in candidates:
        with or_why_not(f"trial {candidate.number} cannot be timed anew", progress):
            points[candidate.number] = (candidate.plan, workshop.kept(candidate))
    pairs = study.run.search.confirm_pairs
    latest = workshop.confirmed(list(points.values()), pairs=pairs, quiet=quiet, progress=progress)
    return study.confirm(dict(zip(points, latest, strict=True)))


def confirm_with_front(study: Study, workshop: Workshop, recovered: Candidate, progress: Progress) -> Candidate:
    """Time a recovered candidate anew, and with it what is left on the front that was not: they are to be compared."""
    tried = {recovered.number}

    def waiting() -> list[Candidate]:
        unsure = (c for c in study.front().points if not c.score.confirmed and c.number not in tried)
        return [c for c in unsure if (workshop.artefacts / c.plan.plan_id).is_dir()]

    candidates = [recovered, *waiting()]
    while candidates:  # a latency that does not hold lets others on the front
        confirm(study, workshop, candidates, progress=progress)
        tried |= {candidate.number for candidate in candidates}
        candidates = waiting()
    return study.candidate(recovered.number)


def _confirm(
    study: Study, workshop: Workshop, quiet: Callable[[], None] | None, progress: Progress, stage: Progress
) -> None:
    """Time the front's points anew, one after the other; points that this pushes off the front stay in the study.

    With them those that may belong there, up to half as many: of those beyond that, few do.
    """
    tried: set[int] = set()

    def waiting() -> list[Candidate]:
        return [c for c in study.front().points if not c.score.confirmed and c.number not in tried]

    if study.run.search.confirm_pairs and (candidates := waiting()):
        stage("timing the front anew")
        candidates += study.contenders(study.candidates())[: -(-len(study.front()) // 2)]
        while candidates:
            confirm(study, workshop, candidates, quiet=quiet, progress=progress)
            tried |= {candidate.number for candidate in candidates}
            candidates = waiting()
    if study.run.search.keep_artefacts == "front":
        kept = {c.plan.plan_id for c in study.front().points} | {"reference"}
        for folder in workshop.artefacts.iterdir():
            if folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)
