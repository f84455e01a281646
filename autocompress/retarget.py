"""A front on another device or runtime: what a study found is measured for another target, in a study of its own.

The study that it comes from stays as it is. Where the same artefact runs, it is copied and timed; on the machine that
it was scored on, accuracy is what it was. For another runtime, or a CPU on which the same plan becomes another
artefact, it is built and scored.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from autocompress import machine
from autocompress.config import RunConfig
from autocompress.driver import open_for_writing
from autocompress.errors import ConfigError
from autocompress.evaluate import Workshop
from autocompress.journal import held
from autocompress.ledger import excesses
from autocompress.pareto import costs, nondominated_ranks
from autocompress.plan import CompressionPlan
from autocompress.records import Candidate, Measurement
from autocompress.refine import or_why_not
from autocompress.report.tables import times_faster, write_aside
from autocompress.results import write_results
from autocompress.runtimes import Artifact
from autocompress.study import Study
from autocompress.trained import Progress


@dataclass(frozen=True)
class Moved:
    """A point of a study, and what became of it for another target.

    Args:
        number: its trial in the study that it comes from.
        before: what was measured there.
        was_on_front: there.
        candidate: what it is in the new study, or None if it cannot be built for that target.
        is_on_front: in the new study.
    """

    number: int
    before: Measurement
    was_on_front: bool
    candidate: Candidate | None
    is_on_front: bool

    def words(self) -> str:
        """Say it on one line."""
        said = f"trial {self.number}, {times_faster(self.before)}"
        if self.candidate is None:
            return f"{said}: cannot be built for this target"
        front = {(True, False): ", left the front", (False, True): ", came onto the front"}
        moved = front.get((self.was_on_front, self.is_on_front), "")
        return f"{said}: trial {self.candidate.number}, {times_faster(self.candidate.score)}{moved}"


def retarget(old: Study, run: RunConfig, folder: Path, *, ranks: int, progress: Progress) -> list[Moved]:
    """Measure the best points of a study for the target of ``run``, into a study in ``folder``.

    Args:
        old: open for reading.
        run: that study's, but for the target.
        folder: where the new study stands, or shall stand.
        ranks: how many non-dominated ranks are taken, 1 for the front and what it stands for within the noise of
            timings: on another target these may be told apart.
        progress: told what happens, a line at a time.

    Raises:
        ConfigError: if more than the target differs.
        AutocompressError: if the uncompressed model cannot be measured.
    """
    if run.model_dump(exclude={"target"}) != old.run.model_dump(exclude={"target"}):
        raise ConfigError("retarget: only the target can be another; search anew for another model, task or space")
    run = run.timed_here()
    usable = [c for c in old.candidates() if c.measurement is not None and not _breaks(c, old, run)]
    if not usable:
        progress("no candidate keeps to those constraints that do not depend on the target")
    rank = nondominated_ranks(costs(usable, old.run.objectives))
    chosen = [candidate for candidate, n in zip(usable, rank, strict=True) if n < ranks]
    front_before = {c.number for c in old.front().points}
    with ExitStack() as stack:
        stack.enter_context(held(folder, needed=run.storage.study is None))
        workshop = Workshop(run, folder / "artefacts", progress)
        old.identity.require_data(workshop.task.fingerprint)
        own = old.identity.is_of_model(workshop.teacher.base)
        if not own and workshop.teacher_folder == workshop.source:
            old.identity.require_model(workshop.teacher.base)
        if not own:  # as on a machine that its search's bank was not brought to
            progress("the classifier was fine-tuned anew: all points are built from that, and compared with it")
        study = stack.enter_context(closing(open_for_writing(run, folder, workshop, progress)))
        write_aside(folder / "run.yaml", run.to_yaml())
        copied = []
        for candidate in chosen if own else ():
            there = old.folder / "artefacts" / candidate.plan.plan_id
            if study.measured(candidate.plan) is None and there.is_dir() and _runs_as_it_is(candidate, old, run):
                shutil.copytree(there, workshop.artefacts / there.name, dirs_exist_ok=True)
                copied.append(candidate)
        made = _timed(copied, study, workshop, by_workers=bool(old.run.search.device))
        for candidate in chosen:
            if candidate.number not in made:
                with or_why_not(f"trial {candidate.number}", progress):
                    made[candidate.number] = study.measured(candidate.plan) or _scored(candidate, study, workshop)
        if run.search.confirm_pairs:
            made = _confirmed(made, study, workshop)
        front = {c.number for c in study.front().points}
        write_results(study)
    return [
        Moved(c.number, c.score, c.number in front_before, new, new is not None and new.number in front)
        for c in chosen
        for new in (made.get(c.number),)
    ]


def _timed(copied: Sequence[Candidate], study: Study, workshop: Workshop, *, by_workers: bool) -> dict[int, Candidate]:
    """Time copied artefacts on this machine, and score those of another one, which may add in another order.

    Args:
        copied: candidates whose artefacts these are.
        study: to add them to.
        workshop: that has them.
        by_workers: whether their rows were run on other machines than the one that their scores name.
    """
    scores: dict[int, Measurement] = {}
    for candidate in copied:
        with or_why_not(f"trial {candidate.number}", workshop.progress):
            score = candidate.score
            if by_workers or score.fingerprint.get("id") != workshop.gauge.fingerprint["id"]:
                workshop.progress(f"scoring trial {candidate.number} on this machine")
                score = workshop.score(Artifact.open(workshop.artefacts / candidate.plan.plan_id))
            scores[candidate.number] = score
    usable = [c for c in copied if c.number in scores]
    points = [(c.plan, scores[c.number]) for c in usable]
    made = {}
    for candidate, measured in zip(usable, _anew(points, workshop), strict=True):
        memory = workshop.gauge.memory(Artifact.open(workshop.artefacts / candidate.plan.plan_id))
        here = dataclasses.replace(measured, peak_memory_bytes=memory, fingerprint=workshop.gauge.fingerprint)
        made[candidate.number] = study.add(candidate.plan, study.calmed(here), origin="retarget")
    return made


def _confirmed(made: Mapping[int, Candidate], study: Study, workshop: Workshop) -> dict[int, Candidate]:
    """Time those that were timed once, as where they were built, like those that were copied."""
    points = {}
    for candidate in made.values():
        if not candidate.score.confirmed:
            with or_why_not(f"trial {candidate.number}", workshop.progress):
                points[candidate.number] = (candidate.plan, workshop.kept(candidate))
    study.confirm(dict(zip(points, _anew(list(points.values()), workshop), strict=True)))
    # What that tells of the machine may have moved the others, too.
    return {number: study.candidate(candidate.number) for number, candidate in made.items()}


def _anew(points: Sequence[tuple[CompressionPlan, Measurement]], workshop: Workshop) -> list[Measurement]:
    pairs = workshop.run.search.confirm_pairs or workshop.run.search.latency_pairs
    return workshop.confirmed(points, pairs=pairs, progress=workshop.progress)


def _scored(candidate: Candidate, study: Study, workshop: Workshop) -> Candidate:
    workshop.progress(f"building and scoring trial {candidate.number}")
    return study.add(candidate.plan, workshop.evaluate(candidate.plan), origin="retarget")


def _breaks(candidate: Candidate, old: Study, run: RunConfig) -> bool:
    """Return whether a candidate breaks a constraint on this target, too, as far as that is known before."""
    apart = {"latency_ms", "latency_ratio", "memory_mb"}
    if run.target.runtime != old.run.target.runtime:
        apart.add("size_mb")
    found = excesses(candidate.score, run.constraints, old.reference)
    return any(excess > 0 for name, excess in found.items() if name not in apart)


def _runs_as_it_is(candidate: Candidate, old: Study, run: RunConfig) -> bool:
    """Return whether the artefact that was scored computes the same for the new target."""
    here, there = machine.fingerprint(), candidate.score.fingerprint
    same = run.target.runtime == old.run.target.runtime and run.target.precision == old.run.target.precision
    # Another version may compute otherwise, of the runtime or of what is made for it.
    same = same and old.identity.outdated is None
    same = same and here["versions"].get(run.target.runtime) == there["versions"].get(run.target.runtime)
    overflows = machine.adds_in_16_bits(here) != machine.adds_in_16_bits(there)
    return same and not (candidate.plan.integer_arithmetic and overflows)
