"""Retargeting: a front is measured for another target in a study of its own, and the first one stays as it is."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers_records import make_candidate
from test_results import WORTH

from autocompress import api, model, task
from autocompress.config import ConstraintsConfig, RunConfig
from autocompress.driver import drive
from autocompress.errors import ConfigError, StudyError
from autocompress.evaluate import Workshop
from autocompress.gauge import Gauge
from autocompress.pareto import costs, nondominated
from autocompress.records import Candidate
from autocompress.retarget import Moved, _runs_as_it_is
from autocompress.runtimes import Artifact, get_runtime
from autocompress.study import Study

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def first(
    tiny_run: Callable[..., RunConfig], bert_headed_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The results folder of a search of eight candidates with OpenVINO."""
    folder = tmp_path_factory.mktemp("first") / "results"
    run = tiny_run(["search.trials=8", f"model.id={json.dumps(str(bert_headed_folder))}"])
    api.results_folder(run, folder)
    drive(run, folder, progress=lambda _: None)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def by_plan(study: Study) -> dict[str, Candidate]:
    return {c.plan.plan_id: c for c in study.candidates() if c.measurement is not None}


def test_the_same_artefact_is_timed_and_not_scored_again(first: Path, tmp_path: Path) -> None:
    before, lines = contents(first), list[str]()
    study, moved = api.retarget(first, tmp_path / "out", overrides=["target.tokens=8"], progress=lines.append)
    assert contents(first) == before
    assert study.run.target.tokens == 8
    old, new = by_plan(api.open_study(first)), by_plan(study)
    kept = {path.name for path in (first / "artefacts").iterdir()}
    assert {each.number for each in moved} == {old[plan_id].number for plan_id in new}
    assert {c.plan.plan_id for c in api.open_study(first).front().points} <= new.keys()
    for plan_id, candidate in new.items():
        assert candidate.origin == "retarget"
        for name in ("accuracy", "loss", "rows", "predictions", "size_bytes"):
            assert getattr(candidate.score, name) == getattr(old[plan_id].score, name)
        if plan_id in kept:
            assert candidate.score.confirmed
            assert not any(re.search(rf"scoring trial {old[plan_id].number}\b", line) for line in lines)
            copy = Artifact.open(study.folder / "artefacts" / plan_id)
            assert copy.size_bytes == candidate.score.size_bytes
    front = {c.number for c in study.front().points}
    for each in moved:
        assert each.candidate is not None
        assert each.is_on_front == (each.candidate.number in front)
        assert each.words().startswith(f"trial {each.number}, ")
    assert WORTH not in (study.folder / "report.html").read_text(encoding="utf-8"), "another search found them"


def test_limits_that_depend_on_the_target_are_judged_there(first: Path, tmp_path: Path) -> None:
    """As where nothing is fast enough on the machine that was searched on."""
    old = api.open_study(first)
    for limit, count in (({"max_latency_ratio": 1e-3, "max_latency_ms": 1e-3}, True), ({"max_size_mb": 1e-3}, False)):
        there = tmp_path / f"there-{count}"
        shutil.copytree(first, there)
        run = old.run.model_copy(update={"constraints": ConstraintsConfig(**limit)})
        (there / "run.yaml").write_text(run.to_yaml(), encoding="utf-8")
        lines: list[str] = []
        _, moved = api.retarget(there, tmp_path / f"here-{count}", ranks=1, progress=lines.append)
        assert bool(moved) == count
        said = "no candidate keeps to those constraints that do not depend on the target"
        assert (said in lines) == (not count)


def test_another_runtime_builds_and_scores(first: Path, tmp_path: Path) -> None:
    study, moved = api.retarget(first, tmp_path / "out", overrides=["target.runtime=onnxruntime"], ranks=1)
    old = api.open_study(first)
    complete = [c for c in old.candidates() if c.measurement is not None]
    unbeaten = {
        c.number for c, on_it in zip(complete, nondominated(costs(complete, old.run.objectives)), strict=True) if on_it
    }
    assert {each.number for each in moved} == unbeaten >= {c.number for c in old.front().points}
    assert {Artifact.open(study.folder / "artefacts" / c.plan.plan_id).runtime for c in study.front().points} == {
        "onnxruntime"
    }
    again, same = api.retarget(first, tmp_path / "out", overrides=["target.runtime=onnxruntime"], ranks=1)
    assert again.candidates() == study.candidates(), "what is known is not measured again"
    assert [each.candidate for each in same] == [each.candidate for each in moved]
    assert {c.score.confirmed for c in study.candidates()} == {True}, "as those that are copied"


def test_what_was_timed_once_and_is_gone_is_built_again(first: Path, tmp_path: Path) -> None:
    """As where a search that goes on in the new study has measured the same plans, and kept its front alone."""
    out, overrides = tmp_path / "out", ["target.runtime=onnxruntime"]
    _, moved = api.retarget(first, out, overrides=[*overrides, "target.tokens=8"], ranks=1)
    journal = out / "study.journal"
    journal.write_text(re.sub(r'("confirmed": ?)true', r"\1false", journal.read_text(encoding="utf-8")))
    once = [c for c in api.open_study(out).candidates() if not c.score.confirmed]
    assert once
    shutil.rmtree(out / "artefacts" / once[0].plan.plan_id)
    again, same = api.retarget(first, out, overrides=[*overrides, "target.tokens=8"], ranks=1)
    assert {c.score.confirmed for c in again.candidates()} == {True}
    assert [each.number for each in same] == [each.number for each in moved]


def test_a_study_of_another_machine_goes_on_elsewhere(first: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    shutil.copytree(first, there)
    journal = there / "study.journal"
    own = json.loads((first / "environment.json").read_text(encoding="utf-8"))["machine"]["id"]
    journal.write_text(journal.read_text(encoding="utf-8").replace(own, "another"), encoding="utf-8")
    run = RunConfig.from_file(there / "run.yaml")
    said = rf"machine: another became {own}.*autocompress retarget .*there -o NEW measures"
    with pytest.raises(StudyError, match=said):
        drive(run, there, progress=lambda _: None)
    lines: list[str] = []
    study, moved = api.retarget(there, tmp_path / "here", progress=lines.append)
    assert len(study.front()) > 0
    kept = {path.name for path in (first / "artefacts").iterdir()}
    scored = {line for line in lines if line.endswith(" on this machine")}
    assert len(scored) == len(kept & by_plan(study).keys()) > 0, "its predictions were made elsewhere"
    assert all(each.candidate is not None for each in moved)
    trials = len(study.candidates()) + 1
    drive(
        RunConfig.from_file(tmp_path / "here" / "run.yaml", overrides=[f"search.trials={trials}"]),
        tmp_path / "here",
        progress=lambda _: None,
    )
    assert api.open_study(tmp_path / "here").finished == trials, "it can be searched on"


def test_what_depends_on_the_target_is_not_copied(first: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = api.open_study(first)
    [point, *_] = old.front().points

    def runs(*overrides: str) -> bool:
        return _runs_as_it_is(point, old, RunConfig.from_file(first / "run.yaml", overrides=overrides))

    assert runs("target.tokens=8")
    assert runs("target.batch_size=2"), "logits do not depend on it"
    monkeypatch.setattr(type(get_runtime("openvino")), "arithmetic", "of a later version")
    assert not runs("target.tokens=8")


def test_memory_is_measured_anew(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gauge, "memory", lambda *_: 123_000_000)
    study, moved = api.retarget(first, tmp_path / "out", overrides=["target.tokens=8"], ranks=1)
    copied = {folder.name for folder in (first / "artefacts").iterdir()}
    assert moved
    assert {c.score.peak_memory_bytes for c in study.candidates() if c.plan.plan_id in copied} == {123_000_000}


def test_only_the_target_can_be_another(first: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="only the target can be another"):
        api.retarget(first, tmp_path / "out", overrides=["data.search_rows=20"])
    with pytest.raises(StudyError, match="is the study itself"):
        api.retarget(first, first)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("now", ["rows", "model"])
def test_other_rows_or_another_model_are_refused(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, now: str
) -> None:
    if now == "rows":
        monkeypatch.setattr(task.Task, "fingerprint", "of other rows")
    else:
        monkeypatch.setattr(model, "fingerprint", lambda _: "another")
    said = {"rows": "holds other rows than those", "model": "is not the one that .+ compresses"}
    with pytest.raises(StudyError, match=said[now]):
        api.retarget(first, tmp_path / "out", overrides=["target.tokens=8"])
    assert not (tmp_path / "out").exists()


def test_where_the_classifier_was_fine_tuned_anew_all_is_built_from_it(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine that the search's bank was not brought to."""
    shutil.copytree(api.open_study(first).run.model.id, tmp_path / "fine-tuned")
    monkeypatch.setattr(Workshop, "teacher_folder", tmp_path / "fine-tuned")
    monkeypatch.setattr(model, "fingerprint", lambda _: "fine-tuned anew")
    lines: list[str] = []
    study, _ = api.retarget(first, tmp_path / "out", overrides=["target.tokens=8"], ranks=1, progress=lines.append)
    assert "the classifier was fine-tuned anew: all points are built from that, and compared with it" in lines
    assert sum(line.startswith("building and scoring trial ") for line in lines) == len(by_plan(study)) > 0
    assert study.identity.is_of_model("fine-tuned anew")


def test_words() -> None:
    old, new = make_candidate(3, accuracy=0.9), make_candidate(7, accuracy=0.9)
    said = {
        (was, is_): Moved(3, old.score, was, new, is_).words().rpartition("faster")[2]
        for was in (True, False)
        for is_ in (True, False)
    }
    assert said[True, True] == said[False, False] == ""
    assert (said[True, False], said[False, True]) == (", left the front", ", came onto the front")
    assert Moved(3, old.score, True, None, False).words().endswith("cannot be built for this target")
