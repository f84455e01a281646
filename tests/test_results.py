"""What stands in a results folder for people, and what a study is held against; without a model."""

from __future__ import annotations

import dataclasses
import json
import shlex
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pandas as pd
import pytest
from helpers_records import make_candidate, make_reference
from test_study import SMALL, evaluate, run_of

from autocompress.decisions import Recover
from autocompress.evaluate import Workshop
from autocompress.identity import identity_of
from autocompress.plan import MODEL_SITE
from autocompress.report.comparison import Comparison
from autocompress.results import BASELINES, comparison_of, write_results
from autocompress.status import status_of
from autocompress.study import Study

MAJORITY = 0.4
WORTH = "Was the search worth it?"


def environment_of(folder: Path, **more: Any) -> None:
    content = {"schema": 1, "reference": dataclasses.asdict(make_reference()), "machine": {"id": "test"}, **more}
    (folder / "environment.json").write_text(json.dumps(content), encoding="utf-8")


def made_study(folder: Path, *, trials: int = 6, **environment: Any) -> Study:
    """Return a finished study with made-up scores, as another process reads it."""
    folder.mkdir(parents=True)
    environment_of(folder, **environment)
    run = run_of(f"search.trials={trials}", "name=made")
    (folder / "run.yaml").write_text(run.to_yaml(), encoding="utf-8")
    study = Study(folder, run, identity=identity_of(run, model="m", data="d", space=SMALL), space=SMALL, writable=True)
    evaluate(study)
    study.close()
    return Study(folder, run)


def test_a_study_of_version_one_has_nothing_to_be_held_against(tmp_path: Path) -> None:
    study = made_study(tmp_path / "old")
    assert study.majority is None
    assert comparison_of(study) is None
    write_results(study)
    assert WORTH not in (study.folder / "report.html").read_text(encoding="utf-8")


def test_a_study_is_held_against_its_uniform_plans(tmp_path: Path) -> None:
    study = made_study(tmp_path / "new", trials=20, majority=MAJORITY)
    found = comparison_of(study)
    assert found == Comparison(MAJORITY, study.candidates())
    assert 0 < len(found.ladder) < 20


def test_what_another_search_found_is_not_compared_as_this_ones(tmp_path: Path) -> None:
    made = made_study(tmp_path / "new", trials=20, majority=MAJORITY)
    plan = made.candidates()[0].plan.with_decision(MODEL_SITE, Recover(epochs=1))
    with closing(Study(made.folder, made.run, writable=True)) as study:
        workshop = cast(Workshop, SimpleNamespace(majority=MAJORITY))
        gain = status_of(study, workshop).gain
        assert gain is not None and gain >= 1, "of all candidates over those of the ladder"
        study.add(plan, make_candidate(0).score, origin="retarget")
        assert comparison_of(study) is None
        assert status_of(study, workshop).gain is None


def test_recovered_points_are_not_part_of_the_comparison(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    made_study(folder, majority=MAJORITY)
    run = run_of()
    identity = identity_of(run, model="m", data="d", space=SMALL)
    study = Study(folder, run, identity=identity, space=SMALL, writable=True)
    plan = study.candidates()[2].plan.with_decision(MODEL_SITE, Recover(epochs=1))
    added = study.add(plan, make_candidate(0, accuracy=0.99).score, origin="recover")
    found = comparison_of(study)
    study.close()
    assert found is not None
    assert added in study.candidates()
    assert added not in found.search
    assert len(found.search) == 6


def test_a_random_search_and_errors_of_predictions_are_found(tmp_path: Path) -> None:
    study = made_study(tmp_path / "new", majority=MAJORITY)
    random = made_study(tmp_path / "new" / BASELINES / "random", trials=4, majority=MAJORITY)
    errors = {"size": [0.01, -0.03], "latency": [-0.2, 0.1, 0.0]}
    (study.folder / "predictions.json").write_text(json.dumps(errors), encoding="utf-8")
    found = comparison_of(study)
    assert found is not None
    assert found.random == random.candidates()
    assert found.predictor is not None
    assert {name.split(":")[0] for name in found.predictor} == {"size", "latency"}
    assert sorted(found.predictor.values()) == pytest.approx([0.02, 0.03, 0.1, 0.2])


@pytest.mark.parametrize("left", ["artefacts", "run.yaml"])
def test_a_baseline_that_was_interrupted_early_is_left_out(tmp_path: Path, left: str) -> None:
    study = made_study(tmp_path / "new", majority=MAJORITY)
    folder = study.folder / BASELINES / "random"
    (folder / "artefacts").mkdir(parents=True)
    if left == "run.yaml":
        (folder / "run.yaml").write_text(study.run.to_yaml(), encoding="utf-8")
    found = comparison_of(study)
    assert found is not None
    assert found.random is None


def test_results_are_three_files(tmp_path: Path) -> None:
    study = made_study(tmp_path / "new", trials=20, majority=MAJORITY)
    file = study.folder / "environment.json"
    known = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**known, "shared_rows": 3, "cut_rows": 250}), encoding="utf-8")
    busy = study.front().points[0]
    study.confirm({busy.number: dataclasses.replace(busy.score, latency_waited=0.2)})
    before = {path.name for path in study.folder.iterdir()}
    assert not {"study.csv", "pareto.csv", "report.html"} & before
    write_results(study)
    assert {path.name for path in study.folder.iterdir()} == before | {"study.csv", "pareto.csv", "report.html"}
    assert list(pd.read_csv(study.folder / "study.csv")["number"]) == [c.number for c in study.candidates()]
    front = pd.read_csv(study.folder / "pareto.csv")
    assert set(front["number"]) == {c.number for c in study.front().points}
    page = (study.folder / "report.html").read_text(encoding="utf-8")
    assert f"<h2>{WORTH}</h2>" in page
    assert "250 of 1000 search rows (25%) are longer than 64 tokens" in page
    assert "uniform ladder" in page
    assert "No random search was run to hold it against." in page
    assert "3 texts stand in two splits" in page
    assert f"kept the cores busy while the latencies of trials {busy.number} were taken" in page
    assert "<title>" in page
    assert "made" in page


def data_of(folder: Path) -> dict[str, Any]:
    """Return what the report's program reads."""
    html = (folder / "report.html").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(html.partition('id="data">')[2].partition("</script>")[0])
    return found


def test_the_report_knows_the_model_and_how_to_export_from_this_folder(tmp_path: Path) -> None:
    shape = dataclasses.asdict(SMALL.shape)
    study = made_study(tmp_path / "with space; and $(more)", majority=MAJORITY, shape=shape)
    write_results(study)
    data = data_of(study.folder)
    assert data["shape"]["blocks"] == len(SMALL.shape.blocks)
    assert all(data["pictures"])
    words = shlex.split("17".join(data["command"]))
    assert words == [
        *("autocompress", "export", str(study.folder), "--trial", "17", "--format", "openvino", "-o", "made-trial-17"),
    ]


def test_a_study_that_does_not_know_its_model_has_no_pictures(tmp_path: Path) -> None:
    study = made_study(tmp_path / "old", majority=MAJORITY)
    write_results(study)
    assert data_of(study.folder)["shape"] is None


def test_results_can_be_written_again(tmp_path: Path) -> None:
    study = made_study(tmp_path / "new", majority=MAJORITY)
    names = ("study.csv", "pareto.csv", "report.html")
    write_results(study)
    first = {name: (study.folder / name).read_bytes() for name in names}
    write_results(study)
    assert {name: (study.folder / name).read_bytes() for name in names} == first
