"""Where models and data are: folders, what a hub's cache holds, and a hub that does not answer."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from conftest import LABELS

from autocompress import model, origins, task
from autocompress.config import DataConfig
from autocompress.errors import DataError, ModelError

HUB_SCRIPT = """
import json, sys, time
import datasets, huggingface_hub
from autocompress import origins, task
from autocompress.config import DataConfig

def read(source, revision=None, subset=None):
    loaded = task.load(DataConfig(source=source, subset=subset, revision=revision, search_rows=10))
    return [loaded.labels, {name: len(rows) for name, rows in loaded.splits.items()}]

actions = {"model": lambda name, *revision: str(origins.locate(name, *revision)), "data": read}
found = []
for kind, *arguments in json.loads(sys.argv[1]):
    start = time.monotonic()
    try:
        said = actions[kind](*arguments)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    found.append([said, time.monotonic() - start])
print(json.dumps(found))
"""
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def ask_hub(tmp_path: Path, *questions: tuple[str | None, ...], **environment: str) -> list[tuple[Any, float]]:
    """Look up ids in a fresh process, since hub clients read the environment once; return answers and seconds."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", HUB_SCRIPT, json.dumps(questions)],
        env={**kept, "HF_HOME": str(tmp_path), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    answers: list[tuple[Any, float]] = json.loads(done.stdout.splitlines()[-1])
    return answers


def fill_hub_cache(home: Path, model_folder: Path, csv_file: Path) -> Path:
    """Lay out a model ``org/name`` and a data set ``org/texts`` as hub clients keep them; return the model's folder."""
    entry = home / "hub" / "models--org--name"
    snapshot = Path(shutil.copytree(model_folder, entry / "snapshots" / COMMIT))
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text(COMMIT, encoding="utf-8")

    frame = pd.read_csv(csv_file)
    frame["label"] = [LABELS.index(label) for label in frame["label"]]
    fill_with_rows(home, "default", frame)
    return snapshot


def fill_with_rows(home: Path, subset: str, frame: pd.DataFrame) -> None:
    """Lay out a configuration of the data set ``org/texts``."""
    import datasets

    folder = home / "datasets" / "org___texts" / subset / "0.0.0" / COMMIT
    folder.mkdir(parents=True)
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=list(LABELS)))
    splits = {}
    for name, rows in frame.groupby("split"):
        part = datasets.Dataset.from_pandas(rows[["text", "label"]], features=features, preserve_index=False)
        with datasets.arrow_writer.ArrowWriter(features=features, path=str(folder / f"texts-{name}.arrow")) as writer:
            writer.write_table(part.data.table)
            writer.finalize()
        splits[name] = {"name": name, "num_bytes": 1, "num_examples": len(rows), "dataset_name": "texts"}
    about = {
        "builder_name": "csv",
        "dataset_name": "texts",
        "config_name": subset,
        "version": {"version_str": "0.0.0", "major": 0, "minor": 0, "patch": 0},
        "splits": splits,
        "features": features.to_dict(),
    }
    (folder / "dataset_info.json").write_text(json.dumps(about), encoding="utf-8")


class TestFolders:
    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        for name in (str(tmp_path / "none"), "./none", "~/no-such-folder-of-a-model", "a/b/c"):
            with pytest.raises(ModelError, match="no such folder"):
                origins.locate(name)

    def test_a_file_in_place_of_a_folder(self, bert_folder: Path) -> None:
        with pytest.raises(ModelError, match=r"is a file; give the folder that holds config\.json"):
            origins.locate(str(bert_folder / "config.json"))

    def test_a_local_folder_is_found(self, bert_folder: Path) -> None:
        assert origins.locate(str(bert_folder)) == bert_folder


class TestHub:
    def test_what_is_cached_loads_and_the_rest_is_given_up_in_time(
        self, tmp_path: Path, bert_headed_folder: Path, tiny_csv: Path
    ) -> None:
        snapshot = fill_hub_cache(tmp_path, bert_headed_folder, tiny_csv)
        cached = [("model", "org/name"), ("model", "org/name", "main"), ("model", "org/name", COMMIT)]
        others = [("model", "org/other"), ("model", "without-owner"), ("model", "org/name", "v2"), ("data", "org/more")]
        others.append(("data", "org/more", "v2"))
        found = ask_hub(tmp_path, *cached, ("data", "org/texts"), *others, HF_ENDPOINT="http://127.0.0.1:9")
        assert [said for said, _ in found[:3]] == [str(snapshot)] * 3
        assert found[3][0] == [list(LABELS), {"train": 230, "search": 10, "test": 60}]
        assert all(seconds < 5 for _, seconds in found)
        for (kind, name, *_), (said, _) in zip(others, found[4:], strict=True):
            assert said.startswith(
                {"model": f"ModelError: model: {name}: ", "data": f"DataError: data: {name}: "}[kind]
            )
            assert "not found locally, offline (" in said
            assert "\n" not in said
        assert model.load(snapshot, labels=LABELS).shape == model.load(bert_headed_folder, labels=LABELS).shape

    def test_a_configuration_of_data_is_read_by_its_name(
        self, tmp_path: Path, bert_headed_folder: Path, tiny_csv: Path
    ) -> None:
        fill_hub_cache(tmp_path, bert_headed_folder, tiny_csv)
        frame = pd.read_csv(tiny_csv)
        frame["label"] = [LABELS.index(label) for label in frame["label"]]
        # Held-out rows in two splits, as those of MNLI are.
        held_out = frame.index[frame["split"] == "test"]
        frame.loc[held_out, "split"] = ["validation_matched", "validation_mismatched"] * (len(held_out) // 2)
        fill_with_rows(tmp_path, "pairs", frame[20:])
        unnamed = ("data", "org/texts")
        questions = (*unnamed, None, "pairs"), (*unnamed, None, "default"), unnamed
        (named, _), (other, _), (which, _) = ask_hub(tmp_path, *questions, HF_ENDPOINT="http://127.0.0.1:9")
        assert "not found locally, offline (" in which
        assert re.search(r"There are multiple .* in the cache: (default, pairs|pairs, default): name it by data", which)
        assert other == [list(LABELS), {"train": 230, "search": 10, "test": 60}]
        kept = frame[20:]["split"].str.startswith("validation")
        assert named == [list(LABELS), {"train": int((~kept).sum()) - 10, "search": 10, "test": int(kept.sum())}]

    def test_the_configuration_that_is_cached_is_not_taken_for_the_only_one(
        self, tmp_path: Path, bert_headed_folder: Path, tiny_csv: Path
    ) -> None:
        fill_hub_cache(tmp_path, bert_headed_folder, tiny_csv)
        texts = tmp_path / "datasets" / "org___texts"
        shutil.move(texts / "default", texts / "pairs")
        about = texts / "pairs" / "0.0.0" / COMMIT / "dataset_info.json"
        about.write_text(about.read_text(encoding="utf-8").replace('"default"', '"pairs"'), encoding="utf-8")
        questions = ("data", "org/texts"), ("data", "org/texts", None, "pairs")
        (which, _), (named, _) = ask_hub(tmp_path, *questions, HF_ENDPOINT="http://127.0.0.1:9")
        assert which.startswith("DataError: data: org/texts: not found locally, offline (")
        assert which.endswith("; its configuration 'pairs' is cached: name it by data.subset")
        assert named[1] == {"train": 230, "search": 10, "test": 60}

    def test_a_configuration_that_is_not_named_is_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import datasets
        import huggingface_hub

        def refuse(*_: object, **__: object) -> None:
            raise ValueError(
                "Config name is missing.\nPlease pick one among the available configs: ['a', 'b']\nExample"
            )

        monkeypatch.setattr(datasets, "load_dataset", refuse)
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
        with pytest.raises(
            DataError, match=r"^data: org/texts: Config name .* configs: \['a', 'b'\]; name it by data\.subset"
        ):
            task.load(DataConfig(source="org/texts"))

    def test_a_cached_configuration_alone_is_no_model(
        self, tmp_path: Path, bert_headed_folder: Path, tiny_csv: Path
    ) -> None:
        snapshot = fill_hub_cache(tmp_path, bert_headed_folder, tiny_csv)
        for file in snapshot.iterdir():
            if file.name != "config.json":
                file.unlink()
        [(said, _)] = ask_hub(tmp_path, ("model", "org/name"), HF_ENDPOINT="http://127.0.0.1:9")
        assert said.startswith("ModelError: model: org/name: not found locally, offline (")

    def test_an_older_vocabulary_makes_a_model_whole(
        self, tmp_path: Path, bert_headed_folder: Path, tiny_csv: Path
    ) -> None:
        snapshot = fill_hub_cache(tmp_path, bert_headed_folder, tiny_csv)
        for file in snapshot.glob("tokenizer*"):
            file.unlink()
        asked = ("model", "org/name")
        [(said, _)] = ask_hub(tmp_path, asked, HF_ENDPOINT="http://127.0.0.1:9")
        assert said.startswith("ModelError: model: org/name: not found locally, offline (")
        (snapshot / "vocab.txt").write_text("[UNK]\n", encoding="utf-8")
        [(said, _)] = ask_hub(tmp_path, asked, HF_ENDPOINT="http://127.0.0.1:9")
        assert said == str(snapshot)

    def test_an_id_that_nobody_has_is_said_in_time_with_and_without_a_network(self, tmp_path: Path) -> None:
        for said, seconds in ask_hub(tmp_path, ("model", "org/no-such-name-of-a-model"), ("data", "org/no-such-data")):
            assert "not found locally, " in said
            assert seconds < 5

    def test_a_hub_that_does_not_know_it_is_not_taken_for_none(self) -> None:
        class Refused(Exception):
            response = SimpleNamespace(status_code=404)

        def fetch(local: bool) -> str:
            raise FileNotFoundError("not cached")

        def probe() -> None:
            raise Refused("404 Client Error\nEntry Not Found")

        with pytest.raises(ModelError, match=r"^it: not found locally, and the hub answers 404; check the name, or"):
            origins.from_hub("it", fetch, probe)

    def test_the_hub_switched_off_is_said_at_once(self) -> None:
        start = time.monotonic()
        with pytest.raises(ModelError, match="model: org/name: not found locally, offline"):
            origins.locate("org/name")
        assert time.monotonic() - start < 3

    def test_a_hub_that_never_answers_is_given_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(origins, "OFFLINE_SECONDS", 0.2)
        answered = threading.Event()

        def fetch(local: bool) -> str:
            if local:
                raise FileNotFoundError("not cached")
            return "downloaded"

        with pytest.raises(ModelError, match=r"^it: not found locally, offline \(the hub did not answer\)"):
            origins.from_hub("it", fetch, lambda: bool(answered.wait(30)) or None)
        answered.set()
        assert origins.from_hub("it", fetch, lambda: None) == "downloaded"

    def test_a_failed_download_is_said_in_one_line(self) -> None:
        def fetch(local: bool) -> str:
            raise OSError("no space\nleft" if not local else "not cached")

        with pytest.raises(ModelError, match=r"^it: download failed \(no space\)$"):
            origins.from_hub("it", fetch, lambda: None)
