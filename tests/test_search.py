"""From a run file to an exported folder through the command line, with a tiny model: searched, continued, killed."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from helpers_browser import browser, opened
from helpers_hub import Hub
from processes import descendants
from test_cli import Done
from test_study import CSV_COLUMNS, plan_ids, rows, states

from autocompress import api, delivery, model, task, timing
from autocompress.calm import Calm
from autocompress.config import RunConfig, TargetConfig
from autocompress.errors import AutocompressError, ConfigError, ExportError
from autocompress.gauge import Gauge
from autocompress.plan import CompressionPlan
from autocompress.records import Candidate
from autocompress.runtimes import Artifact, get_runtime
from autocompress.scoring import logits_of
from autocompress.study import Study

pytestmark = pytest.mark.slow

TRIALS = 6
FORMATS = {"openvino": "model.bin", "onnx": "model.onnx"}
PROGRESS = re.compile(r"\d\d:\d\d:\d\d .+")
PARAMETERS = ("student", "attention.heads.0", "attention.bits.0", "ffn.neurons.0", "ffn.bits.0", "embedding.bits.0")


def environment() -> dict[str, str]:
    ours = {k: v for k, v in os.environ.items() if k not in ("GITHUB_ACTIONS", "FORCE_COLOR", "AUTOCOMPRESS_DEBUG")}
    return {**ours, "TERM": "xterm-256color"}


def command(*args: object, cwd: Path) -> Done:
    done = subprocess.run(
        [sys.executable, "-m", "autocompress.cli", *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env=environment(),
        timeout=600,
    )
    assert "\x1b" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert all(PROGRESS.fullmatch(line) for line in done.stderr.splitlines()) or done.returncode != 0, done.stderr
    return Done(done.returncode, done.stdout, done.stderr)


def read_csv(file: Path) -> pd.DataFrame:
    return pd.read_csv(file, float_precision="round_trip")


@pytest.fixture(scope="module")
def workplace(
    tmp_path_factory: pytest.TempPathFactory, tiny_run: Callable[..., RunConfig], bert_headed_folder: Path
) -> Path:
    """A folder with a run file of the tiny model with a head, whose accuracy means something."""
    folder = tmp_path_factory.mktemp("search")
    overrides = [f"model.id={json.dumps(str(bert_headed_folder))}", f"search.trials={TRIALS}"]
    # Which candidates are given up depends on who is done first; the files and counts here are those of all.
    overrides.append("search.stop_early=false")
    (folder / "run.yaml").write_text(tiny_run(overrides).to_yaml(), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def searched(workplace: Path) -> Path:
    """The results folder of a search, at its default place below the folder that it was started in."""
    done = command("search", "run.yaml", cwd=workplace)
    assert done.code == 0, done.err
    assert "[  6/6] trial " in done.err
    assert " 6 trials leave nothing to search for beyond them" in done.err
    assert "times smaller" in done.out
    assert done.out.endswith("next: autocompress export results/tiny --prefer knee -o OUT\n")
    return workplace / "results" / "tiny"


@pytest.fixture
def copy(searched: Path, tmp_path: Path) -> Path:
    """A copy of the results folder to be changed."""
    shutil.copytree(searched, tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_search_evaluates_exactly_its_number_of_candidates(searched: Path) -> None:
    table = read_csv(searched / "study.csv")
    assert len(table) == TRIALS
    assert list(table["state"]) == ["COMPLETE"] * TRIALS
    assert table["number"].is_unique
    assert table["plan_id"].is_unique
    assert states(searched) == {"COMPLETE": TRIALS}


def test_the_csv_files_hold_what_is_promised(searched: Path) -> None:
    everything, front = (read_csv(searched / name) for name in ("study.csv", "pareto.csv"))
    for table in (everything, front):
        assert {*CSV_COLUMNS, *(f"param.{name}" for name in PARAMETERS)} <= set(table.columns)
        for name in ("accuracy", "size_bytes", "latency_ms", "latency_ratio", "seconds"):
            assert (table[name] > 0).all()
        for name in ("accuracy", "latency_ratio"):
            assert (table[f"{name}_low"] <= table[name]).all()
            assert (table[name] <= table[f"{name}_high"]).all()
    costs = everything[["accuracy", "size_bytes", "latency_ratio"]].to_numpy() * [-1, 1, 1]
    dominated = np.array([any((other <= row).all() and (other < row).any() for other in costs) for row in costs])
    assert not set(front["number"]) & set(everything["number"][dominated])
    # Of those that timings cannot tell apart, one stands for the others.
    deviations = np.log(everything["latency_ratio_high"] / everything["latency_ratio_low"]).to_numpy() / 3.92
    on_it = np.isin(everything["number"], front["number"])
    for row, deviation in zip(costs[~dominated & ~on_it], deviations[~dominated & ~on_it], strict=True):
        as_good = (costs[on_it][:, :2] <= row[:2]).all(axis=1)
        slower = np.log(costs[on_it][:, 2] / row[2])
        assert (as_good & (slower < np.hypot(deviations[on_it], deviation))).any()
    by_number = everything.set_index("number")
    for _, point in front.iterrows():
        assert point["accuracy"] == by_number["accuracy"][point["number"]]


def test_the_environment_holds_the_reference(searched: Path) -> None:
    found = json.loads((searched / "environment.json").read_text(encoding="utf-8"))
    reference = found["reference"]
    assert reference["accuracy"] > 0.8
    assert reference["latency_ms"] > 0
    artefact = Artifact.open(searched / "artefacts" / "reference")
    assert reference["size_bytes"] == artefact.size_bytes > 50_000
    assert found["machine"]["cpu"]["cores"] >= 1
    assert set(found["protocol"]) == {"accuracy", "size", "latency"}


def test_artefacts_of_the_front_are_kept_and_no_others(searched: Path) -> None:
    front = read_csv(searched / "pareto.csv")
    assert {path.name for path in (searched / "artefacts").iterdir()} == {"reference", *front["plan_id"]}
    sizes = {plan_id: Artifact.open(searched / "artefacts" / plan_id).size_bytes for plan_id in front["plan_id"]}
    assert sizes == dict(zip(front["plan_id"], front["size_bytes"], strict=True))


def test_latencies_of_the_front_are_taken_anew(searched: Path) -> None:
    study = api.open_study(searched)
    front = {c.number for c in study.front().points}
    assert front
    assert all(c.score.confirmed for c in study.front().points)
    # Others are confirmed only if that has pushed them off.
    everything = read_csv(searched / "study.csv").set_index("number")
    for candidate in study.candidates():
        assert everything["latency_ratio"][candidate.number] == candidate.score.latency_ratio
        told = next(t for t in rows(searched) if t.number == candidate.number)
        assert told.values[2] == told.user_attrs["measurement"]["latency_ratio"]
        assert (candidate.score.latency_ratio != told.values[2]) == candidate.score.confirmed


def test_the_same_command_again_evaluates_nothing(searched: Path, workplace: Path) -> None:
    names = ("study.csv", "pareto.csv", "study.journal", "environment.json", "run.yaml")
    before = {name: (searched / name).read_bytes() for name in names}
    done = command("search", "run.yaml", "--json", cwd=workplace)
    assert [point["number"] for point in json.loads(done.out)] == list(read_csv(searched / "pareto.csv")["number"])
    assert "evaluating" not in done.err
    assert "measuring" not in done.err
    assert {name: (searched / name).read_bytes() for name in names} == before


def test_a_larger_number_adds_exactly_the_difference_over_an_interruption(copy: Path, workplace: Path) -> None:
    before = read_csv(copy / "study.csv")
    process = start_search(workplace, copy, "search.trials=16")
    begun = list(lines_until(process, "] trial "))
    assert any("evaluating 10 of 16 candidates" in line for line in begun)
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=60)
    assert time.monotonic() - start < 30
    assert process.returncode == 130
    assert rest.endswith(" interrupted; run the same command again to continue\n")
    done = command("search", "run.yaml", "--out", copy, "--set", "search.trials=16", cwd=workplace)
    assert done.code == 0, done.err
    # How many were told before the signal came depends on the workers; at least one, and not all.
    assert any(f"evaluating {left} of 16 candidates" in done.err for left in range(1, 10))
    after = read_csv(copy / "study.csv")
    pd.testing.assert_frame_equal(after[: len(before)][list(before.columns)], before, check_dtype=False)
    assert len(after) == 16
    assert after["plan_id"].is_unique
    assert states(copy)["COMPLETE"] + states(copy).get("PRUNED", 0) == 16
    assert not {"RUNNING", "WAITING"} & set(states(copy))


def test_recovery_adds_one_candidate(copy: Path, workplace: Path) -> None:
    number = int(read_csv(copy / "pareto.csv")["number"][0])
    shutil.rmtree(copy / "artefacts" / "reference")  # as where room was made; it is built again
    done = command("recover", copy, "--trial", number, "--epochs", "0.5", "--json", cwd=workplace)
    assert done.code == 0, done.err
    assert "building the uncompressed model again" in done.err
    found = json.loads(done.out)
    assert "recovered 0.5 epochs" in found["plan"]
    table = read_csv(copy / "study.csv")
    assert len(table) == TRIALS + 1
    added = table.set_index("number").loc[found["trial"]]
    assert (added["origin"], added["state"], added["plan_id"]) == ("recover", "COMPLETE", found["plan_id"])
    told = command("status", copy, "--json", cwd=workplace).json()
    assert (told["complete"], told["recovered"], told["wanted"]) == (TRIALS, 1, TRIALS)
    artefact = copy / "artefacts" / found["plan_id"] / "artefact.json"
    built = artefact.stat().st_mtime_ns
    # It may have pushed the point that it came from off the front; that one can still be recovered in other ways.
    twice = command("recover", copy, "--trial", number, "--epochs", "0.5", "--json", cwd=workplace)
    assert twice.json() == found
    assert artefact.stat().st_mtime_ns == built, "a score stays with the artefact that it was taken from"
    settings = ("--epochs", "0.5", "--set", "recovery.seeds=2", "--set", "recovery.relations=1")
    more = command("recover", copy, "--trial", number, *settings, "--json", cwd=workplace)
    assert more.code == 0, more.err
    averaged = json.loads(more.out)
    assert averaged["trial"] == found["trial"] + 1
    assert "recovered 0.5 epochs block by block, relations 1, mean of 2 seeds" in averaged["plan"]
    again = command("search", "run.yaml", "--out", copy, cwd=workplace)
    assert again.code == 0
    assert "evaluating" not in again.err


# --- export and measure


@pytest.fixture(scope="module")
def exported(searched: Path, workplace: Path) -> Path:
    """A folder with one exported point in each format."""
    done = command(
        *("export", searched, "--pick", "accuracy", "--format", "openvino", "--format", "onnx", "-o", "out", "--json"),
        cwd=workplace,
    )
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert set(found) == set(FORMATS)
    assert {shipped["reloaded_predictions"] for shipped in found.values()} == {"identical"}
    return workplace / "out"


def test_the_command_that_the_report_copies_exports_that_point(searched: Path, workplace: Path) -> None:
    with browser() as chromium:
        page = chromium.new_page()
        errors = opened(page, (searched / "report.html").as_uri())
        page.locator("table [data-trial]").last.click()
        number = int(page.locator("#detail h3").text_content().removeprefix("Trial "))
        assert page.locator("#detail table.plan tbody tr").count() >= 1
        copied = page.locator("#command").input_value()
        assert errors == []
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        copied, shell=True, cwd=workplace, env=environment() | {"PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    about = json.loads((workplace / f"tiny-trial-{number}" / "measurement.json").read_text(encoding="utf-8"))
    assert about["trial"] == number


OF_PYTORCH = {
    "hf": ("model.safetensors", {"config.json", "tokenizer.json"}),
    "torch": ("program.pt2", {"tokenizer"}),
}


@pytest.mark.parametrize("format_", OF_PYTORCH)
def test_what_pytorch_runs_predicts_as_its_score(searched: Path, workplace: Path, format_: str) -> None:
    shelf = f"shelf-{format_}"
    done = command("export", searched, "--pick", "size", "--format", format_, "-o", shelf, "--json", cwd=workplace)
    assert done.code == 0, done.err
    told, folder = json.loads(done.out)[format_], workplace / shelf
    assert told["agreement_with_scored_candidate"] >= 0.98
    assert "not timed" in told["latency"]
    assert "latency_ratio" not in told, "which is a number elsewhere"
    weights, others = OF_PYTORCH[format_]
    assert {file.name for file in folder.iterdir()} >= {weights, *others, "README.md", "predict.py", "measurement.json"}
    assert told["size_bytes"] == (folder / weights).stat().st_size
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "Held-out" in card or "held-out" in card
    assert "Latency" not in card
    missing = () if format_ == "hf" else ("autocompress", "transformers", "optuna", "ray", "openvino", "onnxruntime")
    alone = f"import sys, runpy; sys.modules |= dict.fromkeys({missing}); sys.argv = ['predict.py', 'fine', 'bad']; "
    said = subprocess.run(
        [sys.executable, "-c", f"{alone}runpy.run_path({str(folder / 'predict.py')!r}, run_name='__main__')"],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert said.returncode == 0, said.stderr
    about = json.loads((folder / "measurement.json").read_text(encoding="utf-8"))
    assert [line.split("\t")[0] in about["labels"] for line in said.stdout.splitlines()] == [True, True]
    timed = command("measure", folder, "--pairs", "4", "--json", cwd=workplace)
    assert timed.code == 0, timed.err
    found = json.loads(timed.out)
    assert 0 < found["latency_ms"] <= found["latency_p90_ms"]
    assert "latency_ratio" not in found
    assert found["target"]["runtime"] == "torch"
    assert CompressionPlan.from_json((folder / "plan.json").read_text(encoding="utf-8")).plan_id == about["plan_id"]


def test_what_can_be_no_program_is_refused_before_any_work(
    searched: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("data-dependent")

    monkeypatch.setattr("torch.export.export", refuse)
    monkeypatch.setattr(delivery, "_scored", lambda *_: pytest.fail("something was done"))
    chosen = api.open_study(searched).front().pick(prefer="size")
    with pytest.raises(ExportError, match=r"cannot be recorded by torch.export \(data-dependent\)"):
        api.export(chosen, workplace / "never", formats=["openvino", "torch"])
    assert not (workplace / "never").exists()


def test_an_export_whose_bank_holds_another_model_is_refused(
    searched: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = np.zeros((60, 2), dtype=np.float32)
    monkeypatch.setattr(delivery, "_run_unpacked", lambda *_: other)
    chosen = api.open_study(searched).front().pick(prefer="size")
    with pytest.raises(
        ExportError, match=r"predicts as its score on \d+\.\d% of the search rows alone, and has to on 98%"
    ):
        api.export(chosen, workplace / "never", formats=["hf"])
    assert not (workplace / "never").exists()


def test_what_is_pushed_is_what_was_exported_and_nothing_else(
    searched: Path, workplace: Path, hub_on_loopback: Hub
) -> None:
    out = workplace / "pushed"
    out.mkdir()
    (out / ".env").write_text("SECRET=1", encoding="utf-8")
    shipped = api.export(picked(searched), out, force=True, push_to_hub="me/tiny", private=True)["openvino"]
    assert shipped.pushed == f"{hub_on_loopback.address}/me/tiny"
    assert hub_on_loopback.repositories == {"me/tiny": True}
    written = {str(f.relative_to(out)): f.read_bytes() for f in out.rglob("*") if f.is_file() and f.name != ".env"}
    assert hub_on_loopback.files["me/tiny"] == written


def test_a_push_that_would_be_refused_exports_nothing(
    searched: Path, workplace: Path, hub_on_loopback: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    point, out = picked(searched), workplace / "not-pushed"
    with pytest.raises(ConfigError, match="takes one format at a time, got openvino, onnx"):
        api.export(point, out, formats=["openvino", "onnx"], push_to_hub="me/tiny")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ExportError, match="there is no token"):
        api.export(point, out, push_to_hub="me/tiny")
    assert not out.exists()
    line = command("export", searched, "-o", out, "--private", cwd=workplace).line(2)
    assert "--private: goes with --push-to-hub" in line


def picked(searched: Path) -> Candidate:
    return api.open_study(searched).front().pick(prefer="accuracy")


def logits_through(
    folder: Path, run: RunConfig, split: str, *, model: Path | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return logits and classes of a split, from nothing but an exported folder (or another ``model``) and the data."""
    from transformers import AutoTokenizer

    artifact = Artifact.open(model or folder)
    about = json.loads((folder / "measurement.json").read_text(encoding="utf-8"))
    session = get_runtime(artifact.runtime).load(artifact, TargetConfig(**about["target"]))
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    rows = task.load(run.data, labels=tuple(about["labels"])).tokenized(tokenizer, about["max_tokens"])[split]
    return logits_of(session, rows, rows.in_order_of_length(1)), np.array(rows.labels)


@pytest.mark.parametrize("format_", FORMATS)
def test_an_exported_folder_predicts_as_its_card_says(exported: Path, searched: Path, format_: str) -> None:
    folder = exported / format_
    run = RunConfig.from_file(searched / "run.yaml")
    about = json.loads((folder / "measurement.json").read_text(encoding="utf-8"))
    point = picked(searched)
    assert (about["trial"], about["plan_id"]) == (point.number, point.plan.plan_id)
    for split, stored in (("search", about["search"]["accuracy"]), ("test", about["test"]["value"])):
        logits, labels = logits_through(folder, run, split)
        assert (logits.argmax(axis=1) == labels).mean() == stored
    assert about["test"]["rows"] == 60
    assert about["test"]["low"] <= about["test"]["value"] <= about["test"]["high"]
    assert about["search"]["size_bytes"] == Artifact.open(folder).size_bytes
    assert 0.8 <= about["agreement_with_scored_candidate"] <= 1
    assert (folder / "README.md").read_text(encoding="utf-8").startswith("---")


@pytest.mark.parametrize("format_", FORMATS)
def test_its_program_reads_a_line_as_one_text(exported: Path, format_: str) -> None:
    program = [sys.executable, str(exported / format_ / "predict.py")]
    told = "good\tbad\nodd\u2028film\ngood bad\n"
    done = subprocess.run(program, input=told.encode(), capture_output=True, check=True, timeout=120)
    lines = [line.split("\t", 2) for line in done.stdout.decode().rstrip("\n").split("\n")]
    assert [text for _, _, text in lines] == told.rstrip("\n").split("\n")
    assert lines[0][:2] == lines[2][:2], "a tab is a blank where a model reads one text"


@pytest.mark.parametrize(("side", "read"), [("right", "bad"), ("left", "good")])
def test_its_program_cuts_texts_as_they_were_cut(exported: Path, tmp_path: Path, side: str, read: str) -> None:
    folder = tmp_path / "elsewhere"
    shutil.copytree(exported / "openvino", folder)
    about = json.loads((folder / "measurement.json").read_text(encoding="utf-8"))
    assert about["truncation_side"] == "right"
    (folder / "measurement.json").write_text(json.dumps({**about, "truncation_side": side}), encoding="utf-8")
    many = about["max_tokens"]
    told = f"{'bad ' * many}{'good ' * many}\n{f'{read} ' * many}\n"
    program = [sys.executable, str(folder / "predict.py")]
    done = subprocess.run(program, input=told, capture_output=True, text=True, check=True, timeout=120)
    whole, part = (line.split("\t")[:2] for line in done.stdout.splitlines())
    assert whole == part


@pytest.mark.parametrize("format_", FORMATS)
def test_an_exported_folder_runs_without_this_package(
    exported: Path, searched: Path, tmp_path: Path, format_: str
) -> None:
    folder = tmp_path / "elsewhere"
    shutil.copytree(exported / format_, folder)
    about = json.loads((folder / "measurement.json").read_text(encoding="utf-8"))
    rows = task.load(RunConfig.from_file(searched / "run.yaml").data, labels=tuple(about["labels"])).splits["test"]
    other = {"openvino": "onnxruntime", "onnxruntime": "openvino"}[about["runtime"]]
    missing = ("autocompress", "torch", "transformers", "optuna", "ray", other)
    alone = f"import sys, runpy; sys.modules |= dict.fromkeys({missing}); sys.argv = ['predict.py']; "
    done = subprocess.run(
        [sys.executable, "-c", f"{alone}runpy.run_path({str(folder / 'predict.py')!r})"],
        input="".join(f"{text}\n" for text, _, _ in rows),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = [line.split("\t") for line in done.stdout.splitlines()]
    assert [text for _, _, text in found] == [text for text, _, _ in rows]
    right = [label == about["labels"][number] for (label, _, _), (_, _, number) in zip(found, rows, strict=True)]
    assert sum(right) / len(rows) == about["test"]["value"], "exactly as its card says"
    assert all(1 / len(about["labels"]) <= float(share) <= 1 for _, share, _ in found)


def test_what_an_export_loses_is_held_against_the_same_held_out_rows(exported: Path, searched: Path) -> None:
    run, folder = RunConfig.from_file(searched / "run.yaml"), exported / "openvino"
    ours, labels = logits_through(folder, run, "test")
    theirs, _ = logits_through(folder, run, "test", model=searched / "artefacts" / "reference")
    right, expected = ours.argmax(axis=1) == labels, theirs.argmax(axis=1) == labels
    about = json.loads((folder / "measurement.json").read_text(encoding="utf-8"))
    found = about["test_drop"]
    assert found["value"] == pytest.approx(expected.mean() - right.mean())
    assert -1 <= found["low"] <= found["value"] <= found["high"] <= 1
    # For the next export of the same data: rows that were changed since must not be held against these.
    data = task.load(run.data, labels=tuple(about["labels"])).fingerprint
    kept = np.load(searched / "artefacts" / "reference" / f"test-logits-{data}.npy")
    assert np.array_equal(kept.argmax(axis=1), theirs.argmax(axis=1))


def test_an_export_is_adjusted_as_the_front_that_it_is_of(
    searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(searched, copy := tmp_path / "copy")
    found = api.open_study(copy)
    pace_ms = found.reference.reference_ms
    study = Study(copy, found.run, writable=True)
    study._ledger._keep_calm(Calm(pace_ms, spared=0.5))
    study.close()
    reload = delivery._reload

    def slow(*given: Any) -> tuple[np.ndarray, timing.Latency]:
        logits, timed = reload(*given)
        of_half = {"ratio": 0.5, "ratio_low": 0.45, "ratio_high": 0.55}
        return logits, dataclasses.replace(timed, reference_ms=1.1 * pace_ms, **of_half)

    monkeypatch.setattr(delivery, "_reload", slow)
    exported = api.export(picked(copy), tmp_path / "out")["openvino"].measurement
    assert exported.latency_adjusted == pytest.approx(1.1 ** (0.5 * 0.5))
    assert exported.latency_ratio == pytest.approx(0.5 * exported.latency_adjusted)
    about = json.loads((tmp_path / "out" / "measurement.json").read_text(encoding="utf-8"))
    assert about["calm"] == {"reference_ms": pace_ms, "spared": 0.5}
    again = api.measure(tmp_path / "out", pairs=8)
    assert again["stored_latency_ratio"] == exported.latency_ratio


def test_what_a_candidate_loses_is_held_against_the_reference(searched: Path) -> None:
    study = api.open_study(searched)
    assert study.reference.drop == (0, 0, 0)
    scores = [c.score for c in study.candidates() if c.measurement is not None]
    assert [s.accuracy_drop for s in scores] == pytest.approx([study.reference.accuracy - s.accuracy for s in scores])
    assert all(s.drop is not None and s.drop.low <= s.drop.value <= s.drop.high for s in scores)


def test_the_artefact_that_was_scored_is_the_one_that_ships(exported: Path, searched: Path) -> None:
    folder, point = exported / "openvino", picked(searched)
    source = searched / "artefacts" / point.plan.plan_id
    for name in Artifact.open(folder).files:
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    about = json.loads((folder / "measurement.json").read_text(encoding="utf-8"))
    assert about["agreement_with_scored_candidate"] == 1
    assert about["latency_ratio_in_search"] == point.score.latency_ratio
    other = json.loads((exported / "onnx" / "measurement.json").read_text(encoding="utf-8"))
    assert other["latency_ratio_in_search"] is None, "it was searched with another runtime"
    assert about["search"]["latency_drift"] == point.score.latency_drift
    calm = api.open_study(searched).calm
    assert about["calm"] == (None if calm is None else dataclasses.asdict(calm))
    for name in ("accuracy", "loss", "rows", "predictions", "size_bytes"):
        assert about["search"][name] == getattr(point.score, name)


@pytest.mark.parametrize("format_", FORMATS)
def test_an_exported_folder_can_be_timed_again(exported: Path, workplace: Path, format_: str) -> None:
    found = command("measure", exported / format_, "--pairs", "10", "--json", cwd=workplace).json()
    about = json.loads((exported / format_ / "measurement.json").read_text(encoding="utf-8"))
    assert found["stored_latency_ratio"] == about["search"]["latency_ratio"]
    assert found["latency_ratio_low"] <= found["latency_ratio"] <= found["latency_ratio_high"]
    assert found["difference"] == pytest.approx(found["latency_ratio"] / found["stored_latency_ratio"] - 1)
    assert found["size_bytes"] == about["search"]["size_bytes"]
    assert found["same_machine"] is True


def test_a_folder_that_is_taken_needs_force(exported: Path, searched: Path, workplace: Path) -> None:
    before = {path: path.read_bytes() for path in exported.rglob("*") if path.is_file()}
    mine = exported / "mine.txt"
    mine.write_text("mine", encoding="utf-8")
    line = command("export", searched, "-o", "out", cwd=workplace).line(1)
    assert line == "autocompress: export: out is not empty; give another folder or --force"
    assert {path: path.read_bytes() for path in before} == before
    done = command("export", searched, "--pick", "accuracy", "-o", "out", "--force", cwd=workplace)
    assert done.code == 0, done.err
    assert Artifact.open(exported).runtime == "openvino"
    assert mine.read_text(encoding="utf-8") == "mine"


def _blank_the_largest_constant(folder: Path) -> None:
    found = [
        (int(data.attrib["size"]), int(data.attrib["offset"]))
        for data in ElementTree.parse(folder / "model.xml").iter("data")
        if "offset" in data.attrib
    ]
    size, offset = max(found)
    with (folder / "model.bin").open("r+b") as weights:
        weights.seek(offset)
        weights.write(bytes(size))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (
            "blanked",
            r"\d+ of 60 predictions of the reloaded copy differ from its score; the artefact no longer matches",
        ),
        ("inverted", r"the copy cannot be reloaded \(.+\)|.+; the artefact no longer matches"),
        ("exchanged", r"the artefact no longer matches: .+ has \d+ bytes of .+, scored were \d+ of .+"),
    ],
    ids=["blanked", "inverted", "exchanged"],
)
def test_an_artefact_that_no_longer_matches_its_score_is_not_shipped(
    copy: Path, workplace: Path, how: str, said: str
) -> None:
    study = api.open_study(copy)
    point = study.front().pick(prefer="accuracy")
    folder = copy / "artefacts" / point.plan.plan_id
    if how == "blanked":
        _blank_the_largest_constant(folder)
    elif how == "inverted":
        weights = np.fromfile(folder / "model.bin", dtype=np.uint8)
        (weights ^ 0xFF).tofile(folder / "model.bin")
    else:
        other = next(c for c in study.front().points if c.score.size_bytes != point.score.size_bytes)
        for name in Artifact.open(folder).files:
            shutil.copyfile(copy / "artefacts" / other.plan.plan_id / name, folder / name)
    done = command("export", copy, "--trial", point.number, "-o", copy / "out", cwd=workplace)
    assert done.code == 1
    last = done.err.splitlines()[-1]
    assert re.fullmatch(rf"autocompress: export: trial {point.number}: ({said})", last)
    assert not (copy / "out").exists()


def test_a_recovery_that_is_ended_before_it_is_confirmed_goes_on(
    copy: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    point = api.open_study(copy).front().points[-1]

    def ended(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as during:
        during.setattr(api, "confirm_with_front", ended)
        with pytest.raises(KeyboardInterrupt):
            api.recover(point, epochs=0.1)
    [left] = [c for c in api.open_study(copy).candidates() if c.origin == "recover"]
    assert not left.score.confirmed
    recovered = api.recover(point, epochs=0.1)
    assert (recovered.number, recovered.score.confirmed) == (left.number, True)
    assert recovered.score.predictions == left.score.predictions, "it was not trained again"
    assert recovered.number in set(pd.read_csv(copy / "study.csv")["number"])


def test_a_cluster_that_has_nothing_to_do_is_refused(copy: Path, workplace: Path) -> None:
    line = command("recover", copy, "--trial", "0", "--address", "auto", cwd=workplace).line(2)
    assert line == "recover: --address reaches the device of search.device, which this study has none of"


def test_what_an_earlier_version_timed_in_another_way_is_timed_as_what_is_recovered(
    copy: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    journal = copy / "study.journal"
    assert all(c.score.confirmed for c in api.open_study(copy).front().points)
    journal.write_text(re.sub(r'"latency_adjusted": ?[\d.]+, ?', "", journal.read_text(encoding="utf-8")))
    before = api.open_study(copy).front().points
    assert not any(c.score.confirmed for c in before)
    recovered = api.recover(before[-1], epochs=0.1)
    assert recovered.score.confirmed
    study = api.open_study(copy)
    assert recovered == study.candidate(recovered.number)
    # Others may be on the front now, whose artefacts were not kept: a search that goes on builds them again.
    there = [c for c in study.front().points if (copy / "artefacts" / c.plan.plan_id).is_dir()]
    assert all(c.score.confirmed for c in there)
    assert {c.number for c in before} & {c.number for c in there}


@pytest.mark.parametrize("now", ["another arithmetic", "another row"])
def test_what_would_not_be_what_was_scored_is_refused_before_any_work(
    copy: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch, now: str
) -> None:
    monkeypatch.chdir(workplace)
    point = api.open_study(copy).front().points[-1]
    if now == "another arithmetic":
        monkeypatch.setattr(type(get_runtime("openvino")), "arithmetic", "of a later version")
        said = "computed otherwise with openvino.* retarget "
    else:
        monkeypatch.setattr(task.Task, "fingerprint", "of other rows")
        said = r"holds other rows than those that .+ was scored on; bring these back, or search anew"
    before = rows(copy)
    with pytest.raises(AutocompressError, match=said):
        api.export(point, copy / "out")
    with pytest.raises(AutocompressError, match=said):
        api.recover(point, epochs=0.1)
    assert rows(copy) == before
    assert not (copy / "out").exists()


@pytest.mark.parametrize("now", ["another model", "another machine"])
def test_a_study_gets_no_points_of_another_model_or_machine(
    copy: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch, now: str
) -> None:
    monkeypatch.chdir(workplace)
    point = api.open_study(copy).front().points[-1]
    before = rows(copy)
    if now == "another model":
        monkeypatch.setattr(model, "fingerprint", lambda _: "another")
        said = r"is not the one that .+ compresses; bring that back"
        with pytest.raises(AutocompressError, match=said):
            api.export(point, copy / "out", formats=["onnx"])
        assert not (copy / "out").exists()
        assert api.export(point, copy / "kept")["openvino"].agreement == 1.0, "nothing is made of the model"
    else:
        monkeypatch.setattr(Gauge, "machine", {"id": "another"})
        said = r"latencies are of another machine.* retarget .+ -o NEW measures its front here"
    with pytest.raises(AutocompressError, match=said):
        api.recover(point, epochs=0.1)
    assert rows(copy) == before


def test_what_was_not_kept_is_built_again_to_be_shipped(
    copy: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = api.open_study(copy).front().points[-1]
    shutil.rmtree(copy / "artefacts" / point.plan.plan_id)
    kept = sorted(path.name for path in (copy / "artefacts").iterdir())
    done = command("export", copy, "--trial", point.number, "-o", copy / "out", cwd=workplace)
    assert done.code == 0, done.err
    assert f"building trial {point.number} again, which is not among the artefacts that were kept" in done.err
    about = json.loads((copy / "out" / "measurement.json").read_text(encoding="utf-8"))
    assert about["search"]["predictions"] == point.score.predictions
    assert about["search"]["size_bytes"] == point.score.size_bytes
    assert sorted(path.name for path in (copy / "artefacts").iterdir()) == kept, "the study is left as it was"
    monkeypatch.chdir(workplace)
    shutil.rmtree(copy / "artefacts" / "reference")
    lines: list[str] = []
    again = api.export(point, copy / "again", progress=lines.append)["openvino"]
    assert "building the uncompressed model again" in lines
    assert again.measurement.predictions == point.score.predictions
    other = dataclasses.replace(point.score, predictions="0" * 64)
    with pytest.raises(ExportError, match="was not kept, and what is built again is not what was scored"):
        api.export(dataclasses.replace(point, measurement=other), copy / "never")
    assert not (copy / "never").exists()


# --- the driver killed in mid-search (row 13)

BUDGET = 8
OF_TWO = (f"search.trials={BUDGET}", "search.workers=2", "search.confirm_pairs=0")
"""Latencies that are taken anew at the end would stand in place of those that are compared."""


def start_search(workplace: Path, out: Path, *overrides: str, options: Sequence[str] = ()) -> subprocess.Popen[str]:
    sets = [part for override in overrides for part in ("--set", override)]
    return subprocess.Popen(
        [sys.executable, "-m", "autocompress.cli", "search", "run.yaml", "--out", str(out), *options, *sets],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=workplace,
        env=environment(),
        # A shell starts what it runs in the background deaf to Ctrl-C, and so would be what is started here.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def lines_until(process: subprocess.Popen[str], wanted: str) -> Iterator[str]:
    """Yield the process's progress up to the first line that holds ``wanted``."""
    assert process.stderr is not None
    for line in process.stderr:
        yield line
        if wanted in line:
            return
    pytest.fail(f"ended before {wanted!r}")


def by_number(out: Path) -> dict[int, Candidate]:
    return {c.number: c for c in api.open_study(out).candidates()}


def test_a_driver_that_is_killed_again_and_again_loses_nothing(workplace: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    finished: dict[int, Candidate] = {}
    below: set[int] = set()
    moments = (
        ("evaluating", 1.0),
        ("] trial ", 0.0),
        ("] trial ", 0.3),
    )
    for wanted, wait in moments:
        process = start_search(workplace, out, *OF_TWO)
        told = [re.findall(r"\] trial (\d+) ", line) for line in lines_until(process, wanted)]
        time.sleep(wait)
        below |= descendants(process.pid)
        process.kill()
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        kept = by_number(out)
        assert {int(number) for found in told for number in found} <= set(kept)
        assert {number: kept[number] for number in finished} == finished
        finished = kept
    assert 2 <= len(finished) < BUDGET
    last = [part for setting in OF_TWO for part in ("--set", setting)]
    done = command("search", "run.yaml", "--out", out, *last, cwd=workplace)
    assert done.code == 0, done.err
    after = by_number(out)
    assert {number: after[number] for number in finished} == finished
    assert len(after) == BUDGET
    assert len(set(plan_ids(list(after.values())))) == BUDGET
    assert all(c.measurement is not None for c in after.values())
    found = states(out)
    assert "RUNNING" not in found
    assert "WAITING" not in found
    assert len(read_csv(out / "study.csv")) == BUDGET
    assert command("status", out, "--json", cwd=workplace).json()["complete"] == BUDGET
    assert below
    until = time.monotonic() + 60
    while (left := {pid for pid in below if alive(pid)}) and time.monotonic() < until:
        time.sleep(1)
    assert not left, "Ray's processes end with the driver that started them"


def alive(pid: int) -> bool:
    try:
        command_line = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    # Empty for a zombie; a number that was given to another process is none of ours.
    return b"ray" in command_line


def test_a_running_search_keeps_another_one_out(workplace: Path, searched: Path, copy: Path) -> None:
    import fcntl

    with (copy / "study.lock").open("r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = command("search", "run.yaml", "--out", copy, "--set", "search.trials=9", cwd=workplace)
    assert done.line(1).endswith("another search drives this study; wait for it or use another --out")


def test_other_settings_are_refused_for_the_same_folder(copy: Path, workplace: Path) -> None:
    before: dict[str, Any] = {p.name: p.read_bytes() for p in copy.iterdir() if p.is_file()}
    done = command("search", "run.yaml", "--out", copy, "--space", "encoder-bits", cwd=workplace)
    assert done.code == 1
    last = done.err.splitlines()[-1]
    assert "this study was made with other settings (space: encoder-small " in last
    assert " became encoder-bits " in last
    assert {p.name: p.read_bytes() for p in copy.iterdir() if p.is_file()} == before
