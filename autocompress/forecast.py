"""What a search will take, before it is begun: counted where it can be counted, else from a few measured moments.

Training is timed over some steps, candidates over a few plans of the space on the model as it is, with a bank of its
own that is thrown away. Nothing of it enters a study.
"""

from __future__ import annotations

import functools
import math
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from autocompress import machine, model, training
from autocompress.binding import NO_STUDENT, BoundSpace, Effect, bind
from autocompress.config import RunConfig
from autocompress.decisions import RECONSTRUCTED, PruneNeurons, Quantize, Student
from autocompress.errors import AutocompressError
from autocompress.evaluate import Workshop
from autocompress.pieces import reads_moments
from autocompress.plan import MODEL_SITE, CompressionPlan
from autocompress.records import Measurement
from autocompress.space import SearchSpace, Value
from autocompress.trained import Progress, silent, torch_threads

_STEPS = 6
"""Training steps that are timed, after one that is not."""
_PLANS = 3
"""Random plans that are built and scored for the full model and for each student."""
_CALIBRATION_ROWS = 256
_RECONSTRUCTION_ROWS = 128
_TAUGHT_ROWS = 128
_FRONT = 40
"""Points that a front has at most, as a rule."""
_START_SECONDS = 15.0
"""Starting Ray and its workers, and reading model and data in each."""


@dataclass(frozen=True)
class Forecast:
    """What a search will take on this machine.

    Args:
        plans: distinct parameter sets of the space.
        parameters: most parameters that one plan has.
        sites: places where decisions are made.
        pieces: entries of the bank, if every combination of choices at every site were taken.
        finetune_seconds: to train the model's head, 0 if it has one.
        students_seconds: to distil all students, where a plan asks for them.
        bank_seconds: importance scores, sensitivities and the reference.
        candidate_seconds: wall time a candidate, with all workers at work.
        recovered_seconds: at most, of the points that are reconstructed or trained at the end.
        total_seconds: the whole search with its number of trials, from an empty bank.
        disk_mb: bank and artefacts, 1e6 bytes.
        memory_mb: driver and workers, 1e6 bytes.
    """

    plans: int
    parameters: int
    sites: int
    pieces: int
    finetune_seconds: float
    students_seconds: float
    bank_seconds: float
    candidate_seconds: float
    recovered_seconds: float
    total_seconds: float
    disk_mb: float
    memory_mb: float

    def to_dict(self) -> dict[str, Any]:
        return {name: round(v, 2) if isinstance(v, float) else v for name, v in asdict(self).items()}


def count_plans(space: BoundSpace) -> tuple[int, int]:
    """Return the number of distinct parameter sets and the most parameters that one of them has."""
    space = space.without_order()
    total, most = 0, 0
    deepest = space.space.drop_blocks.at_most if space.space.drop_blocks is not None else 0
    for base in (NO_STUDENT, *space.students):
        seen: set[tuple[str, Value]] = set()
        for dropped in range(deepest + 1):
            fixed: dict[str, Value] = {}
            free: dict[str, int] = {}
            whole: dict[str, int] = {}

            def pick(
                name: str,
                choices: Sequence[Value],
                effect: Callable[[Value], Effect],
                base: str = base,
                dropped: int = dropped,
                fixed: dict[str, Value] = fixed,
                free: dict[str, int] = free,
                whole: dict[str, int] = whole,
            ) -> Value:
                if name == "student" or name.startswith("drop_blocks"):
                    fixed[name] = base if name == "student" else min(dropped, max(int(c) for c in choices))
                    return fixed[name]
                if name != "reconstruct":
                    free[name], whole[name] = len(choices), sum(not _removes(effect(choice)) for choice in choices)
                return choices[0]

            space.walk(pick)
            upper = next((item for item in fixed.items() if item[0] != "student"), ("drop_blocks", 0))
            if upper in seen:  # a shallow student cannot lose as many blocks
                continue
            seen.add(upper)
            of_base = math.prod(free.values())
            removing = of_base - (0 if upper[1] else math.prod(whole.values()))
            run_once = base == NO_STUDENT or space.students[base].share == 1
            asked = len(space.space.reconstruct or ()) == 2 and run_once and removing > 0
            total += of_base + removing * asked
            most = max(most, len(fixed) + len(free) + asked)
    return total, most


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _judging_seconds(workshop: Workshop, space: BoundSpace, student: Student | None, scored: float) -> float:
    """Return what it takes to know what decisions do to a model, with ``scored`` times the calibration rows."""
    base, scores = workshop.base(student)
    found = 0.0
    if any(reads_moments(site, [d]) for site, offered in space.options(base.shape).items() for d in offered):
        assert scores.moments is not None
        found += scored * _seconds(functools.partial(scores.moments, 0, "output"))
    # It takes no more rows than there are in a forecast.
    return found + _seconds(functools.partial(workshop.sensitivity, student))


def _removes(effect: Effect) -> bool:
    return any(decision is not None and decision.structural for decision in effect.values())


def forecast(run: RunConfig, progress: Progress = silent) -> Forecast:
    """Count what a search has to do and time a little of it; takes some tens of seconds, or minutes with students.

    Raises:
        AutocompressError: if the run could not be started either.
    """
    with tempfile.TemporaryDirectory() as scratch:
        settings = run.timed_here().model_dump(mode="json", by_alias=True)
        settings["data"]["calibration_rows"] = min(run.data.calibration_rows, _CALIBRATION_ROWS)
        settings["data"]["reconstruction_rows"] = min(run.data.reconstruction_rows, _RECONSTRUCTION_ROWS)
        settings["storage"] |= {"bank": str(Path(scratch) / "bank"), "shared": None}
        workshop = Workshop(RunConfig.from_mapping(settings), Path(scratch) / "artefacts")
        headed = model.head_labels(workshop.source) is not None
        loaded = workshop.loaded(workshop.source)
        # The time of a forward pass does not depend on what was learned.
        workshop.__dict__["teacher"] = loaded
        space = bind(
            SearchSpace.load(run.space), loaded.shape, tokens=run.target.tokens, most_tokens=run.data.max_tokens
        )
        progress(f"timing a few training steps of {run.model.id}")
        epoch = _epoch_seconds(workshop, loaded)
        progress("timing the uncompressed model, its importance scores and sensitivities")
        started = time.perf_counter()
        reference = workshop.score(workshop.build(CompressionPlan(), workshop.reference_folder))
        bank_seconds = time.perf_counter() - started
        scored = run.data.calibration_rows / workshop.run.data.calibration_rows
        bank_seconds += scored * _seconds(lambda: workshop.base(None)) + _judging_seconds(workshop, space, None, scored)
        fitted = min(run.data.reconstruction_rows, len(workshop.task.splits["train"])) / workshop.reconstruction_rows
        students = _teacher_seconds(workshop) if space.students or run.search.recover else 0.0
        for student in space.students.values():
            progress(f"timing a few training steps of a {student.words()}, and its scores")
            cut = workshop.cut(student)
            students += student.epochs * _epoch_seconds(workshop, cut, distilled=True)
            # As a student that was distilled: neither building nor running it depends on what it learned.
            bank_seconds += scored * _seconds(functools.partial(workshop.adopt, student, cut))
            bank_seconds += _judging_seconds(workshop, space, student, scored)
        search, offered = run.search, True in (space.space.reconstruct or ())
        if offered or search.reconstruct or (search.recover and run.recovery.reconstruct):
            progress("timing the reconstruction of weights")
            for start in (None, *space.students.values()) if offered else (None,):
                base, scores = workshop.base(start)
                bank_seconds += scored * _seconds(functools.partial(workshop.made_up_for, base, scores))
                bank_seconds += fitted * _seconds(functools.partial(workshop.sums(base), 0, "output"))
        progress(f"building and scoring {_PLANS} plans from each base")
        each, sizes = _candidates(workshop, space, fitted=fitted)
        recovered = _recovered_seconds(workshop, each, epoch=epoch, fitted=fitted)
        plans, parameters = count_plans(space)
        trials = min(search.trials, plans)
        most_fitted = trials if offered else min(trials, _FRONT) if search.reconstruct else 0
        fitted_mb = _fitted_bytes(workshop, fitted=fitted, models=most_fitted) / 1e6
    cores, threads = machine.cores(), run.target.threads
    workers = 1 if threads > 1 else run.search.workers or max(1, cores // threads)
    candidate = each / min(workers, cores)
    finetune = 0.0 if headed else epoch * run.model.finetune.epochs
    pieces = _count_pieces(space) * (1 + len(space.students))
    searched = candidate * trials * (1 + len(run.baselines))
    total = finetune + students + bank_seconds + _START_SECONDS + searched + recovered
    weights = reference.size_bytes / 1e6
    return Forecast(
        plans=plans,
        parameters=parameters,
        sites=len(loaded.shape.sites()),
        pieces=pieces,
        finetune_seconds=finetune,
        students_seconds=students,
        bank_seconds=bank_seconds,
        candidate_seconds=candidate,
        recovered_seconds=recovered,
        total_seconds=total,
        disk_mb=weights * (2 + len(space.students)) + 2 * sizes / 1e6 * min(trials, _FRONT) + fitted_mb,
        memory_mb=(1 + workers) * (600 + 6 * weights),
    )


def _count_pieces(space: BoundSpace) -> int:
    """Return how many combinations of decisions the sites of the full model can have."""
    total = 0
    for site, decisions in space.options(space.shape).items():
        if site == MODEL_SITE:
            continue
        by_type = Counter(type(decision) for decision in decisions)
        # Bits are always decided; a site may also be left unpruned or whole.
        total += math.prod(count + (kind is not Quantize) for kind, count in by_type.items())
    return total


def _epoch_seconds(workshop: Workshop, built: model.EncoderModel, *, distilled: bool = False) -> float:
    """Return the time of one pass over the training rows, from a few steps on a copy of a model."""
    rows = workshop.splits["train"]
    size = (workshop.run.recovery if distilled else workshop.run.model.finetune).batch_size
    budget = training.TrainingBudget(
        epochs=(_STEPS + 1) * size / len(rows), learning_rate=1e-5, batch_size=size, precision=workshop.precision()
    )
    moments: list[float] = []

    def note(_: str) -> None:
        moments.append(time.perf_counter())

    module = built.clone().module
    with torch_threads(machine.cores()):
        if distilled:
            logits = torch.zeros(len(rows), len(workshop.task.labels))
            frozen = built.layout.embeddings
            training.distill(module, logits, rows, budget, frozen=frozen, seed=0, progress=note)
        else:
            training.finetune(module, rows, budget, seed=0, progress=note)
    return (moments[-1] - moments[0]) / (len(moments) - 1) * math.ceil(len(rows) / size)


def _teacher_seconds(workshop: Workshop) -> float:
    """Return the time of what the uncompressed model says of all training rows, which others are distilled by."""
    if not workshop.run.recovery.alpha:
        return 0.0
    rows = workshop.splits["train"]
    some = rows.head(_TAUGHT_ROWS)
    with torch_threads(machine.cores()):
        run = functools.partial(training.logits_of, workshop.teacher.module, some, precision=workshop.precision())
        run()  # the first one prepares itself
        return _seconds(run) * len(rows) / len(some)


def _recovered_seconds(workshop: Workshop, each: float, *, epoch: float, fitted: float) -> float:
    """Return the time of what is done at the end, as if hardly anything had been removed: no point takes longer.

    Args:
        workshop: with a part of the rows that are fitted on.
        each: seconds of a candidate.
        epoch: seconds of a pass over the training rows.
        fitted: how many times as many rows there are.
    """
    asked, search, fit = workshop.run.recovery, workshop.run.search, 0.0
    if search.reconstruct or (search.recover and asked.reconstruct):
        started = time.perf_counter()
        # What is left of the first block is fitted, and all that comes behind it.
        least = PruneNeurons(keep=workshop.teacher.shape.blocks[0].neurons - 1)
        workshop.structured(CompressionPlan((("block.0.ffn", least),)).recovered(RECONSTRUCTED))
        fit = (time.perf_counter() - started) * fitted
    passes = workshop.affordable_passes if asked.epochs == "auto" else asked.epochs * asked.seeds
    trained = search.recover * (each + passes * epoch + (fit if asked.reconstruct else 0.0))
    return trained + (min(search.trials, _FRONT) * (each + fit) if search.reconstruct else 0.0)


def _fitted_bytes(workshop: Workshop, *, fitted: float, models: int) -> float:
    """Return what the bank holds at most of what ``models`` are reconstructed by and to, with all of the rows."""
    usage, found = workshop.bank.usage(), 0.0
    if (sums := usage.get("sums")) is not None:
        found += sums.bytes * fitted
    if (kept := usage.get("reconstructed")) is not None:
        found += kept.bytes / kept.entries * models
    return min(found, 1e9 * workshop.run.storage.bank_gb)


def _candidates(workshop: Workshop, space: BoundSpace, *, fitted: float) -> tuple[float, float]:
    """Return mean seconds and bytes of random plans of the space, as many from each base.

    Those that are reconstructed are so with a part of the rows, of which there are ``fitted`` times as many.
    """
    rng = random.Random(0)  # noqa: S311 - a draw, not a secret
    before, workshop.threads = workshop.threads, workshop.run.target.threads  # that a worker has
    measured: list[Measurement] = []
    refused: AutocompressError | None = None
    for base in (NO_STUDENT, *space.students):
        found = 0
        for _ in range(4 * _PLANS):
            plan = space.decode(
                lambda name, choices, base=base: base if name == "student" else rng.choice(choices)  # type: ignore[misc]
            )
            try:
                measured.append(workshop.evaluate(plan))
                found += 1
            except AutocompressError as error:  # a search records it as failed and goes on
                refused = error
            if found == _PLANS:
                break
    if not measured:
        assert refused is not None
        raise refused
    workshop.threads = before
    more = (fitted - 1) * workshop.bank.made_seconds.get("reconstructed", 0.0) / len(measured)
    return mean(m.seconds for m in measured) + more, mean(m.size_bytes for m in measured)
