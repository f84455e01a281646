"""The uncompressed model as it was measured: what of, on what, and how stands in ``environment.json``."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from autocompress import timing
from autocompress.errors import StudyError, quoted
from autocompress.evaluate import Workshop
from autocompress.plan import CompressionPlan
from autocompress.report import tables
from autocompress.report.tables import write_aside
from autocompress.storage import holds_study
from autocompress.trained import Progress

_FILE = "environment.json"
SCHEMA = 1


def reference_key(workshop: Workshop) -> dict[str, Any]:
    """Return what the reference is measured of."""
    run = workshop.run
    rows = f"{workshop.task.fingerprint}, {run.data.max_tokens} tokens"
    return {"model": workshop.teacher.base, "data": rows, "target": run.target.model_dump()}


def is_measured(folder: Path) -> bool:
    """Return whether a results folder says what was measured of a reference."""
    return (folder / _FILE).exists()


def has_reference(folder: Path, workshop: Workshop) -> bool:
    """Return whether the reference is there, measured for this model, data and target or for the study that is there.

    Raises:
        StudyError: if it cannot be read.
    """
    return (folder / "artefacts" / "reference").is_dir() and _found(folder, workshop) is not None


def _found(folder: Path, workshop: Workshop) -> dict[str, Any] | None:
    """Return what was measured for this model, data and target or for the study that is there, if anything was."""
    if not is_measured(folder):
        return None
    file = folder / _FILE
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StudyError(f"{file}: not readable as JSON ({error})") from None
    if found.get("schema") != SCHEMA:
        raise StudyError(f"{file}: schema must be {SCHEMA}, got {found.get('schema')!r}")
    return found if holds_study(folder) or found.get("key") == reference_key(workshop) else None


def _about(workshop: Workshop) -> dict[str, Any]:
    """Return what is known without measuring."""
    return {
        "majority": workshop.majority,
        "shared_rows": workshop.task.shared_rows,
        "shape": dataclasses.asdict(workshop.teacher.shape),
    }


def require_same_runtime(folder: Path, workshop: Workshop) -> None:
    """Raise `StudyError` if the reference was measured with another version of the runtime than is installed.

    Another one may compute otherwise and takes other times.
    """
    found, runtime = _found(folder, workshop) or {}, workshop.run.target.runtime
    there = found.get("machine", {}).get("versions", {}).get(runtime)
    here = workshop.gauge.machine["versions"].get(runtime)
    if None not in (there, here) and there != here:
        raise StudyError(
            f"{folder}: was measured with {runtime} {there}, and {here} is here, whose results are not mixed with that "
            f"one's; install {runtime}=={there}, or autocompress retarget {quoted(folder)} -o NEW measures its front "
            "with this one"
        )


def ensure_reference(folder: Path, workshop: Workshop, progress: Progress) -> None:
    """Write ``environment.json``, measuring the reference, unless both are there for this model, data and target.

    Where a study has lost the artefact alone, that is built again: its candidates were compared with what was measured.
    """
    found = _found(folder, workshop)
    if found is not None and (holds_study(folder) or has_reference(folder, workshop)):
        require_same_runtime(folder, workshop)
        restore_reference(workshop, progress)
        if not (about := _about(workshop)).keys() <= found.keys():  # written by an earlier version
            write_aside(folder / _FILE, json.dumps(about | found, indent=1))
        return
    progress("measuring the uncompressed model")
    cut = workshop.splits["search"].cut
    if cut:
        progress(tables.cut_words(cut, len(workshop.splits["search"]), workshop.run.data.max_tokens))
    measured = workshop.score(workshop.build(CompressionPlan(), workshop.reference_folder))
    run = workshop.run
    environment = {
        "schema": SCHEMA,
        "reference": dataclasses.asdict(measured),
        **_about(workshop),
        "cut_rows": cut,
        "machine": workshop.gauge.machine,
        "target": run.target.model_dump(),
        "runtime_options": workshop.gauge.fingerprint["runtime_options"],
        "protocol": {
            "accuracy": f"through the artefact, {measured.rows} search rows, real lengths up to "
            f"{run.data.max_tokens} tokens, 95 % Wilson interval",
            "size": "bytes of the artefact's model files",
            "latency": f"{run.search.latency_pairs} pairs of blocks of runs, of candidate and reference in turn, each "
            f"block of runs under {1e3 * timing.SHORT_S:g} ms after as many that are not timed, at moments between "
            f"the rows ({run.search.confirm_pairs} in rounds over all points for points of the front, "
            "in a fresh process, loaded anew in between), inputs of "
            f"{run.target.batch_size} x {run.target.tokens} tokens, "
            + ("process CPU time" if run.target.threads == 1 else "wall clock in an exclusive slot")
            + f", pairs with a reference slower than {timing.SLOWED:g} times its fastest taken anew and left out"
            + ", lower quartile of the candidate's runs over that of the reference's with its 95 % bootstrap interval "
            "over moments and pairs; where those of a front were taken twice they are adjusted to the reference's "
            "pace, and the interval is no narrower than they drift from one time to another",
        },
        "key": reference_key(workshop),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_aside(folder / _FILE, json.dumps(environment, indent=1))


def restore_reference(workshop: Workshop, progress: Progress) -> None:
    """Build the uncompressed model's artefact again where it was not kept."""
    if not workshop.reference_folder.is_dir():
        progress("building the uncompressed model again")
        workshop.build(CompressionPlan(), workshop.reference_folder)
