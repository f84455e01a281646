"""TensorBoard and MLflow: each candidate once, once more when it was confirmed, and never at the search's expense."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from helpers_records import make_candidate, make_measurement

from autocompress import trackers
from autocompress.config import RunConfig
from autocompress.errors import ConfigError
from autocompress.records import Candidate
from autocompress.trackers import METRICS, Trackers

SCORE = make_measurement(accuracy=0.85, size_bytes=1_000_000, ratio=0.25)
PARAMS = {"attention.heads.0": 0.5, "ffn.bits": "w4a8", "reconstruct": True}


def scored(number: int, *, confirmed: bool = False, ratio: float = 0.25, adjusted: float = 1.0) -> Candidate:
    score = make_measurement(accuracy=0.85, ratio=ratio)
    score = dataclasses.replace(score, confirmed=confirmed, latency_adjusted=adjusted)
    return dataclasses.replace(make_candidate(number), measurement=score, params=PARAMS)


def failed(number: int) -> Candidate:
    return dataclasses.replace(make_candidate(number), state="FAIL", measurement=None, failure="no memory")


def told(kind: str, folder: Path, *candidates: Candidate) -> list[str]:
    """Tell candidates as one command does; returns what was said of it."""
    said: list[str] = []
    run = RunConfig.from_mapping({"name": "tracked", "trackers": [kind]})
    Trackers(run, folder, said.append).tell(candidates)
    return said


def of_tensorboard(folder: Path) -> dict[int, dict[str, list[tuple[int, float]]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for place in (folder / "tensorboard").iterdir():
        events = EventAccumulator(str(place)).Reload()
        found[int(place.name.removeprefix("trial-"))] = {
            name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]
        }
    return found


def of_mlflow(folder: Path) -> dict[int, Any]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    [experiment] = [e for e in client.search_experiments() if e.name == "tracked"]
    runs = client.search_runs([experiment.experiment_id])
    assert len({run.data.tags["trial"] for run in runs}) == len(runs), "each once"
    return {int(run.data.tags["trial"]): run for run in runs}


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_tensorboard_has_a_run_for_each_scored_candidate(tmp_path: Path) -> None:
    assert told("tensorboard", tmp_path, scored(0), failed(1), scored(2)) == []
    found = of_tensorboard(tmp_path)
    assert found.keys() == {0, 2}
    assert found[0]["accuracy"] == [(0, pytest.approx(0.85))]
    assert found[0]["latency_ratio"] == [(0, pytest.approx(0.25))]
    assert set(found[0]) <= set(METRICS)


def test_tensorboard_knows_the_parameters(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata

    told("tensorboard", tmp_path, scored(0))
    events = EventAccumulator(str(tmp_path / "tensorboard" / "trial-0")).Reload()
    content = events.summary_metadata[metadata.SESSION_START_INFO_TAG].plugin_data.content
    held = metadata.parse_session_start_info_plugin_data(content).hparams
    assert held["attention.heads.0"].number_value == 0.5
    assert held["ffn.bits"].string_value == "w4a8"
    assert held["reconstruct"].number_value == 1


def test_tensorboard_gets_what_was_confirmed_and_nothing_twice(tmp_path: Path) -> None:
    told("tensorboard", tmp_path, scored(0))
    told("tensorboard", tmp_path, scored(0), scored(1, confirmed=True))
    told("tensorboard", tmp_path, scored(0, confirmed=True, ratio=0.2), scored(1, confirmed=True))
    told("tensorboard", tmp_path, scored(0, confirmed=True, ratio=0.2), scored(1, confirmed=True))
    found = of_tensorboard(tmp_path)
    assert found[0]["latency_ratio"] == [(0, pytest.approx(0.25)), (1, pytest.approx(0.2))]
    assert found[1]["latency_ratio"] == [(1, pytest.approx(0.25))]


@pytest.mark.parametrize("kind", trackers.KINDS)
def test_what_was_adjusted_after_it_was_confirmed_is_told(tmp_path: Path, kind: str) -> None:
    told(kind, tmp_path, scored(0, confirmed=True))
    for _ in range(2):
        told(kind, tmp_path, scored(0, confirmed=True, ratio=0.2, adjusted=0.8))
    if kind == "tensorboard":
        assert of_tensorboard(tmp_path)[0]["latency_ratio"] == [(1, pytest.approx(0.25)), (2, pytest.approx(0.2))]
    else:
        metrics = of_mlflow(tmp_path)[0].data.metrics
        assert (metrics["latency_ratio"], metrics["confirmed"]) == (0.2, 1.0)


def test_mlflow_has_a_run_for_each_scored_candidate(tmp_path: Path) -> None:
    assert told("mlflow", tmp_path, scored(0), failed(1), scored(2)) == []
    found = of_mlflow(tmp_path)
    assert found.keys() == {0, 2}
    assert found[0].info.status == "FINISHED"
    assert found[0].info.run_name == "trial-0"
    assert found[0].data.metrics["accuracy"] == 0.85
    assert found[0].data.params["ffn.bits"] == "w4a8"
    assert found[0].data.params["plan"] == scored(0).plan.words()


def test_mlflow_gets_what_was_confirmed_and_nothing_twice(tmp_path: Path) -> None:
    told("mlflow", tmp_path, scored(0))
    told("mlflow", tmp_path, scored(0, confirmed=True, ratio=0.2), scored(1))
    before = of_mlflow(tmp_path)[0].info.end_time
    told("mlflow", tmp_path, scored(0, confirmed=True, ratio=0.2), scored(1))
    found = of_mlflow(tmp_path)
    assert found.keys() == {0, 1}
    assert found[0].data.metrics["latency_ratio"] == 0.2
    assert found[0].info.end_time == before


def test_two_studies_of_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'shared.db'}")
    for name in ("one", "other"):
        told("mlflow", tmp_path / name, scored(0))
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'shared.db'}")
    [experiment] = [e for e in client.search_experiments() if e.name == "tracked"]
    assert len(client.search_runs([experiment.experiment_id])) == 2


@pytest.mark.parametrize("kind", trackers.KINDS)
def test_a_missing_package_is_refused_with_the_command_that_adds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    module = {"tensorboard": "torch.utils.tensorboard", "mlflow": "mlflow.tracking"}[kind]
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ConfigError, match=rf'{kind} is not installed; run: pip install "autocompress\[{kind}\]"'):
        told(kind, tmp_path)


@pytest.mark.parametrize("kind", trackers.KINDS)
def test_one_that_fails_is_left_out_and_brought_up_to_date_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    with monkeypatch.context() as context:

        def broken(*_: object) -> None:
            raise OSError("no space left on device")

        context.setattr(trackers.KINDS[kind], "log", broken)
        said = told(kind, tmp_path, scored(0), scored(1))
    assert said == [f"{kind}: takes nothing (no space left on device); the search goes on without it"]
    assert told(kind, tmp_path, scored(0), scored(1)) == []
    found = of_tensorboard(tmp_path) if kind == "tensorboard" else of_mlflow(tmp_path)
    assert found.keys() == {0, 1}


@pytest.mark.parametrize("kind", trackers.KINDS)
def test_what_was_logged_in_part_is_logged_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    from mlflow.tracking import MlflowClient
    from torch.utils.tensorboard import SummaryWriter

    client, method = {"tensorboard": (SummaryWriter, "add_scalar"), "mlflow": (MlflowClient, "log_param")}[kind]
    with monkeypatch.context() as context:

        def broken(*_: object, **__: object) -> None:
            raise OSError("no space left on device")

        context.setattr(client, method, broken)
        assert len(told(kind, tmp_path, scored(0))) == 1
    assert told(kind, tmp_path, scored(0)) == []
    if kind == "mlflow":
        assert of_mlflow(tmp_path)[0].data.params["ffn.bits"] == "w4a8"
        assert of_mlflow(tmp_path)[0].data.metrics["accuracy"] == 0.85
    else:
        assert of_tensorboard(tmp_path)[0]["accuracy"] == [(0, pytest.approx(0.85))]
        assert [path.suffix for path in (tmp_path / "tensorboard" / "trial-0").iterdir()] == [".0"]


def test_a_server_that_does_not_answer_costs_no_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    [line] = told("mlflow", tmp_path, scored(0))
    assert line.startswith("mlflow: takes nothing (")


def test_mlflow_reports_to_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    told("mlflow", tmp_path, scored(0))
    from mlflow.telemetry.utils import is_telemetry_disabled

    assert is_telemetry_disabled()


def test_without_the_key_nothing_is_written(tmp_path: Path) -> None:
    Trackers(RunConfig.from_mapping({"name": "plain"}), tmp_path, print).tell([scored(0)])
    assert list(tmp_path.iterdir()) == []
