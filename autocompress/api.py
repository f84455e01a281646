"""The public functions: search, recover, export, measure and what leads to them. The command line only calls these."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from autocompress import delivery, driver, exported, hub, model
from autocompress.bank import Bank
from autocompress.binding import bind
from autocompress.cluster import Cluster
from autocompress.config import OF_PICKED_POINTS, RunConfig
from autocompress.decisions import DropBlocks
from autocompress.distribute import Workers
from autocompress.errors import ConfigError, StudyError
from autocompress.evaluate import Workshop
from autocompress.forecast import Forecast
from autocompress.forecast import forecast as _forecast
from autocompress.journal import LOCK, held
from autocompress.live import HOST, Live, server_of
from autocompress.plan import MODEL_SITE, CompressionPlan
from autocompress.records import Candidate
from autocompress.reference import require_same_runtime, restore_reference
from autocompress.refine import confirm_with_front
from autocompress.results import write_results
from autocompress.retarget import Moved
from autocompress.retarget import retarget as _retarget
from autocompress.salvage import Salvaged
from autocompress.salvage import salvage as _salvage
from autocompress.seeds import uniform_ladder
from autocompress.space import SearchSpace
from autocompress.study import Study
from autocompress.trackers import Trackers
from autocompress.trained import Progress, bank_root, silent

RESULTS = Path("results")


def search(
    run: RunConfig,
    out: str | Path | None = None,
    *,
    progress: Progress = silent,
    watch: driver.Watch | None = None,
    cluster: Cluster | None = None,
) -> Study:
    """Run a search to its number of trials, continuing what already stands in the results folder.

    Args:
        run: the run file.
        out: results folder, by default ``results/<name>``.
        progress: told what happens, a line at a time.
        watch: told how far the search is, after each candidate.
        cluster: whose nodes evaluate candidates, by default this machine; all of them see ``out`` and ``storage.bank``,
            or exchange what they need over ``storage.shared``.

    Returns:
        The study, open for reading.

    Raises:
        AutocompressError: if the run cannot be started or continued; finished candidates are kept in any case.
    """
    with _results_folder(run, out) as folder:
        driver.drive(run, folder, progress=progress, watch=watch, cluster=cluster)
    return open_study(folder)


@contextmanager
def _results_folder(run: RunConfig, out: str | Path | None) -> Iterator[Path]:
    """Make the results folder; a new one goes again if what is done in it fails before it holds anything."""
    new = not results_of(run, out).exists()
    folder = results_folder(run, out)
    try:
        yield folder
    except BaseException:
        if new:
            with suppress(OSError, StudyError), held(folder):  # which holds something by now, or is another driver's
                (folder / "artefacts").rmdir()
                (folder / LOCK).unlink(missing_ok=True)
                folder.rmdir()
        raise


def results_folder(run: RunConfig, out: str | Path | None) -> Path:
    """Return the results folder, made and proven writable.

    Raises:
        StudyError: if it cannot be written to, or the default one leads out of ``results``.
    """
    folder = results_of(run, out)
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


def results_of(run: RunConfig, out: str | Path | None) -> Path:
    """Return where the results of a run are, or will be."""
    return Path(out) if out is not None else RESULTS / run.name


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


def report(folder: str | Path) -> Study:
    """Write ``study.csv``, ``pareto.csv`` and ``report.html`` of a results folder anew; returns its study."""
    study = open_study(folder)
    write_results(study)
    return study


def salvage(folder: str | Path) -> Salvaged:
    """Write what can be read of a damaged study into a new file beside its journal, which stays as it is.

    Raises:
        StudyError: if there is no study, if no line is damaged, or if nothing can be saved.
    """
    return _salvage(Path(folder) / "study.journal")


def retarget(
    folder: str | Path,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    ranks: int = 2,
    progress: Progress = silent,
) -> tuple[Study, list[Moved]]:
    """Measure the best points of a study for another target, or on another machine, into a study of its own.

    Args:
        folder: results folder of the study, which stays as it is.
        out: results folder of the new one.
        overrides: ``target.key=value``.
        ranks: how many non-dominated ranks are taken: 1 for the front, with what it stands for within the noise of
            timings, 2 for what comes next, too.
        progress: told what happens, a line at a time.

    Returns:
        The new study, open for reading, and what became of each point.

    Raises:
        ConfigError: if more than the target is set.
        AutocompressError: if the study cannot be read, or the uncompressed model cannot be measured.
    """
    old = open_study(folder)
    run = RunConfig.from_file(Path(folder) / "run.yaml", overrides=overrides)
    if Path(out).resolve() == Path(folder).resolve():
        raise StudyError(f"{out}: is the study itself; give another folder with --out")
    with _results_folder(run, out) as there:
        moved = _retarget(old, run, there, ranks=ranks, progress=progress)
    return open_study(out), moved


def _home(candidate: Candidate) -> Path:
    if candidate.folder is None:
        raise StudyError(f"trial {candidate.number}: belongs to no study; take it from search() or open_study()")
    return candidate.folder


def recover(
    candidate: Candidate,
    *,
    epochs: float | Literal["auto"] | None = None,
    overrides: Sequence[str] = (),
    progress: Progress = silent,
    cluster: Cluster | None = None,
) -> Candidate:
    """Distil a candidate's structure from the teacher, build and measure it again, and add it to its study.

    Its latency is taken as those of the front are, and with it of those points of the front that were not timed so yet,
    as where the search did not come to its end, and whose artefacts are there.

    Args:
        candidate: a point of a study.
        epochs: passes over the training rows or ``auto``, by default the run file's ``recovery.epochs``.
        overrides: ``recovery.key=value`` for this point alone, of the options that no student depends on.
        progress: told what happens, a line at a time.
        cluster: reaches the device that the study's latencies were measured on, if they were measured on one.

    Returns:
        The new candidate, or that of an earlier recovery just like it; the old one stays as it is.

    Raises:
        ConfigError: if the epochs are out of range, an override would change more than this point, or a cluster is
            given that has nothing to do.
        AutocompressError: if the point cannot be trained, built or measured.
    """
    folder = _home(candidate)
    run = RunConfig.from_file(folder / "run.yaml")
    if epochs is not None:
        overrides = (*overrides, f"recovery.epochs={epochs}")
    asked = RunConfig.from_file(folder / "run.yaml", overrides=overrides)
    own = {"epochs", *OF_PICKED_POINTS}
    if asked.model_dump(exclude={"recovery": own}) != run.model_dump(exclude={"recovery": own}):
        names = ", ".join(f"recovery.{name}" for name in sorted(own))
        raise ConfigError(f"recover: only {names} can be set for one point, got {', '.join(overrides)}")
    if cluster is not None and not run.search.device:
        raise ConfigError("recover: --address reaches the device of search.device, which this study has none of")
    trackers = Trackers(run, folder, progress)
    workshop = Workshop(asked, folder / "artefacts", progress)
    plan = workshop.recovering(candidate.plan)
    with ExitStack() as stack:
        study = stack.enter_context(closing(Study(folder, run, writable=True)))
        study.identity.require_data(workshop.task.fingerprint)
        study.identity.require_model(workshop.teacher.base)
        # A score stays with the artefact that it was taken from; what was ended before it was confirmed goes on.
        known = study.measured(plan)
        if known is not None and (known.score.confirmed or not run.search.confirm_pairs):
            return known
        if run.search.device:
            nobody = Workers(run, workshop.artefacts, progress, cluster=cluster, most=0)
            workshop.gauge.use(stack.enter_context(nobody).on_device)
        study.identity.require_machine(workshop.gauge.machine["id"])
        require_same_runtime(folder, workshop)
        restore_reference(workshop, progress)
        recovered = known or study.add(plan, workshop.evaluate(plan), origin="recover")
        if run.search.confirm_pairs:
            recovered = confirm_with_front(study, workshop, recovered, progress)
        write_results(study)
        trackers.tell(study.candidates())
    return recovered


def export(
    candidate: Candidate,
    out: str | Path,
    *,
    formats: Sequence[str] = (),
    force: bool = False,
    push_to_hub: str | None = None,
    private: bool = False,
    progress: Progress = silent,
) -> dict[str, delivery.Export]:
    """Ship a candidate: its artefact, tokenizer, card and reference, reloaded and compared in a fresh process.

    Args:
        candidate: of a study; what was not kept of it is built again.
        out: an empty or new folder; with several formats each gets a folder of its name in it.
        formats: ``openvino``, ``onnx``, ``hf`` for transformers, ``torch`` for a program of ``torch.export``; without
            any, that of the runtime that the study is for.
        force: accept a folder that is not empty.
        push_to_hub: repository, ``OWNER/NAME``, that what was exported is put into, with one format; an earlier
            export in it goes.
        private: make that repository private where it is not there yet.
        progress: told what happens, a line at a time.

    Returns:
        What was exported, by format, with the accuracy on the held-out test split.

    Raises:
        ExportError: if the folder is taken, the copy or what is built again does not reproduce the score, or the hub
            does not take it; what was exported by then stays.
    """
    folder = _home(candidate)
    run = RunConfig.from_file(folder / "run.yaml")
    repository = None if push_to_hub is None else hub.Repository(push_to_hub, private)
    return delivery.export(
        candidate,
        run,
        Path(out),
        formats=formats or [delivery.format_of(run)],
        force=force,
        repository=repository,
        progress=progress,
    )


def measure(folder: str | Path, *, pairs: int = exported.CONFIRMING_PAIRS) -> dict[str, Any]:
    """Time an exported folder on this machine, one of a runtime against the reference that it carries.

    A program of ``torch.export`` may run code when it is read: measure none that you would not run.

    Args:
        folder: that `export` wrote.
        pairs: blocks of runs.

    Returns:
        ``latency_ms`` and ``latency_p90_ms`` now, ``target`` and ``machine``; of a runtime's folder also the ratio with
        its interval, the stored one, and whether that is of this machine; and the one that the search chose it by, if
        that was of this runtime.

    Raises:
        ConfigError: if ``pairs`` are fewer than 4 or more than 10,000.
        ExportError: if it is no exported folder, or computes something else on this CPU.
    """
    return exported.measure(Path(folder), pairs=pairs)


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
        loaded = workshop.loaded(workshop.source)
    space = bind(space_file, loaded.shape, tokens=run.target.tokens, most_tokens=run.data.max_tokens)
    ladder = list(uniform_ladder(space))
    for params in ladder:
        workshop.check(space.plan(params), loaded.shape)
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
            "search_rows_cut": workshop.splits["search"].cut,
        },
        "space": {
            "name": space_file.name,
            "students": {name: s.words() for name, s in space.students.items()},
            "seeds": [_words_before_training(space.plan(p)) for p in ladder],
            "parameters": sorted({name for p in ladder for name in p}),
        },
        "target": run.target.model_dump(),
    }


def _words_before_training(plan: CompressionPlan) -> str:
    """Say a plan as far as it stands while it is not known yet which blocks matter least."""
    words, drop = plan.words(), plan.of_type(DropBlocks).get(MODEL_SITE)
    if drop is None:
        return words
    count = len(drop.blocks)
    least = "block that matters least" if count == 1 else f"{count} blocks that matter least"
    return words.replace(drop.words(), f"without the {least}")


def forecast(run: RunConfig, *, progress: Progress = silent) -> Forecast:
    """Say what a search will take on this machine, from counts and a few measured moments.

    Args:
        run: the run file.
        progress: told what happens, a line at a time.
    """
    return _forecast(run, progress)


@contextmanager
def serve(folder: str | Path, *, port: int = 0) -> Iterator[str]:
    """Serve the report of a study on loopback for as long as the context lasts; it follows a search that goes on.

    Args:
        folder: results folder of the search.
        port: 0 for one that is free.

    Yields:
        The address of the page.

    Raises:
        ConfigError: if the port cannot be had.
    """
    server = server_of(Live(Path(folder), open_study), port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    try:
        yield f"http://{HOST}:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _bytes_in(folder: Path) -> int:
    """Return how large the files below a folder are, from which a search may take some meanwhile."""
    found = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                found += (Path(place) / name).stat().st_size
    return found


def status(folder: str | Path) -> dict[str, Any]:
    """Return how far a study is: counts by state, the front's size, and what is on disk."""
    study = open_study(folder)
    candidates = study.candidates()
    bank = Bank(bank_root(study.run))
    searched = [c for c in candidates if c.origin != "recover"]
    return {
        "study": study.run.name,
        "complete": sum(c.state == "COMPLETE" for c in searched),
        "failed": sum(c.state == "FAIL" for c in candidates),
        "stopped_early": sum(c.state == "PRUNED" for c in candidates),
        "wanted": study.run.search.trials,
        "recovered": len(candidates) - len(searched),
        "front": len(study.front()),
        "artefact_bytes": _bytes_in(study.folder / "artefacts"),
        "bank": {kind: f"{used.entries} entries, {used.bytes / 1e6:.1f} MB" for kind, used in bank.usage().items()},
    }
