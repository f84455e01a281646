"""The public functions: search, recover, export, measure and what leads to them. The command line only calls these."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autocompress import delivery, machine, model
from autocompress.binding import bind
from autocompress.config import RunConfig
from autocompress.errors import StudyError
from autocompress.evaluate import Progress, Workshop, silent
from autocompress.pareto import Front
from autocompress.plan import MODEL_SITE, CompressionPlan, Recover
from autocompress.records import Candidate
from autocompress.report import page, tables
from autocompress.report.tables import write_aside
from autocompress.space import SearchSpace
from autocompress.study import Study, identity_of
from autocompress.transforms import check_plan

ENVIRONMENT_SCHEMA = 1
RESULTS = Path("results")


def search(run: RunConfig, out: str | Path | None = None, *, progress: Progress = silent) -> Study:
    """Run a search to its number of trials, continuing what already stands in the results folder.

    Args:
        run: the run file.
        out: results folder, by default ``results/<name>``.
        progress: told what happens, a line at a time.

    Returns:
        The study, open for reading.

    Raises:
        AutocompressError: if the run cannot be started or continued; finished candidates are kept in any case.
    """
    folder = results_folder(run, out)
    started = time.perf_counter()
    workshop = Workshop(run, folder / "artefacts", progress)
    space = workshop.space
    _ensure_environment(folder, workshop, progress)
    data = f"{workshop.task.fingerprint}, {run.data.max_tokens} tokens"
    identity = identity_of(run, model=workshop.teacher.base, data=data, space=space)
    # Latencies of two machines are not to be mixed in one study.
    identity["machine"] = machine.fingerprint()["id"]
    study = Study(folder, run, identity=identity, space=space, writable=True)
    try:
        if study.repaired is not None:
            progress(f"the study's last record was torn and was cut off; the file as it was: {study.repaired.name}")
        if study.interrupted:
            progress(f"{study.interrupted} interrupted candidates are evaluated again")
        write_aside(folder / "run.yaml", run.to_yaml())
        if study.remaining:
            total, reference = run.search.trials, study.reference
            progress(f"evaluating {study.remaining} of {total} candidates with {workshop.runtime.name}")

            def told(candidate: Candidate) -> None:
                progress(tables.candidate_line(candidate, study.finished, total, reference))
                tables.write_csv(study.candidates(), folder / "study.csv")
                if run.search.keep_artefacts == "front":
                    _drop_dominated(study, workshop.artefacts)

            # Ray is imported where it is needed: a finished search only rewrites its report.
            from autocompress.distribute import execute

            execute(study, _run_for_workers(workshop), workshop.artefacts, told)
            if study.remaining:
                progress(f"{study.remaining} candidates are left: the space holds no others, or Ray was stopped")
        write_results(study, workshop)
        spent = time.perf_counter() - started
        progress(f"{study.finished} candidates, {len(study.front())} on the front; {spent:.0f} s")
    finally:
        study.close()
    return open_study(folder)


def _drop_dominated(study: Study, artefacts: Path) -> None:
    """Delete the artefacts of finished candidates that are not on the front; others may be in the making."""
    front = {c.plan.plan_id for c in study.front().points}
    for candidate in study.candidates():
        if candidate.plan.plan_id not in front:
            shutil.rmtree(artefacts / candidate.plan.plan_id, ignore_errors=True)


def _run_for_workers(workshop: Workshop) -> RunConfig:
    """Return the run with everything resolved to what the driver found, so that workers look nothing up."""
    settings = workshop.run.model_dump(mode="json", by_alias=True)
    settings["storage"]["bank"] = str(workshop.bank.root.absolute())
    source = Path(settings["data"]["source"])
    settings["data"]["source"] = str(source.absolute()) if source.exists() else settings["data"]["source"]
    settings["model"]["id"] = str(workshop.source.absolute())
    space = Path(settings["space"])
    settings["space"] = str(space.absolute()) if space.suffix in (".yaml", ".yml") else settings["space"]
    return RunConfig.from_mapping(settings)


def _ensure_environment(folder: Path, workshop: Workshop, progress: Progress) -> None:
    """Write ``environment.json``, measuring the reference, unless both are there for this model, data and target."""
    file = folder / "environment.json"
    target = workshop.run.target.model_dump()
    key = {"model": workshop.teacher.base, "data": workshop.task.fingerprint, "target": target}
    if file.exists() and (folder / "artefacts" / "reference").is_dir():
        try:
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise StudyError(f"{file}: not readable as JSON ({error})") from None
        if found.get("schema") != ENVIRONMENT_SCHEMA:
            raise StudyError(f"{file}: schema must be {ENVIRONMENT_SCHEMA}, got {found.get('schema')!r}")
        if (folder / "study.journal").exists() or found.get("key") == key:
            return
    progress("measuring the uncompressed model")
    measured = workshop.score(workshop.build(CompressionPlan(), workshop.reference_folder))
    environment = {
        "schema": ENVIRONMENT_SCHEMA,
        "reference": dataclasses.asdict(measured),
        "machine": machine.fingerprint(),
        "target": target,
        "runtime_options": workshop.fingerprint["runtime_options"],
        "protocol": {
            "accuracy": f"through the artefact, {measured.rows} search rows, real lengths up to "
            f"{workshop.run.data.max_tokens} tokens, 95 % Wilson interval",
            "size": "bytes of the artefact's model files",
            "latency": f"{workshop.run.search.latency_pairs} pairs of candidate and reference in turn, inputs of "
            f"{workshop.run.target.batch_size} x {workshop.run.target.tokens} tokens, "
            + ("process CPU time" if workshop.run.target.threads == 1 else "wall clock in an exclusive slot")
            + ", median of the pairs' ratios with its 95 % bootstrap interval",
        },
        "key": key,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_aside(file, json.dumps(environment, indent=1))


def write_results(study: Study, workshop: Workshop | None = None) -> None:
    """Write ``study.csv``, ``pareto.csv`` and ``report.html`` from the study."""
    folder, front = study.folder, study.front()
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    shown = {k: v for k, v in environment.items() if k not in ("reference", "key", "schema")}
    notes = []
    if workshop is not None and workshop.task.shared_rows:
        notes.append(f"{workshop.task.shared_rows} texts stand in two splits; the run file accepts that.")
    tables.write_csv(study.candidates(), folder / "study.csv")
    tables.write_csv(front.points, folder / "pareto.csv")
    page.write_report(
        folder / "report.html",
        title=study.run.name,
        front=front,
        candidates=study.candidates(),
        environment=shown,
        notes=notes,
    )


def results_folder(run: RunConfig, out: str | Path | None) -> Path:
    """Return the results folder, made and proven writable.

    Raises:
        StudyError: if it cannot be written to, or the default one leads out of ``results``.
    """
    folder = Path(out) if out is not None else RESULTS / run.name
    try:
        inside = out is not None or folder.resolve().is_relative_to(RESULTS.resolve())
    except (OSError, RuntimeError):  # a link to itself
        inside = False
    if not inside:
        raise StudyError(f"{folder}: leads out of {RESULTS}; give the folder with --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        (folder / "artefacts").mkdir(exist_ok=True)
    except OSError as error:
        raise StudyError(f"{folder}: cannot be written to ({error.strerror}); give another folder with --out") from None
    return folder


def open_study(folder: str | Path) -> Study:
    """Open the study in a results folder for reading.

    Raises:
        StudyError: if there is none.
    """
    folder = Path(folder)
    file = folder / "run.yaml"
    if not file.exists():
        raise StudyError(f"{folder}: holds no run.yaml; give the results folder of a search")
    return Study(folder, RunConfig.from_file(file))


def _home(candidate: Candidate) -> Path:
    if candidate.folder is None:
        raise StudyError(f"trial {candidate.number}: belongs to no study; take it from search() or open_study()")
    return candidate.folder


def recover(candidate: Candidate, *, epochs: float | None = None, progress: Progress = silent) -> Candidate:
    """Distil a candidate's structure from the teacher, build and measure it again, and add it to its study.

    Args:
        candidate: a point of a study.
        epochs: passes over the training rows, by default the run file's ``recovery.epochs``.
        progress: told what happens, a line at a time.

    Returns:
        The new candidate; the old one stays as it is.
    """
    folder = _home(candidate)
    run = RunConfig.from_file(folder / "run.yaml")
    plan = candidate.plan.with_decision(MODEL_SITE, Recover(epochs=run.recovery.epochs if epochs is None else epochs))
    study = Study(folder, run, writable=True)
    try:
        workshop = Workshop(run, folder / "artefacts", progress)
        recovered = study.add(plan, workshop.evaluate(plan), origin="recover")
        write_results(study, workshop)
    finally:
        study.close()
    return recovered


def export(
    candidate: Candidate,
    out: str | Path,
    *,
    formats: Sequence[str] = ("openvino",),
    force: bool = False,
    progress: Progress = silent,
) -> dict[str, delivery.Export]:
    """Ship a candidate: its artefact, tokenizer, card and reference, reloaded and compared in a fresh process.

    Args:
        candidate: a point of a study's front.
        out: an empty or new folder; with several formats each gets a folder of its name in it.
        formats: ``openvino``, ``onnx``.
        force: accept a folder that is not empty.
        progress: told what happens, a line at a time.

    Returns:
        What was exported, by format, with the accuracy on the held-out test split.

    Raises:
        ExportError: if the folder is taken, the artefact is gone, or the copy does not reproduce its score.
    """
    folder = _home(candidate)
    run = RunConfig.from_file(folder / "run.yaml")
    return delivery.export(candidate, run, Path(out), formats=formats, force=force, progress=progress)


def measure(folder: str | Path, *, pairs: int = delivery.CONFIRMING_PAIRS) -> dict[str, Any]:
    """Time an exported folder on this machine against the reference that it carries.

    Returns:
        The latency now, the stored one, and the machine that each comes from.
    """
    return delivery.measure(Path(folder), pairs=pairs)


def finetune(run: RunConfig, *, progress: Progress = silent) -> Path:
    """Return the folder of the classifier that a search starts from, fine-tuning it if it has no head for the task."""
    with tempfile.TemporaryDirectory() as scratch:
        return Workshop(run, Path(scratch), progress).teacher_folder


def validate(run: RunConfig) -> dict[str, Any]:
    """Check everything of a run that can be checked without training: model, data, space and target.

    Returns:
        What was found: the model's sizes, rows per split, classes, and the space's parameters.

    Raises:
        AutocompressError: for the first thing that is wrong.
    """
    space_file = SearchSpace.load(run.space)
    with tempfile.TemporaryDirectory() as scratch:
        workshop = Workshop(run, Path(scratch))
        loaded = model.load(workshop.source, labels=workshop.task.labels)
    space = bind(space_file, loaded.shape)
    ladder = space.ladder()
    for params in ladder:
        plan = space.plan(params)
        check_plan(plan, loaded.shape)
        workshop.runtime.check(plan, loaded.shape)
    return {
        "model": {
            "id": run.model.id,
            "blocks": len(loaded.shape.blocks),
            "hidden": loaded.shape.hidden,
            "heads": loaded.shape.blocks[0].heads,
            "neurons": loaded.shape.blocks[0].neurons,
            "parameters": loaded.parameters(),
            "has_head": model.head_labels(workshop.source) is not None,
        },
        "data": {
            "classes": list(workshop.task.labels),
            "rows": {name: len(rows) for name, rows in workshop.task.splits.items()},
        },
        "space": {
            "name": space_file.name,
            "students": {name: s.words() for name, s in space.students.items()},
            "seeds": [space.plan(p).words() for p in ladder],
            "parameters": sorted({name for p in ladder for name in p}),
        },
        "target": run.target.model_dump(),
    }


def status(folder: str | Path) -> dict[str, Any]:
    """Return how far a study is: counts by state, the front's size, and what is on disk."""
    study = open_study(folder)
    candidates = study.candidates()
    artefacts = study.folder / "artefacts"
    sizes = [f.stat().st_size for f in artefacts.rglob("*") if f.is_file()] if artefacts.is_dir() else []
    return {
        "study": study.run.name,
        "complete": sum(c.state == "COMPLETE" for c in candidates),
        "failed": sum(c.state == "FAIL" for c in candidates),
        "wanted": study.run.search.trials,
        "front": len(study.front()),
        "artefact_bytes": sum(sizes),
    }


def pick(front: Front, limits: Mapping[str, Any], *, trial: int | None = None) -> Candidate:
    """Return a trial of the front by number, or by `Front.pick`'s rules."""
    return front.trial(trial) if trial is not None else front.pick(**limits)
