"""The driver: what it says on the way, the files it leaves, and that a finished search is not begun again."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from helpers_records import make_candidate, make_reference
from test_study import SMALL, evaluate, run_of

from autocompress import api, driver, machine
from autocompress.config import RecoveryConfig, RunConfig
from autocompress.decisions import PruneNeurons, Quantize, Recover
from autocompress.driver import BASELINES, SearchStatus, comparison_of, drive, write_results
from autocompress.evaluate import Workshop
from autocompress.identity import identity_of
from autocompress.plan import MODEL_SITE, CompressionPlan
from autocompress.records import Candidate
from autocompress.refine import _reconstruct
from autocompress.report.comparison import Comparison
from autocompress.study import Study

MAJORITY = 0.4
WORTH = "Was the search worth it?"


def status(**changes: Any) -> SearchStatus:
    known = {"done": 12, "total": 40, "failed": 1, "stopped": 3, "front": 5, "gain": 1.234, "seconds_each": 2.5}
    return SearchStatus(**{**known, **changes})


def test_a_status_says_everything_on_one_line() -> None:
    assert status().words() == (
        "12/40 candidates, 1 failed, 3 stopped early, 5 on the front, hypervolume 1.23x the uniform plans', "
        "2.5 s each, 70 s left"
    )


def test_a_status_without_uniform_plans_says_nothing_of_them() -> None:
    words = status(gain=None).words()
    assert "hypervolume" not in words
    assert words.startswith("12/40 candidates, 1 failed, 3 stopped early, 5 on the front, 2.5 s each")
    assert "\n" not in words


def test_what_is_left_is_at_the_present_speed() -> None:
    assert status().seconds_left == 28 * 2.5
    assert status(done=40).seconds_left == 0


# --- results of a study, without a model


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
    file.write_text(json.dumps({**known, "shared_rows": 3}), encoding="utf-8")
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
    assert "uniform ladder" in page
    assert "No random search was run to hold it against." in page
    assert "3 texts stand in two splits" in page
    assert f"kept the cores busy while the latencies of trials {busy.number} were taken" in page
    assert "<title>" in page
    assert "made" in page


def test_results_can_be_written_again(tmp_path: Path) -> None:
    study = made_study(tmp_path / "new", majority=MAJORITY)
    names = ("study.csv", "pareto.csv", "report.html")
    write_results(study)
    first = {name: (study.folder / name).read_bytes() for name in names}
    write_results(study)
    assert {name: (study.folder / name).read_bytes() for name in names} == first


def test_a_torn_record_that_was_cut_off_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a finished study and a workshop of paper, in which there is nothing left to do."""
    folder = tmp_path / "results"
    (folder / "artefacts" / "reference").mkdir(parents=True)
    environment_of(folder, majority=MAJORITY)
    run = run_of("search.confirm_pairs=0", "name=torn")
    paper = SimpleNamespace(
        run=run,
        artefacts=folder / "artefacts",
        space=SMALL,
        predictor=SimpleNamespace(errors={}),
        majority=MAJORITY,
        device=None,
        timed_on=machine.fingerprint(),
        teacher=SimpleNamespace(base="m"),
        task=SimpleNamespace(fingerprint="d", shared_rows=0),
        bank=SimpleNamespace(trim=lambda: 0, made_seconds={}),
    )
    monkeypatch.setattr(driver, "Workshop", lambda *_: paper)
    identity = identity_of(run, model="m", data=f"d, {run.data.max_tokens} tokens", space=SMALL)
    identity["machine"] = machine.fingerprint()["id"]
    study = Study(folder, run, identity=identity, space=SMALL, writable=True)
    told = evaluate(study)
    study.close()
    with (folder / "study.journal").open("ab") as journal:
        journal.write(b'{"op_code": 6, "wor')
    torn = (folder / "study.journal").read_bytes()
    lines: list[str] = []
    drive(run, folder, progress=lines.append)
    [backup] = folder.glob("study.journal.torn-*")
    assert lines[0] == f"the study's last record was torn and was cut off; the file as it was: {backup.name}"
    assert backup.read_bytes() == torn
    assert Study(folder, run).candidates() == told
    assert len(pd.read_csv(folder / "study.csv")) == len(told)


# --- a search


TRIALS = 14
FITTED = Recover(epochs=0, reconstruct=True)


@pytest.fixture(scope="module")
def run(tiny_run: Callable[..., RunConfig], bert_headed_folder: Path) -> RunConfig:
    overrides = [f"search.trials={TRIALS}", "search.workers=2", "search.recover=1", "search.reconstruct=true"]
    overrides += ["baselines=[random]"]
    overrides += ["recovery.epochs=0.2", "search.confirm_pairs=6", f"model.id={json.dumps(str(bert_headed_folder))}"]
    return tiny_run(overrides)


@dataclasses.dataclass
class Searched:
    folder: Path
    lines: list[str]
    statuses: list[SearchStatus]

    def candidates(self) -> list[Candidate]:
        return api.open_study(self.folder).candidates()


@pytest.fixture(scope="module")
def searched(run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Searched:
    folder = tmp_path_factory.mktemp("driven") / "results"
    found = Searched(folder, [], [])
    drive(run, folder, progress=found.lines.append, watch=found.statuses.append)
    return found


@pytest.mark.slow
def test_statuses_count_up_to_the_number_of_candidates(searched: Searched) -> None:
    assert [status.done for status in searched.statuses] == list(range(1, TRIALS + 1))
    assert {status.total for status in searched.statuses} == {TRIALS}
    last = searched.statuses[-1]
    states = [c.state for c in searched.candidates() if c.origin != "recover"]
    assert (last.failed, last.stopped) == (states.count("FAIL"), states.count("PRUNED"))
    assert last.seconds_left == 0
    assert all(status.seconds_each > 0 and status.front >= 0 for status in searched.statuses)
    assert any(
        line.startswith(f"[ {TRIALS}/{TRIALS}] trial ") or f"{TRIALS}/{TRIALS}" in line for line in searched.lines
    )


@pytest.mark.slow
def test_the_random_baseline_is_a_study_of_its_own(searched: Searched, run: RunConfig) -> None:
    folder = searched.folder / BASELINES / "random"
    baseline = api.open_study(folder)
    assert baseline.finished == TRIALS
    assert {c.origin for c in baseline.candidates()} == {"sampler"}
    settings = baseline.run
    assert (settings.search.sampler, settings.search.seeds, settings.baselines) == ("random", False, ())
    assert not (folder / BASELINES).exists()
    assert (settings.search.trials, settings.space, settings.target) == (TRIALS, run.space, run.target)
    assert baseline.reference == api.open_study(searched.folder).reference, "measured once"
    assert any(line.startswith("random: ") for line in searched.lines)
    page = (searched.folder / "report.html").read_text(encoding="utf-8")
    assert WORTH in page
    assert "random search" in page
    assert "No random search was run" not in page


@pytest.mark.slow
def test_the_front_is_reconstructed(searched: Searched, run: RunConfig, tmp_path: Path) -> None:
    folder, lines = tmp_path / "results", list[str]()
    shutil.copytree(searched.folder, folder)
    shop = Workshop(run, folder / "artefacts")
    pruned = CompressionPlan((("block.0.ffn", PruneNeurons(keep=16)), ("block.1.ffn", PruneNeurons(keep=16))))
    whole = CompressionPlan((("head", Quantize(weight_bits=16)),))
    with closing(Study(folder, run, writable=True)) as study:
        # Nothing else is as small, and of the two the larger is faster: both are on the front.
        for size, ratio, plan in ((2, 0.5, whole), (1, 1.0, pruned)):
            shop.build(plan, shop.artefacts / plan.plan_id)
            score = dataclasses.replace(study.reference, size_bytes=size, latency_ratio=ratio)
            study.add(plan, score, origin="sampler")
        assert _reconstruct(study, shop, lines.append)
        parents = {c.plan: c.number for c in study.candidates()}
        made = [c for c in study.candidates() if c.plan.of_type(Recover).get(MODEL_SITE) == FITTED]
        assert pruned.with_decision(MODEL_SITE, FITTED) in {c.plan for c in made}
        assert whole.with_decision(MODEL_SITE, FITTED) not in {c.plan for c in made}, "nothing was removed"
        front = study.front().points
        for candidate in made:
            parent = parents[candidate.plan.without(Recover)]
            assert candidate.origin == "recover"
            line = f"trial {candidate.number} is trial {parent} reconstructed"
            assert any(said.startswith(line) for said in [*searched.lines, *lines])
            assert (shop.artefacts / candidate.plan.plan_id).exists() == (candidate in front)
        assert not _reconstruct(study, shop, lines.append), "all of them are known"


@pytest.mark.slow
def test_one_structure_is_recovered(searched: Searched) -> None:
    candidates = searched.candidates()
    [recovered] = [c for c in candidates if any(r.epochs for r in c.plan.of_type(Recover).values())]
    assert len([c for c in candidates if c.origin != "recover"]) == TRIALS
    assert recovered.plan.of_type(Recover) == {MODEL_SITE: Recover(epochs=0.2, hidden=RecoveryConfig().hidden)}
    without = [d for d in recovered.plan if not isinstance(d[1], Recover)]
    [parent] = [c for c in candidates if list(c.plan) == without]
    assert parent.plan.structural(), "nothing else could be won back"
    assert any(
        line.startswith(f"trial {recovered.number} is trial {parent.number} recovered") for line in searched.lines
    )


@pytest.mark.slow
def test_times_and_errors_are_json(searched: Searched) -> None:
    spent = json.loads((searched.folder / "timing.json").read_text(encoding="utf-8"))
    stages = spent["driver"]
    assert {"start", "reference", "candidates", "recovery", "confirmation", "baselines", "results"} <= set(stages)
    assert stages["all"] >= sum(seconds for name, seconds in stages.items() if name != "all") - 1e-6
    assert len(spent["ask"]) >= TRIALS
    file = searched.folder / "predictions.json"
    errors = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    assert set(errors) <= {"size", "latency"}
    assert all(math.isfinite(value) and value > -1 for values in errors.values() for value in values)


@pytest.mark.slow
def test_running_again_changes_nothing(searched: Searched, run: RunConfig) -> None:
    journals = [searched.folder / "study.journal", searched.folder / BASELINES / "random" / "study.journal"]
    before, known = [file.read_bytes() for file in journals], searched.candidates()
    statuses: list[SearchStatus] = []
    lines: list[str] = []
    drive(run, searched.folder, progress=lines.append, watch=statuses.append)
    assert searched.candidates() == known
    assert [file.read_bytes() for file in journals] == before
    assert statuses == []
    doing = ("recovering", "reconstructing", "evaluating", "measuring")
    assert not [line for line in lines if any(word in line for word in doing)]


@pytest.mark.slow
def test_a_search_that_is_over_holds_no_models(searched: Searched, run: RunConfig) -> None:
    gc.disable()
    try:
        drive(run, searched.folder, progress=lambda _: None)
        shops = [found for found in gc.get_objects() if type(found) is Workshop]
        assert not [shop for shop in shops if shop.artefacts.is_relative_to(searched.folder)]
    finally:
        gc.enable()
