"""Ship a picked candidate and prove the copy: reloaded in a fresh process it must predict as it was scored.

An exported folder holds the model's files, the tokenizer, ``measurement.json`` with search and held-out scores, a
model card, and in ``reference/`` a stand-in of the uncompressed model to be timed against.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autocompress import machine, scoring
from autocompress.config import RunConfig, TargetConfig
from autocompress.errors import ExportError
from autocompress.evaluate import Workshop, kept_logits
from autocompress.plan import CompressionPlan
from autocompress.records import Candidate, Measurement
from autocompress.report.card import model_card
from autocompress.report.script import TRANSFORMERS, predict_script
from autocompress.rows import read_logits, write_rows
from autocompress.runtimes import Artifact, get_runtime
from autocompress.trained import Progress
from autocompress.transforms.prune import cut_to_blocks

MEASUREMENT_SCHEMA = 2
FORMATS = {"openvino": "openvino", "onnx": "onnxruntime"}
"""Export format to the runtime that builds and runs it."""
HF = "hf"
"""Export format that transformers reads."""
LEAST_AGREEMENT = 0.98
"""Share of rows on which a folder of format hf must predict as the artefact that was scored.

The grids are the same. Where floats are added in another order, though, some come to lie on the other side of a step of
8 bits, and from layer to layer that grows.
"""
RELOAD_SECONDS = 300
_LOADS = 4
CONFIRMING_PAIRS = 20
"""Blocks of runs that confirm an exported latency: more than a search takes, and nothing beside."""


@dataclass(frozen=True)
class Export:
    """What was shipped.

    Args:
        folder: where it stands.
        measurement: the score of these very files on the search split, with a latency confirmed at the export.
        test: accuracy on the held-out test split, with its 95 % Wilson interval.
        agreement: share of search rows on which it predicts as the candidate that the study scored.
        latency_ratio_in_search: the ratio that it was chosen by, from fewer pairs beside other candidates.
        timed: whether the latency is that of these files; transformers runs them, but not as what was scored.
    """

    folder: Path
    measurement: Measurement
    test: scoring.Accuracy
    agreement: float
    latency_ratio_in_search: float
    timed: bool = True


def export(
    candidate: Candidate, run: RunConfig, out: Path, *, formats: Sequence[str], force: bool, progress: Progress
) -> dict[str, Export]:
    """Export ``candidate`` in each format; see `autocompress.export`."""
    for name in formats:
        if name not in (*FORMATS, HF):
            raise ExportError(f"export: format must be one of {', '.join((*FORMATS, HF))}, got {name!r}")
        if name != HF:
            get_runtime(FORMATS[name])
    if candidate.measurement is None or candidate.folder is None:
        raise ExportError(f"export: trial {candidate.number} failed ({candidate.failure}); pick another")
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not force:
        raise ExportError(f"export: {out} is not empty; give another folder or --force")
    scored = Artifact.open(_artefact_of(candidate))
    if scored.plan != candidate.plan or scored.size_bytes != candidate.score.size_bytes:
        raise ExportError(
            f"export: trial {candidate.number}: the artefact no longer matches: {scored.folder} has "
            f"{scored.size_bytes} bytes of {scored.plan.words()}, scored were {candidate.score.size_bytes} of "
            f"{candidate.plan.words()}"
        )
    found = {}
    for name in formats:
        target = out if len(formats) == 1 else out / name
        with tempfile.TemporaryDirectory(prefix="autocompress-export-") as scratch:
            if name == HF:
                found[name] = _export_hf(candidate, run, scored, target, Path(scratch), progress)
            else:
                found[name] = _export(candidate, run, FORMATS[name], scored, target, Path(scratch), progress)
    return found


def _artefact_of(candidate: Candidate) -> Path:
    assert candidate.folder is not None
    folder = candidate.folder / "artefacts" / candidate.plan.plan_id
    if not folder.is_dir():
        raise ExportError(
            f"export: the artefact of trial {candidate.number} was not kept; points of the front are, and all are "
            "with search.keep_artefacts=all"
        )
    return folder


def _export(
    candidate: Candidate, run: RunConfig, runtime: str, scored: Artifact, out: Path, scratch: Path, progress: Progress
) -> Export:
    other = run.timed_here().model_copy(update={"target": run.target.model_copy(update={"runtime": runtime})})
    if runtime == run.target.runtime:
        workshop = Workshop(run, scored.folder.parent, progress)
        artifact, measured = scored, candidate.score
    else:
        # Another runtime's artefact is another candidate: it is built from the same plan, and scored before it ships.
        progress(f"building and scoring the plan with {runtime}")
        workshop = Workshop(other, scratch / "artefacts", progress)
        workshop.build(CompressionPlan(), workshop.reference_folder)
        measured = workshop.evaluate(candidate.plan)
        artifact = Artifact.open(workshop.artefacts / candidate.plan.plan_id)
    aside = scratch / "export"
    aside.mkdir()
    for name in (*artifact.files, "artefact.json"):
        shutil.copyfile(artifact.folder / name, aside / name)
    workshop.tokenizer.save_pretrained(aside / "tokenizer")
    (aside / "reference").mkdir()
    workshop.runtime.stand_in(Artifact.open(workshop.reference_folder), aside / "reference")
    progress("reloading in a fresh process")
    expected = kept_logits(artifact.folder)
    try:
        reloaded, timed = _reload(aside, workshop, scratch)
    except ExportError as error:
        raise ExportError(f"export: trial {candidate.number}: {error}") from None
    if scoring.predictions_hash(reloaded) != measured.predictions:
        different = int((reloaded.argmax(1) != expected.argmax(1)).sum())
        raise ExportError(
            f"export: trial {candidate.number}: {different} of {len(expected)} predictions of the reloaded copy differ "
            "from its score; the artefact no longer matches"
        )
    progress("scoring on the held-out test split")
    session = workshop.runtime.load(Artifact.open(aside), workshop.run.target)
    logits = scoring.logits_of(session, workshop.splits["test"], workshop.batches("test"))
    test = scoring.accuracy(logits, workshop.splits["test"])
    confirmed = measured
    if not workshop.run.search.device:  # what was measured on a device is not what this machine measures
        latest = dataclasses.replace(measured, **timed.fields(), confirmed=True, fingerprint=workshop.fingerprint)
        confirmed = latest.check()
    agreement = float((expected.argmax(1) == kept_logits(scored.folder).argmax(1)).mean())
    about = {
        "schema": MEASUREMENT_SCHEMA,
        "trial": candidate.number,
        "plan_id": candidate.plan.plan_id,
        "runtime": runtime,
        "target": workshop.run.target.model_dump(),
        "labels": list(workshop.task.labels),
        "max_tokens": run.data.max_tokens,
        "vocabulary": workshop.vocabulary,
        "search": dataclasses.asdict(confirmed),
        "latency_ratio_in_search": measured.latency_ratio,
        "latency_pairs": CONFIRMING_PAIRS,
        "test": dataclasses.asdict(test),
        "agreement_with_scored_candidate": agreement,
    }
    (aside / "measurement.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    (aside / "predict.py").write_text(predict_script(runtime), encoding="utf-8")
    (aside / "README.md").write_text(model_card(candidate, run, runtime, confirmed, test, agreement), encoding="utf-8")
    _put(aside, out)
    return Export(out, confirmed, test, agreement, measured.latency_ratio)


def _export_hf(
    candidate: Candidate, run: RunConfig, scored: Artifact, out: Path, scratch: Path, progress: Progress
) -> Export:
    """Write a folder for transformers: from the same pieces as the artefact, with its arithmetic."""
    from autocompress.hf import modeling

    workshop = Workshop(run, scored.folder.parent, progress)
    aside = scratch / "export"
    aside.mkdir()
    progress("writing what transformers reads")
    base, kept, pieces = workshop.parted(candidate.plan)
    model = cut_to_blocks(base, kept)
    size = modeling.write_folder(model, pieces, candidate.plan, workshop.teacher_folder, run.target.runtime, aside)
    workshop.tokenizer.save_pretrained(aside)
    progress("reloading in a fresh process")
    expected = kept_logits(scored.folder)
    found = _run_hf(aside, workshop, "search", scratch)
    agreement = float((found.argmax(1) == expected.argmax(1)).mean())
    if agreement < LEAST_AGREEMENT:
        raise ExportError(
            f"export: trial {candidate.number}: the folder predicts as its score on {agreement:.1%} of the search rows "
            f"alone, and has to on {LEAST_AGREEMENT:.0%}; the artefact no longer matches what is in the bank"
        )
    progress("scoring on the held-out test split")
    own = scoring.accuracy(found, workshop.splits["search"])
    test = scoring.accuracy(_run_hf(aside, workshop, "test", scratch), workshop.splits["test"])
    measured = dataclasses.replace(candidate.score, **own.fields(), divergence=None, size_bytes=size)
    about = {
        "schema": MEASUREMENT_SCHEMA,
        "trial": candidate.number,
        "plan_id": candidate.plan.plan_id,
        "runtime": TRANSFORMERS,
        "scored_with": run.target.runtime,
        "labels": list(workshop.task.labels),
        "max_tokens": run.data.max_tokens,
        "search": dataclasses.asdict(own),
        "test": dataclasses.asdict(test),
        "size_bytes": size,
        "agreement_with_scored_candidate": agreement,
    }
    (aside / "measurement.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    (aside / "predict.py").write_text(predict_script(TRANSFORMERS), encoding="utf-8")
    card = model_card(candidate, run, TRANSFORMERS, measured, test, agreement, timed=False)
    (aside / "README.md").write_text(card, encoding="utf-8")
    _put(aside, out)
    return Export(out, measured, test, agreement, candidate.score.latency_ratio, timed=False)


def _run_hf(folder: Path, workshop: Workshop, split: str, scratch: Path) -> np.ndarray:
    """Return the logits of a split from a process that reads the folder as its users do."""
    write_rows(scratch, workshop.batches(split))
    _elsewhere("autocompress.hf.reload", str(folder), str(scratch))
    return read_logits(scratch)


def _put(made: Path, out: Path) -> None:
    """Bring what is in ``made`` to ``out``, which may be on another disk: all of it, or an error and nothing."""
    out = out.resolve()  # aside and in place are then on one disk
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.{uuid.uuid4().hex}")
    try:
        shutil.copytree(made, aside)
        out.mkdir(exist_ok=True)
        for entry in aside.iterdir():
            # What else was in the folder stays there: it was asked for by force.
            if (there := out / entry.name).is_dir():
                shutil.rmtree(there)
            entry.replace(there)
    except OSError as error:
        raise ExportError(f"export: {out}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _reload(folder: Path, workshop: Workshop, scratch: Path) -> tuple[np.ndarray, scoring.Latency]:
    """Return the search rows' logits and the latency from a process that knows only the exported folder and the rows.

    The latency is taken as `measure` takes it later: in a process that holds nothing else, against the stand-in.
    """
    write_rows(scratch, workshop.batches("search"))
    about = {
        "target": workshop.run.target.model_dump(),
        "vocabulary": workshop.vocabulary,
        "pairs": CONFIRMING_PAIRS,
    }
    _elsewhere("autocompress.reload", str(folder), str(scratch), json.dumps(about))
    timed = scoring.Latency(**json.loads((scratch / "latency.json").read_text(encoding="utf-8")))
    return read_logits(scratch), timed


def _elsewhere(module: str, *arguments: str) -> None:
    """Run a module in a fresh process.

    Raises:
        ExportError: with the last line that it said, if it fails or takes too long.
    """
    command = [sys.executable, "-m", module, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=RELOAD_SECONDS, check=False)  # noqa: S603
    except subprocess.TimeoutExpired:
        raise ExportError(f"reloading the copy took more than {RELOAD_SECONDS} s") from None
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise ExportError(f"the copy cannot be reloaded ({last[0]})")


def measure(folder: Path, *, pairs: int) -> dict[str, Any]:
    """Time an exported folder against its reference; see `autocompress.measure`."""
    artifact = Artifact.open(folder)
    try:
        about = json.loads((folder / "measurement.json").read_text(encoding="utf-8"))
        stored = Measurement.from_json(json.dumps(about["search"]))
        target = TargetConfig(**about["target"])
        vocabulary = int(about["vocabulary"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{folder / 'measurement.json'}: cannot be read ({error}); give an exported folder") from None
    if about.get("schema") != MEASUREMENT_SCHEMA:
        raise ExportError(
            f"{folder / 'measurement.json'}: schema must be {MEASUREMENT_SCHEMA}, got {about.get('schema')!r}, of a "
            "version that took latencies otherwise: export the trial again"
        )
    here = machine.fingerprint()
    eight_bits = artifact.plan.integer_arithmetic
    if eight_bits and machine.adds_in_16_bits(here) and not machine.adds_in_16_bits(stored.fingerprint):
        raise ExportError(
            f"{folder}: was built on a CPU that adds 8-bit products in 32 bits; this one adds them in 16, which "
            "overflow: the model computes something else here; search and export on a CPU of this kind"
        )
    timed = time_against_stand_in(artifact, target, vocabulary, pairs)
    return {
        "latency_ms": timed.p50_ms,
        "latency_p90_ms": timed.p90_ms,
        "reference_ms": timed.reference_ms,
        "latency_ratio": timed.ratio,
        "latency_ratio_low": timed.ratio_low,
        "latency_ratio_high": timed.ratio_high,
        "stored_latency_ratio": stored.latency_ratio,
        "difference": timed.ratio / stored.latency_ratio - 1,
        "latency_ratio_in_search": about["latency_ratio_in_search"],
        "size_bytes": artifact.size_bytes,
        "target": target.model_dump(),
        "machine": here,
        "same_machine": here["id"] == stored.fingerprint.get("id"),
    }


def time_against_stand_in(artifact: Artifact, target: TargetConfig, vocabulary: int, pairs: int) -> scoring.Latency:
    """Time an exported artefact in turn with the reference in its folder."""
    runtime, reference = get_runtime(artifact.runtime), Artifact.open(artifact.folder / "reference")
    inputs, clock = scoring.timing_inputs(artifact.inputs, target, vocabulary, 0), scoring.clock_of(target)
    # A loaded model's speed depends a little on where its memory came to lie: load both anew for each share of pairs.
    times = [
        scoring.paired_times(
            runtime.load(artifact, target), runtime.load(reference, target), inputs, pairs=share, clock=clock
        )
        for share in (pairs // _LOADS + (number < pairs % _LOADS) for number in range(_LOADS))
    ]
    return scoring.summarize(times, seed=0)
