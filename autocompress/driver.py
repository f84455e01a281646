"""One search from start to end: the reference, candidates, recovered points, confirmed latencies, baselines, results.

The driver is the only process that writes the study. Whatever is interrupted here is continued by the same command.
"""

from __future__ import annotations

import gc
import json
import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autocompress.cluster import Cluster
from autocompress.config import RunConfig
from autocompress.distribute import Workers
from autocompress.evaluate import Workshop
from autocompress.execute import execute
from autocompress.forecast import count_plans
from autocompress.identity import identity_of
from autocompress.journal import held
from autocompress.records import Candidate
from autocompress.reference import ensure_reference, has_reference, is_measured, reference_key
from autocompress.refine import drop_dominated, refine
from autocompress.report import tables
from autocompress.report.tables import write_aside
from autocompress.results import BASELINES, STAGE, write_predictions, write_results
from autocompress.seeds import count_uniform
from autocompress.status import SearchStatus, status_of
from autocompress.stopwatch import Stopwatch
from autocompress.storage import holds_study
from autocompress.study import Study
from autocompress.trackers import Trackers
from autocompress.trained import Progress

if TYPE_CHECKING:
    from autocompress.depot import Depot

_TABLE_SECONDS = 5.0
"""Least time between two writes of ``study.csv`` while candidates come in."""
_TABLE_SHARE = 0.01
"""Part of the time that they may take: that of thousands of candidates takes seconds."""

Watch = Callable[[SearchStatus], None]


def drive(
    run: RunConfig, folder: Path, *, progress: Progress, watch: Watch | None = None, cluster: Cluster | None = None
) -> None:
    """Run or continue the search of ``run`` in ``folder`` to its end and write its results."""
    try:
        _drive(run, folder, progress, watch, cluster)
    finally:
        # Models hang on a few Python objects that refer to each other: too few for the collector to come by itself.
        gc.collect()


def _drive(run: RunConfig, folder: Path, progress: Progress, watch: Watch | None, cluster: Cluster | None) -> None:
    clock = Stopwatch()
    with ExitStack() as stack, clock("all"):
        stack.enter_context(held(folder, needed=run.storage.study is None))  # before anything is written there
        with clock("start"):
            trackers = Trackers(run, folder, progress)
            workshop = Workshop(run, folder / "artefacts", progress)
            # They start while the model is loaded. A study that is there already may be finished, and need none.
            idle = holds_study(folder) and not run.search.device
            exchange = None if cluster is None else _exchange(workshop, folder)
            workers = None if idle else stack.enter_context(_workers(workshop, cluster, exchange))
            workshop.space  # noqa: B018 - loads the model, which is then there for the workers, too
            if not has_reference(folder, workshop):  # workers must not load one of another model
                shutil.rmtree(folder / "artefacts" / "reference", ignore_errors=True)
            if workers is not None:
                workers.open()
        with clock("reference"):
            study = open_for_writing(run, folder, workshop, progress)
        latest = ""

        def stage(said: str, how_far: str = "") -> None:
            """Let those who follow see what stands, and what takes minutes now."""
            nonlocal latest
            if said != latest:
                latest = said
                tables.write_csv(study.candidates(), folder / "study.csv")
                write_aside(folder / STAGE, said)
            if watch is not None:
                watch(status_of(study, workshop, stage=f"{said}{how_far}"))

        try:
            if study.repaired is not None:
                progress(f"the study's last record was torn and was cut off; the file as it was: {study.repaired.name}")
            if study.interrupted:
                progress(f"{study.interrupted} interrupted candidates are evaluated again")
            unknown = sum(c.measurement is not None and not c.score.peak_memory_bytes for c in study.candidates())
            if unknown and run.constraints.max_memory_mb is not None:
                progress(f"{unknown} candidates were measured without their memory and cannot keep to max_memory_mb")
            write_aside(folder / "run.yaml", run.to_yaml())
            trackers.tell(study.candidates())
            if exchange is not None:  # what was told before the driver could fetch it
                for candidate in study.front().points:
                    if not (workshop.artefacts / candidate.plan.plan_id).is_dir():
                        _fetch(exchange, study, candidate, workshop.artefacts)
            if study.remaining:
                (folder / STAGE).unlink(missing_ok=True)  # of one that was ended there, and had fewer trials
                workers = workers or stack.enter_context(_workers(workshop, cluster, exchange))
                with clock("candidates"):
                    _evaluate(study, workshop, workers, trackers, progress, watch, exchange)
            # Workers end once what is to be timed is loaded, unless that is elsewhere, where they are needed to go.
            quiet = workers.stop if workers is not None and workshop.gauge.device is None else None
            refine(study, workshop, clock, quiet=quiet, progress=progress, stage=stage)
            if workers is not None:
                workers.stop()  # a baseline has a Ray of its own
            write_predictions(study)
            with clock("baselines"):
                for name in run.baselines:
                    _baseline(name, study, workshop, progress, cluster, stage)
            with clock("results"):
                trackers.tell(study.candidates())
                workshop.bank.trim()
                write_results(study)
                (folder / STAGE).unlink(missing_ok=True)
        finally:
            study.close()
    spent = {"driver": clock.seconds, "bank": workshop.bank.made_seconds, "ask": study.ask_seconds}
    write_aside(folder / "timing.json", json.dumps(spent, indent=1))
    progress(f"{study.finished} candidates, {len(study.front())} on the front; {clock.seconds['all']:.0f} s")


def open_for_writing(run: RunConfig, folder: Path, workshop: Workshop, progress: Progress) -> Study:
    """Begin or continue the study of ``run`` in ``folder``, which is `held`, with the uncompressed model measured."""
    if not (holds_study(folder) and is_measured(folder)):
        ensure_reference(folder, workshop, progress)
    key = reference_key(workshop)
    identity = identity_of(run, model=key["model"], data=key["data"], space=workshop.space)
    # Latencies of two machines are not to be mixed in one study.
    identity["machine"] = workshop.gauge.machine["id"]
    settings: dict[str, Any] = {"identity": identity, "space": workshop.space, "predictor": workshop.predictor}
    study = Study(folder, run, **settings, writable=True, is_held=True)
    try:  # only now, when it is known that the study is of this model
        ensure_reference(folder, workshop, progress)
    except BaseException:
        study.close()
        raise
    return study


def _exchange(workshop: Workshop, folder: Path) -> Depot | None:
    """Return where the artefacts of the search in ``folder`` go to and fro, if its run file names shared storage."""
    if workshop.bank.depot is None:
        return None
    file = folder / "exchange.json"
    if not file.exists():  # the same at every command, so that what an interrupted one left there goes
        write_aside(file, json.dumps({"name": f"artefacts/{uuid.uuid4().hex}"}))
    return workshop.bank.depot.within(json.loads(file.read_text(encoding="utf-8"))["name"])


def _workers(workshop: Workshop, cluster: Cluster | None, exchange: Depot | None) -> Workers:
    run = _run_for_workers(workshop, elsewhere=cluster is not None)
    where = None if exchange is None else exchange.url
    workers = Workers(run, workshop.artefacts, workshop.progress, cluster=cluster, exchange=where)
    if run.search.device:
        workshop.gauge.use(workers.on_device)
    return workers


def _evaluate(
    study: Study,
    workshop: Workshop,
    workers: Workers,
    trackers: Trackers,
    progress: Progress,
    watch: Watch | None,
    exchange: Depot | None = None,
) -> None:
    """Have the remaining candidates evaluated."""
    run = study.run
    total, reference = run.search.trials, study.reference
    progress(f"evaluating {study.remaining} of {total} candidates with {workshop.runtime.name}")
    if run.search.seeds and total <= (uniform := count_uniform(workshop.space)):
        progress(
            f"a search starts with {uniform} uniform plans, and {total} trials leave nothing to search for beyond "
            f"them; give more, such as --set search.trials={2 * uniform}"
        )
    plans, _ = count_plans(workshop.space)
    if plans < total:
        progress(f"the space holds {plans} plans, fewer than that")
    if not run.search.seeds and workshop.space.space.drop_blocks is not None:
        workshop.make_students()  # a plan that drops blocks of one needs it when it is drawn
    began, before, due = time.perf_counter(), study.finished, 0.0

    def told(candidate: Candidate) -> None:
        nonlocal due
        if exchange is not None:
            _fetch(exchange, study, candidate, workshop.artefacts)
        progress(tables.candidate_line(candidate, study.finished, total, reference))
        if (started := time.perf_counter()) >= due:
            tables.write_csv(study.candidates(), study.folder / "study.csv")
            ended = time.perf_counter()
            due = ended + max(_TABLE_SECONDS, (ended - started) / _TABLE_SHARE)
        trackers.tell([candidate])
        if run.search.keep_artefacts == "front":
            drop_dominated(study, workshop.artefacts, candidate)
        if watch is not None:
            each = (time.perf_counter() - began) / (study.finished - before)
            end = min(total, plans)
            watch(status_of(study, workshop, total=end, seconds_each=each, untrained=workshop.untrained))

    if exchange is not None:
        exchange.put(workshop.reference_folder.name, workshop.reference_folder)
    execute(study, workers=workers, prepare=workshop.prepare, alone=workshop.needs_training, told=told)
    if exchange is not None:
        exchange.clear()
    if study.remaining:
        progress(f"{study.remaining} candidates are left: the space holds no others, or Ray was stopped")


def _fetch(exchange: Depot, study: Study, candidate: Candidate, artefacts: Path) -> None:
    """Bring a candidate's artefact here if it is to be kept, and let it take no room where it was left."""
    if candidate.state != "COMPLETE":
        return
    plan_id = candidate.plan.plan_id
    kept = [*study.front().points, *study.contenders([candidate])]
    if study.run.search.keep_artefacts == "all" or candidate in kept:
        aside = artefacts / f".{plan_id}.{uuid.uuid4().hex}"
        aside.mkdir()
        try:
            if exchange.get(plan_id, aside):
                shutil.rmtree(artefacts / plan_id, ignore_errors=True)
                aside.rename(artefacts / plan_id)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    exchange.remove(plan_id)


def _baseline(
    name: str,
    study: Study,
    workshop: Workshop,
    progress: Progress,
    cluster: Cluster | None,
    stage: Callable[[str, str], None],
) -> None:
    """Run a search to hold this one against, in a folder of its own, with as many evaluations."""
    folder = study.folder / BASELINES / name
    (folder / "artefacts").mkdir(parents=True, exist_ok=True)
    settings = study.run.model_dump(mode="json", by_alias=True)
    settings["baselines"], settings["trackers"] = [], []
    settings["search"] |= {"sampler": name, "seeds": False, "skip_behind": False}
    settings["search"] |= {"reconstruct": False, "recover": 0}
    if not (folder / "artefacts" / "reference").is_dir():
        shutil.copytree(workshop.reference_folder, folder / "artefacts" / "reference")
        write_aside(folder / "environment.json", (study.folder / "environment.json").read_text(encoding="utf-8"))
    progress(f"baseline: {name} search with {study.run.search.trials} candidates")
    run, said = RunConfig.from_mapping(settings), lambda line: progress(f"{name}: {line}")

    def watched(status: SearchStatus) -> None:
        now = f", {status.stage}" if status.stage else ""
        stage(f"a {name} search to hold it against", f": {status.done} of {status.total} candidates{now}")

    drive(run, folder, progress=said, watch=watched, cluster=cluster)


def _run_for_workers(workshop: Workshop, *, elsewhere: bool) -> RunConfig:
    """Return the run with everything resolved to what the driver found, so that workers look nothing up.

    Args:
        workshop: of the run.
        elsewhere: whether they are on other machines: these find copies in the bank, which all of them see, or in what
            their banks share.
    """
    bank, settings = workshop.bank, workshop.run.model_dump(mode="json", by_alias=True)
    if not elsewhere or bank.depot is None:
        settings["storage"]["bank"] = str(bank.root.absolute())

    def found(path: Path) -> str:
        return bank.lent(path) if elsewhere else str(path.absolute())

    source, space = (Path(path).expanduser() for path in (settings["data"]["source"], settings["space"]))
    settings["data"]["source"] = found(source) if source.exists() else settings["data"]["source"]
    settings["model"]["id"] = found(workshop.source)
    settings["space"] = found(space) if space.suffix in (".yaml", ".yml") else settings["space"]
    return RunConfig.from_mapping(settings)
