"""The driver: what it says on the way, the files it leaves, and that a finished search is not begun again."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import shutil
from collections.abc import Callable
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from test_results import MAJORITY, WORTH, environment_of
from test_study import SMALL, evaluate, run_of
from test_trackers import of_tensorboard

from autocompress import api, driver, machine
from autocompress.config import RecoveryConfig, RunConfig
from autocompress.decisions import PruneNeurons, Quantize, Recover
from autocompress.driver import drive
from autocompress.errors import StudyError
from autocompress.evaluate import Workshop
from autocompress.identity import identity_of
from autocompress.journal import LOCK, held
from autocompress.plan import MODEL_SITE, CompressionPlan
from autocompress.records import Candidate
from autocompress.reference import SCHEMA, reference_key
from autocompress.refine import _reconstruct
from autocompress.results import BASELINES
from autocompress.status import SearchStatus
from autocompress.study import Study


def test_a_torn_record_that_was_cut_off_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a finished study and a workshop of paper, in which there is nothing left to do."""
    folder = tmp_path / "results"
    (folder / "artefacts" / "reference").mkdir(parents=True)
    environment_of(folder, majority=MAJORITY)
    run = run_of("search.confirm_pairs=0", "name=torn")
    paper = SimpleNamespace(
        run=run,
        artefacts=folder / "artefacts",
        reference_folder=folder / "artefacts" / "reference",
        space=SMALL,
        predictor=SimpleNamespace(errors={}),
        majority=MAJORITY,
        gauge=SimpleNamespace(device=None, machine=machine.fingerprint()),
        teacher=SimpleNamespace(base="m", shape=SMALL.shape),
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


@pytest.mark.parametrize("there", ["nothing", "another model's", "its own"])
def test_workers_find_no_reference_of_another_model(
    tiny_run: Callable[..., RunConfig],
    bert_headed_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    there: str,
) -> None:
    """As where a search was ended while it measured the reference, and goes on with another model."""
    run, folder = tiny_run([f"model.id={json.dumps(str(bert_headed_folder))}"]), tmp_path / "results"
    (reference := folder / "artefacts" / "reference").mkdir(parents=True)
    if there != "nothing":
        key = reference_key(Workshop(run, folder / "artefacts"))
        known = {"schema": SCHEMA, "key": key if there == "its own" else {**key, "model": "m"}}
        (folder / "environment.json").write_text(json.dumps(known), encoding="utf-8")
    seen: list[bool] = []

    class Paper:
        def open(self) -> None:
            seen.append(reference.exists())

    def ended(*_: object) -> Study:
        raise KeyboardInterrupt

    monkeypatch.setattr(driver, "_workers", lambda *_: nullcontext(Paper()))
    monkeypatch.setattr(driver, "open_for_writing", ended)
    with pytest.raises(KeyboardInterrupt):
        drive(run, folder, progress=lambda _: None)
    assert seen == [there == "its own"]


def test_a_second_driver_touches_nothing(tiny_run: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Also while the first one has not measured the reference yet, and there is no study."""
    folder = tmp_path / "results"
    (folder / "artefacts" / "reference").mkdir(parents=True)
    with held(folder):
        before = sorted(folder.rglob("*"))
        with pytest.raises(StudyError, match="another search drives this study"):
            drive(tiny_run(), folder, progress=lambda _: None)
        assert sorted(folder.rglob("*")) == before


def test_a_folder_that_another_driver_has_stays(
    tiny_run: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both found none; the one that comes second leaves what the first has made."""
    out = tmp_path / "results"
    with ExitStack() as first:

        def lost(run: RunConfig, folder: Path, **_: object) -> None:
            first.enter_context(held(folder))
            raise StudyError("another search drives this study")

        monkeypatch.setattr(driver, "drive", lost)
        with pytest.raises(StudyError, match="another search drives"):
            api.search(tiny_run(), out)
        assert {path.name for path in out.iterdir()} == {"artefacts", LOCK}
    monkeypatch.setattr(driver, "drive", lambda *_, **__: (_ for _ in ()).throw(StudyError("wrong")))
    shutil.rmtree(out)
    with pytest.raises(StudyError, match="wrong"):
        api.search(tiny_run(), out)
    assert not out.exists()


def test_a_home_is_that_of_the_driver(
    tiny_run: Callable[..., RunConfig],
    bert_headed_folder: Path,
    tiny_csv: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Workers may be of another user, on another machine."""
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copyfile(tiny_csv, tmp_path / "rows.csv")
    (tmp_path / "space.yaml").write_text("{schema: 1, name: few, rules: [{match: head, bits: [8, 16]}]}")
    model = f"model.id={json.dumps(str(bert_headed_folder))}"
    workshop = Workshop(tiny_run([model, "data.source=~/rows.csv", "space=~/space.yaml"]), tmp_path / "artefacts")
    found = driver._run_for_workers(workshop, elsewhere=False)
    assert (found.data.source, found.space) == (str(tmp_path / "rows.csv"), str(tmp_path / "space.yaml"))
    assert workshop.space.space.name == "few"


# --- a search


TRIALS = 14
FITTED = Recover(epochs=0, reconstruct=True)


@pytest.fixture(scope="module")
def run(tiny_run: Callable[..., RunConfig], bert_headed_folder: Path) -> RunConfig:
    overrides = [f"search.trials={TRIALS}", "search.workers=2", "search.recover=1", "search.reconstruct=true"]
    overrides += ["baselines=[random]", "trackers=[tensorboard]"]
    overrides += ["recovery.epochs=0.2", f"model.id={json.dumps(str(bert_headed_folder))}"]
    return tiny_run(overrides)


@dataclasses.dataclass
class Searched:
    folder: Path
    lines: list[str]
    statuses: list[SearchStatus]
    staged: list[bool] = dataclasses.field(default_factory=list)
    """Whether the folder named a stage at each of them."""

    def candidates(self) -> list[Candidate]:
        return api.open_study(self.folder).candidates()


@pytest.fixture(scope="module")
def searched(run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Searched:
    folder = tmp_path_factory.mktemp("driven") / "results"
    found = Searched(folder, [], [])
    folder.mkdir()
    (folder / "stage.txt").write_text("timing the front anew", encoding="utf-8")  # of one that was ended there

    def watch(status: SearchStatus) -> None:
        found.statuses.append(status)
        found.staged.append((folder / "stage.txt").exists())

    drive(run, folder, progress=found.lines.append, watch=watch)
    return found


@pytest.mark.slow
def test_statuses_count_up_to_the_number_of_candidates(searched: Searched) -> None:
    evaluated = [status for status in searched.statuses if not status.stage]
    assert [status.done for status in evaluated] == list(range(1, TRIALS + 1))
    assert searched.statuses[: len(evaluated)] == evaluated, "stages come after that"
    stages = dict.fromkeys(status.stage.split(":")[0] for status in searched.statuses[len(evaluated) :])
    assert {"timing the front anew", "a random search to hold it against"} <= set(stages)
    assert searched.statuses[-1].stage.endswith(f": {TRIALS} of {TRIALS} candidates, timing the front anew")
    assert searched.staged == [bool(status.stage) for status in searched.statuses]
    assert not (searched.folder / "stage.txt").exists()
    assert {status.total for status in searched.statuses} == {TRIALS}
    last = searched.statuses[-1]
    states = [c.state for c in searched.candidates() if c.origin != "recover"]
    assert (last.failed, last.stopped) == (states.count("FAIL"), states.count("PRUNED"))
    assert last.seconds_left == 0
    assert searched.statuses[0].untrained >= evaluated[-1].untrained
    assert all(status.seconds_each > 0 and 0 < len(status.front) <= status.done for status in evaluated)
    assert not any(line.startswith("a search starts with") for line in searched.lines), "it reaches beyond them"
    assert any(
        line.startswith(f"[ {TRIALS}/{TRIALS}] trial ") or f"{TRIALS}/{TRIALS}" in line for line in searched.lines
    )


@pytest.mark.slow
def test_a_space_that_holds_fewer_plans_is_counted_to_its_end(run: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "few.yaml").write_text("{schema: 1, name: few, rules: [{match: head, bits: [8, 16]}]}")
    more = {"space": str(tmp_path / "few.yaml"), "baselines": [], "trackers": []}
    own = ["search.recover=0", f"storage.bank={tmp_path / 'bank'}"]
    few = RunConfig.from_mapping({**run.model_dump(mode="json", by_alias=True), **more}, overrides=own)
    found = Searched(tmp_path / "results", [], [])
    drive(few, found.folder, progress=found.lines.append, watch=found.statuses.append)
    assert "the space holds 2 plans, fewer than that" in found.lines
    evaluated = [(status.done, status.total) for status in found.statuses if not status.stage]
    assert evaluated == [(1, 2), (2, 2)]


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
    assert {c.score.confirmed for c in baseline.front().points} == {True}, "as those it is held against"
    assert baseline.reference == api.open_study(searched.folder).reference, "measured once"
    assert any(line.startswith("random: ") for line in searched.lines)
    page = (searched.folder / "report.html").read_text(encoding="utf-8")
    assert WORTH in page
    assert "random search" in page
    assert "No random search was run" not in page


@pytest.mark.slow
def test_every_scored_candidate_is_logged_and_confirmed_ones_anew(searched: Searched) -> None:
    logged = of_tensorboard(searched.folder)
    scored = {c.number: c.score for c in searched.candidates() if c.measurement is not None}
    assert logged.keys() == scored.keys()
    for number, score in scored.items():
        step, ratio = logged[number]["latency_ratio"][-1]
        assert ratio == pytest.approx(score.latency_ratio)
        assert step == (0 if not score.confirmed else 1 if score.latency_adjusted == 1 else 2)
    assert not (searched.folder / BASELINES / "random" / "tensorboard").exists()


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
        assert _reconstruct(study, shop, lines.append, lambda _: None)
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
        assert not _reconstruct(study, shop, lines.append, lambda _: None), "all of them are known"


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
def test_what_is_refused_leaves_the_reference_as_it_is(searched: Searched, run: RunConfig, tmp_path: Path) -> None:
    """Also where its artefact is gone, as in a copy of the results without artefacts."""
    copy = tmp_path / "copy"
    shutil.copytree(searched.folder, copy, ignore=shutil.ignore_patterns("artefacts"))
    before = (copy / "environment.json").read_bytes()
    changed = run.model_dump(mode="json", by_alias=True)
    changed["data"]["search_rows"] -= 10
    with pytest.raises(StudyError, match="made with other settings"):
        drive(RunConfig.from_mapping(changed), copy, progress=lambda _: None)
    assert (copy / "environment.json").read_bytes() == before
    assert not (copy / "artefacts").exists()
    drive(run, copy, progress=lambda _: None)
    assert (copy / "environment.json").read_bytes() == before
    assert (copy / "artefacts" / "reference").is_dir()


@pytest.mark.slow
def test_a_search_that_is_over_holds_no_models(searched: Searched, run: RunConfig) -> None:
    gc.disable()
    try:
        drive(run, searched.folder, progress=lambda _: None)
        shops = [found for found in gc.get_objects() if type(found) is Workshop]
        assert not [shop for shop in shops if shop.artefacts.is_relative_to(searched.folder)]
    finally:
        gc.enable()
