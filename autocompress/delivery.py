"""Ship a picked candidate and prove the copy: reloaded in a fresh process it must predict as it was scored.

An exported folder holds the model's files, the tokenizer, the plan, ``measurement.json`` with search and held-out
scores, a model card, and in ``reference/`` a stand-in of the uncompressed model to be timed against.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autocompress import fresh, hub, machine, scoring, timing
from autocompress.calm import Calm
from autocompress.config import RunConfig
from autocompress.errors import ConfigError, ExportError, RuntimeBuildError, first_line, quoted
from autocompress.evaluate import Workshop
from autocompress.exported import (
    CONFIRMING_PAIRS,
    FORMATS,
    MEASUREMENT_SCHEMA,
    UNPACKED,
    require_same_numbers,
    require_same_sums,
)
from autocompress.parcel import MEASUREMENT, put, require_place, seal
from autocompress.plan import CompressionPlan
from autocompress.records import Candidate, Drop, Measurement
from autocompress.report.card import model_card
from autocompress.report.script import predict_script
from autocompress.rows import LOGITS_FILE, read_logits, write_rows
from autocompress.runtimes import Artifact, get_runtime
from autocompress.study import Study
from autocompress.trained import Progress, torch_threads
from autocompress.transforms.prune import cut_to_blocks

LEAST_AGREEMENT = 0.98
"""Share of rows on which PyTorch must predict as the artefact that was scored.

The grids are the same. Where floats are added in another order, though, some come to lie on the other side of a step of
8 bits, and from layer to layer that grows.
"""


@dataclass(frozen=True)
class Export:
    """What was shipped.

    Args:
        folder: where it stands.
        measurement: the score of these very files on the search split, with a latency confirmed at the export.
        test: accuracy on the held-out test split, with its 95 % Wilson interval.
        test_drop: what that is less than the uncompressed model's on the same rows.
        agreement: share of search rows on which it predicts as the candidate that the study scored.
        latency_ratio_in_search: the ratio that it was chosen by, as the search left it; None for another runtime's.
        timed: whether the latency is that of these files; PyTorch runs them, but not as what was scored.
        pushed: address on a hub, if it was put there.
    """

    folder: Path
    measurement: Measurement
    test: scoring.Accuracy
    test_drop: Drop
    agreement: float
    latency_ratio_in_search: float | None
    timed: bool = True
    pushed: str | None = None


def formats() -> dict[str, str]:
    """Return, by export format, what it takes and when a point is refused."""
    same = "refused where the copy predicts otherwise than it was scored"
    nearly = f"refused where fewer than {LEAST_AGREEMENT:.0%} of the search rows are predicted as they were scored"
    found = {name: f"what {runtime} runs; {same}" for name, runtime in FORMATS.items()}
    kind = "or where one of few bits was searched on a CPU with VNNI and is exported on one without, or the other way"
    found["hf"] = f"what transformers read after `import autocompress`, with unpacked weights; {nearly}, {kind}"
    found["torch"] = f"the same as one program; {nearly}, {kind}, or where torch.export cannot record the architecture"
    return found


def format_of(run: RunConfig) -> str:
    """Return the format of the artefacts that a run's candidates are scored as."""
    return next(name for name, runtime in FORMATS.items() if runtime == run.target.runtime)


def export(
    candidate: Candidate,
    run: RunConfig,
    out: Path,
    *,
    formats: Sequence[str],
    force: bool,
    repository: hub.Repository | None,
    progress: Progress,
) -> dict[str, Export]:
    """Export ``candidate`` in each format; see `autocompress.export`."""
    for name in formats:
        if name not in (*FORMATS, *UNPACKED):
            raise ConfigError(f"export: format must be one of {', '.join((*FORMATS, *UNPACKED))}, got {name!r}")
        if name in FORMATS:
            get_runtime(FORMATS[name])
    if repository is not None:
        if len(formats) != 1:
            raise ConfigError(f"export: --push-to-hub takes one format at a time, got {', '.join(formats)}")
        hub.check(repository)
    if candidate.measurement is None or candidate.folder is None:
        ended = "was stopped early" if candidate.state == "PRUNED" else "failed"
        raise ExportError(f"export: trial {candidate.number} {ended} ({candidate.failure}); pick another")
    require_place(out, force=force)
    with closing(Study(candidate.folder, run)) as study:
        if study.identity.outdated is not None:
            raise ExportError(f"export: {candidate.folder}: {study.identity.outdated}")
        calm, workshop = study.calm, Workshop(run, candidate.folder / "artefacts", progress)
        study.identity.require_data(workshop.task.fingerprint)
        # Its artefact ships as it is; where latency is of a device, so is what the score names as its machine.
        if not run.search.device:
            what, there = f"export: trial {candidate.number}", candidate.score.fingerprint
            if format_of(run) in formats:
                require_same_sums(candidate.plan, there, what)
            if UNPACKED.keys() & {*formats}:
                require_same_numbers(candidate.plan, there, what)
        kept = (workshop.artefacts / candidate.plan.plan_id).is_dir() and workshop.reference_folder.is_dir()
        if not kept or {*formats} != {format_of(run)}:  # something is made of the model
            study.identity.require_model(workshop.teacher.base)
        for name in set(FORMATS) & {*formats} - {format_of(run)}:
            get_runtime(FORMATS[name]).require_size(workshop.teacher.parameters())
    if "torch" in formats:
        from autocompress.hf import program

        # A block stands for all: they are alike in what can be recorded of them.
        cut = cut_to_blocks(workshop.teacher, (0,)).module
        program.require_recordable(cut, _inputs(workshop), _most_tokens(workshop))
    with tempfile.TemporaryDirectory(prefix="autocompress-export-") as artefacts:
        scored = _scored(candidate, run, Path(artefacts), progress)
        found = {}
        for name in formats:
            target = out if len(formats) == 1 else out / name
            with tempfile.TemporaryDirectory(prefix="autocompress-export-") as scratch:
                aside = Path(scratch) / "export"
                aside.mkdir()
                if name in UNPACKED:
                    shipped = _export_unpacked(candidate, run, name, scored, aside, progress)
                else:
                    shipped = _export(candidate, run, FORMATS[name], scored, aside, calm, progress)
                seal(aside, candidate.plan)
                put(aside, target, in_place_of=out if len(formats) > 1 else None)
                found[name] = dataclasses.replace(shipped, folder=target)
                if repository is not None:
                    progress(f"{target} is ready; pushing it to {repository.name}")
                    # From here, where nothing else is: a folder that was forced may hold what is nobody's business.
                    address = hub.push(aside, repository, f"Trial {candidate.number} of {run.name}: {name}")
                    found[name] = dataclasses.replace(found[name], pushed=address)
    return found


def _scored(candidate: Candidate, run: RunConfig, artefacts: Path, progress: Progress) -> Artifact:
    """Return what was scored, beside the reference, in ``artefacts``, from where no search that goes on takes it away.

    It is copied, or, where it was not kept, built anew; it then has to predict the same.
    """
    assert candidate.folder is not None
    there, score = candidate.folder / "artefacts", candidate.score
    kept, copy = there / candidate.plan.plan_id, artefacts / candidate.plan.plan_id
    reference = artefacts / "reference"
    if (there / "reference").is_dir():
        reference.symlink_to((there / "reference").absolute())
    else:
        progress("building the uncompressed model again")
        Workshop(run.timed_here(), artefacts, progress).build(CompressionPlan(), reference)
    try:
        shutil.copytree(kept, copy)
        read_logits(copy)
        scored = Artifact.open(copy)
    except (OSError, ValueError, EOFError, RuntimeBuildError) as error:
        if (kept / LOGITS_FILE).exists():  # and was not taken meanwhile, by a search that goes on
            reason = f"the artefact no longer matches, or cannot be copied ({first_line(error)})"
            raise ExportError(f"export: trial {candidate.number}: {reason}") from None
    else:
        if scored.plan != candidate.plan or scored.size_bytes != score.size_bytes:
            raise ExportError(
                f"export: trial {candidate.number}: the artefact no longer matches: {kept} has {scored.size_bytes} "
                f"bytes of {scored.plan.words()}, scored were {score.size_bytes} of {candidate.plan.words()}"
            )
        return scored
    progress(f"building trial {candidate.number} again, which is not among the artefacts that were kept")
    workshop = Workshop(run.timed_here(), artefacts, progress)
    with torch_threads(run.target.threads):
        built = workshop.build(candidate.plan, copy)
    logits = workshop.logits(built, "search")
    np.save(copy / LOGITS_FILE, logits, allow_pickle=False)
    if (scoring.predictions_hash(logits), built.size_bytes) != (score.predictions, score.size_bytes):
        raise ExportError(
            f"export: trial {candidate.number}: its artefact was not kept, and what is built again is not what was "
            "scored; points of the front are kept, and all are with search.keep_artefacts=all"
        )
    return built


def _export(
    candidate: Candidate,
    run: RunConfig,
    runtime: str,
    scored: Artifact,
    aside: Path,
    calm: Calm | None,
    progress: Progress,
) -> Export:
    """Write a copy of the artefact, or another runtime's of the same plan, into the empty folder ``aside``.

    ``calm`` is what the study knows of the slow times of the machine that it was searched on.
    """
    scratch = aside.parent
    other = run.timed_here().model_copy(update={"target": run.target.model_copy(update={"runtime": runtime})})
    if runtime == run.target.runtime:
        workshop = Workshop(run, scored.folder.parent, progress)
        artifact, measured = scored, candidate.score
    else:
        # Another runtime's artefact is another candidate: it is built from the same plan, and scored before it ships.
        progress(f"building and scoring the plan with {runtime}")
        workshop = Workshop(other, scratch / "artefacts", progress)
        workshop.follows = get_runtime(run.target.runtime)
        workshop.build(CompressionPlan(), workshop.reference_folder)
        measured = workshop.evaluate(candidate.plan)
        artifact = Artifact.open(workshop.artefacts / candidate.plan.plan_id)
    for name in (*artifact.files, "artefact.json"):
        shutil.copyfile(artifact.folder / name, aside / name)
    workshop.tokenizer.save_pretrained(aside / "tokenizer")
    (aside / "reference").mkdir()
    workshop.runtime.stand_in(Artifact.open(workshop.reference_folder), aside / "reference")
    progress("reloading in a fresh process")
    expected = read_logits(artifact.folder)
    try:
        reloaded, timed = _reload(aside, workshop, scratch, measured)
    except ExportError as error:
        raise ExportError(f"export: trial {candidate.number}: {error}") from None
    if scoring.predictions_hash(reloaded) != measured.predictions:
        different = int((reloaded.argmax(1) != expected.argmax(1)).sum())
        raise ExportError(
            f"export: trial {candidate.number}: {different} of {len(expected)} predictions of the reloaded copy differ "
            f"from its score; {_why_not(candidate, measured, workshop)}"
        )
    progress("scoring on the held-out test split")
    logits = workshop.logits(Artifact.open(aside), "test")
    test = scoring.accuracy(logits, workshop.splits["test"])
    test_drop = scoring.drop(logits, workshop.reference_logits_on_test, workshop.splits["test"])
    search = workshop.run.search
    confirmed, pairs = measured, search.confirm_pairs if measured.confirmed else search.latency_pairs
    known, in_search = (calm, measured.latency_ratio) if runtime == run.target.runtime else (None, None)
    if not search.device:  # what was measured on a device is not what this machine measures
        pairs = CONFIRMING_PAIRS
        taken = {**timed.fields(), "confirmed": True, "fingerprint": workshop.gauge.fingerprint}
        confirmed = dataclasses.replace(measured, **taken).check()
        if _scored_here(measured, workshop):  # latencies drift as they were seen to
            calmed = confirmed if known is None else known.adjust(confirmed)
            confirmed = calmed.drifting(measured.latency_drift)
        else:
            known = None
    agreement = float((expected.argmax(1) == read_logits(scored.folder).argmax(1)).mean())
    about = {
        "search": dataclasses.asdict(confirmed),
        "latency_ratio_in_search": in_search,
        "latency_pairs": pairs,
        "calm": None if known is None else dataclasses.asdict(known),
        "built_on": machine.fingerprint(),
    }
    _describe(aside, candidate, workshop, runtime, confirmed, test, test_drop, agreement, about)
    return Export(aside, confirmed, test, test_drop, agreement, in_search)


def _scored_here(score: Measurement, workshop: Workshop) -> bool:
    return bool(score.fingerprint.get("id") == workshop.gauge.fingerprint["id"])


def _why_not(candidate: Candidate, score: Measurement, workshop: Workshop) -> str:
    """Say why a copy predicts otherwise than its artefact did."""
    assert candidate.folder is not None, "it has an artefact"
    move = f"autocompress retarget {quoted(candidate.folder)} -o NEW scores the front here"
    runtime = workshop.run.target.runtime
    there, here = (about.get("versions", {}).get(runtime) for about in (score.fingerprint, workshop.gauge.fingerprint))
    if there != here:
        return f"it was scored with {runtime} {there}, and {here} is here; {move}"
    if _scored_here(score, workshop):
        return "the artefact no longer matches"
    return f"it was scored on another machine, which computes otherwise; {move}"


def _export_unpacked(
    candidate: Candidate, run: RunConfig, name: str, scored: Artifact, aside: Path, progress: Progress
) -> Export:
    """Write what PyTorch runs into the empty folder ``aside``: from the artefact's pieces, with its arithmetic."""
    from autocompress.hf import modeling, program

    workshop, runner = Workshop(run, scored.folder.parent, progress), UNPACKED[name]
    progress(f"writing what {runner} reads")
    base, kept, pieces = workshop.parted(candidate.plan)
    cut = cut_to_blocks(base, kept)
    model = modeling.compressed_model(cut, pieces, candidate.plan, workshop.teacher_folder, workshop.runtime)
    inputs = _inputs(workshop)
    if name == "hf":
        model.save_pretrained(aside)
        size = sum(file.stat().st_size for file in aside.glob("*.safetensors"))
        workshop.tokenizer.save_pretrained(aside)
    else:
        size = program.write_program(model, inputs, _most_tokens(workshop), aside / program.PROGRAM)
        workshop.tokenizer.save_pretrained(aside / "tokenizer")
    progress("reloading in a fresh process")
    expected = read_logits(scored.folder)
    found = _run_unpacked(aside, workshop, "search", candidate.score, runner)
    agreement = float((found.argmax(1) == expected.argmax(1)).mean())
    if agreement < LEAST_AGREEMENT:
        raise ExportError(
            f"export: trial {candidate.number}: {runner} predicts as its score on {agreement:.1%} of the search rows "
            f"alone, and has to on {LEAST_AGREEMENT:.0%}; the artefact no longer matches what is in the bank"
        )
    progress("scoring on the held-out test split")
    own = scoring.accuracy(found, workshop.splits["search"])
    on_test = _run_unpacked(aside, workshop, "test", candidate.score, runner)
    test = scoring.accuracy(on_test, workshop.splits["test"])
    test_drop = scoring.drop(on_test, workshop.reference_logits_on_test, workshop.splits["test"])
    drop = scoring.drop(found, workshop.reference_logits, workshop.splits["search"])
    found_here = {**own.fields(), **drop.fields(), "fingerprint": workshop.gauge.fingerprint}
    measured = dataclasses.replace(candidate.score, **found_here, divergence=None, size_bytes=size)
    about = {
        "scored_with": run.target.runtime,
        "inputs": inputs,
        "search": dataclasses.asdict(own),
        "size_bytes": size,
    }
    _describe(aside, candidate, workshop, runner, measured, test, test_drop, agreement, about, timed=False)
    return Export(aside, measured, test, test_drop, agreement, candidate.score.latency_ratio, timed=False)


def _describe(
    aside: Path,
    candidate: Candidate,
    workshop: Workshop,
    runner: str,
    measured: Measurement,
    test: scoring.Accuracy,
    test_drop: Drop,
    agreement: float,
    more: Mapping[str, Any],
    *,
    timed: bool = True,
) -> None:
    """Write what an export says of itself, to programs and to people, and the program that runs it."""
    run, data, fast = workshop.run, workshop.task.fingerprint, workshop.tokenizer.is_fast
    about = {
        "schema": MEASUREMENT_SCHEMA,
        "trial": candidate.number,
        "plan_id": candidate.plan.plan_id,
        "runtime": runner,
        "target": run.target.model_dump(),
        "data": data,
        "labels": list(workshop.task.labels),
        "max_tokens": _most_tokens(workshop),
        "pair": bool(run.data.text_pair),
        "truncation_side": workshop.tokenizer.truncation_side,
        "vocabulary": workshop.vocabulary,
        "test": dataclasses.asdict(test),
        "test_drop": test_drop._asdict(),
        "agreement_with_scored_candidate": agreement,
        **more,
    }
    (aside / MEASUREMENT).write_text(json.dumps(about, indent=1), encoding="utf-8")
    (aside / "predict.py").write_text(predict_script(runner, fast=fast), encoding="utf-8")
    card = model_card(
        candidate,
        run,
        runner,
        measured,
        test,
        test_drop,
        agreement,
        data=data,
        built_on=machine.fingerprint(),
        timed=timed,
        fast=fast,
    )
    (aside / "README.md").write_text(card, encoding="utf-8")


def _most_tokens(workshop: Workshop) -> int:
    """Return how many tokens of a text are read: as in the search, and no more than the model has places for."""
    most, asked = workshop.untuned.most_tokens, workshop.run.data.max_tokens
    return asked if most is None else min(most, asked)


def _inputs(workshop: Workshop) -> list[str]:
    """Return the names of what the model reads."""
    return list(next(iter(workshop.batches("search"))).inputs())


def _run_unpacked(folder: Path, workshop: Workshop, split: str, score: Measurement, runner: str) -> np.ndarray:
    """Return the logits of a split from a process that reads the folder as its users do."""
    write_rows(folder.parent, workshop.batches(split))
    patience = _patience(workshop.run, score, len(workshop.splits[split]))
    _elsewhere("autocompress.hf.reload", str(folder), str(folder.parent), runner, seconds=patience)
    return read_logits(folder.parent)


def _reload(folder: Path, workshop: Workshop, scratch: Path, score: Measurement) -> tuple[np.ndarray, timing.Latency]:
    """Return the search rows' logits and the latency from a process that knows only the exported folder and the rows.

    The latency is taken as `measure` takes it later: in a process that holds nothing else, against the stand-in.
    """
    write_rows(scratch, workshop.batches("search"))
    about = {
        "target": workshop.run.target.model_dump(),
        "vocabulary": workshop.vocabulary,
        "pairs": CONFIRMING_PAIRS,
        "reference_ms": score.reference_ms if _scored_here(score, workshop) else None,
    }
    runs = len(workshop.splits["search"]) + timing.ANEW * CONFIRMING_PAIRS * timing.RUNS_OF_A_PAIR
    patience = _patience(workshop.run, score, runs)
    _elsewhere("autocompress.reload", str(folder), str(scratch), json.dumps(about), seconds=patience)
    timed = timing.Latency(**json.loads((scratch / "latency.json").read_text(encoding="utf-8")))
    return read_logits(scratch), timed


def _patience(run: RunConfig, score: Measurement, rows: int) -> float:
    """Return how many seconds a process may take that runs so many rows, none of which takes long by the reference."""
    longest = score.reference_ms / 1e3 * run.data.max_tokens / run.target.tokens
    return fresh.patience_s(rows, longest)


def _elsewhere(module: str, *arguments: str, seconds: float) -> None:
    """Run a module in a fresh process.

    Raises:
        ExportError: with the last line that it said, if it fails or takes too long.
    """
    command, environment = fresh.python("-m", module, *arguments)
    try:
        done = subprocess.run(  # noqa: S603
            command, env=environment, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        raise ExportError(f"reloading the copy took more than {seconds:.0f} s") from None
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise ExportError(f"the copy cannot be reloaded ({last[0]})")
