"""What stands in a results folder for people to read: the tables, the report, and what a search is held against."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from contextlib import closing

from autocompress.anatomy import ModelShape
from autocompress.config import RunConfig
from autocompress.delivery import format_of
from autocompress.records import Candidate
from autocompress.report import tables
from autocompress.report.comparison import Comparison
from autocompress.report.page import Report
from autocompress.report.tables import write_aside
from autocompress.storage import holds_study
from autocompress.study import Study

BASELINES = "baselines"
"""Folder within the results folder; each baseline is a search of its own in it."""
STAGE = "stage.txt"
"""What a search does once all its candidates are evaluated; gone when it has ended."""


def write_results(study: Study) -> None:
    """Write ``study.csv``, ``pareto.csv`` and ``report.html`` from the study."""
    tables.write_csv(study.candidates(), study.folder / "study.csv")
    tables.write_csv(study.front().points, study.folder / "pareto.csv")
    report_of(study).write(study.folder / "report.html")


def report_of(study: Study) -> Report:
    """Return the report of a study as it stands.

    Raises:
        StudyError: if it does not know its reference yet.
    """
    front = study.front()
    environment = study.environment
    told_elsewhere = ("reference", "key", "schema", "majority", "shared_rows", "cut_rows", "shape")
    notes = []
    if shared_rows := environment.get("shared_rows", 0):
        notes.append(f"{shared_rows} texts stand in two splits; the run file accepts that.")
    if cut := environment.get("cut_rows"):
        notes.append(f"{tables.cut_words(cut, front.reference.rows, study.run.data.max_tokens)}.")
    if disturbed := [c.number for c in front.points if c.score.disturbed]:
        numbers = ", ".join(map(str, disturbed))
        notes.append(f"Other programs kept the cores busy while the latencies of trials {numbers} were taken.")
    return Report(
        title=study.run.name,
        front=front,
        candidates=study.candidates(),
        environment={k: v for k, v in environment.items() if k not in told_elsewhere},
        notes=notes,
        comparison=comparison_of(study),
        # Not known of a study of version 0.1 that was not continued since.
        shape=ModelShape.from_dict(environment["shape"]) if "shape" in environment else None,
        command=_export_command(study),
    )


def _export_command(study: Study) -> list[str]:
    """Return the command that exports a point, in parts between which its trial's number stands."""
    folder = shlex.quote(str(study.folder))
    return [
        f"autocompress export {folder} --trial ",
        f" --format {format_of(study.run)} -o {study.run.name}-trial-",
        "",
    ]


def comparison_of(study: Study) -> Comparison | None:
    """Return what a study is held against: its own uniform plans, and a random search where there was one.

    None for a study of version 0.1, which does not know the majority-class rate, and for one that begins with what
    another one found: what came of its own evaluations alone cannot be told.
    """
    majority = study.majority
    if majority is None or study.inherits:
        return None
    folder = study.folder / BASELINES / "random"
    random: Sequence[Candidate] | None = None
    # A baseline that was interrupted early holds no study yet.
    if (folder / "run.yaml").exists() and holds_study(folder):
        with closing(Study(folder, RunConfig.from_file(folder / "run.yaml"))) as baseline:
            random = _searched(baseline)
    predictor: dict[str, float] = {}
    for name, values in _predictions(study).items():
        sizes = [abs(value) for value in values]
        predictor[f"{name}: mean absolute error of {len(sizes)} predictions before measuring"] = sum(sizes) / len(sizes)
        predictor[f"{name}: worst of them"] = max(sizes)
    return Comparison(majority, _searched(study), random=random, predictor=predictor or None)


def _searched(study: Study) -> Sequence[Candidate]:
    return [c for c in study.candidates() if c.origin != "recover"]


def write_predictions(study: Study) -> None:
    """Keep how far off predictions were that were made before their candidate was measured."""
    assert study.predictor is not None
    errors = _predictions(study)
    for name, found in study.predictor.errors.items():
        errors.setdefault(name, []).extend(found)
    if errors:
        write_aside(study.folder / "predictions.json", json.dumps(errors))


def _predictions(study: Study) -> dict[str, list[float]]:
    file = study.folder / "predictions.json"
    found: dict[str, list[float]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found
