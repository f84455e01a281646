"""Where rows come from: every format of file, what is refused, and that words stay as they are written."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import LABELS, make_texts, write_csv
from helpers_rows import all_rows, config, frame, saved

from autocompress import task
from autocompress.config import DataConfig
from autocompress.errors import DataError

SHIPPED = {"demo/movies": (8012, 2058), "demo/tweets": (2608, 670)}


class TestSources:
    @pytest.mark.parametrize("source", SHIPPED)
    def test_the_demo_data_have_the_rows_that_are_promised(self, source: str) -> None:
        train, test = SHIPPED[source]
        loaded = task.load(DataConfig(source=source))
        sizes = {name: len(rows) for name, rows in loaded.splits.items()}
        assert sizes == {"train": train - 1000, "search": 1000, "test": test}
        assert loaded.labels == LABELS
        assert loaded.shared_rows == 0
        assert len({row[0] for row in all_rows(loaded)}) == train + test

    @pytest.mark.parametrize(
        "suffix", ["csv", "tsv", "jsonl", "json", "parquet", "csv.gz", "tsv.gz", "jsonl.gz", "CSV"]
    )
    def test_every_format_gives_the_same_task(self, tmp_path: Path, suffix: str) -> None:
        data = frame()
        data.loc[0, "text"] = 'with "quotes", a comma\tand a tab'
        expected = task.load(config(saved(tmp_path, data, "expected.csv")))
        file = tmp_path / f"data.{suffix}"
        kind = suffix.lower().split(".")[0]
        if kind == "parquet":
            data.to_parquet(file)
        elif kind in ("jsonl", "json"):
            data.to_json(file, orient="records", lines=True)
        else:
            data.to_csv(file, index=False, sep="\t" if kind == "tsv" else ",")
        assert (file.read_bytes()[:2] == b"\x1f\x8b") == suffix.endswith("gz")
        loaded = task.load(config(file))
        assert loaded == expected
        assert loaded.fingerprint == expected.fingerprint

    @pytest.mark.parametrize("source", ["demo/movies", "rows.csv"])
    def test_only_a_datasets_id_has_configurations(self, source: str) -> None:
        with pytest.raises(DataError, match=rf"^data\.subset: is of a datasets id, which {source} is not; leave it"):
            task.load(DataConfig(source=source, subset="sst2"))

    def test_splits_are_held_out_by_what_their_name_begins_with(self, tmp_path: Path) -> None:
        data = frame()
        plain, named = (
            task.load(config(saved(tmp_path, data.assign(split=[one, *[other] * 3] * (len(data) // 4)))))
            for one, other in (("test", "train"), ("Validation_matched", "tested"))
        )
        assert len(plain.splits["test"]) == len(data) // 4
        assert named == plain

    def test_other_column_names(self, tmp_path: Path) -> None:
        data = frame()
        renamed = data.rename(columns={"text": "said", "label": "mood"})
        expected = task.load(config(saved(tmp_path, data, "expected.csv")))
        assert task.load(config(saved(tmp_path, renamed), text="said", label="mood")) == expected

    def test_pairs_of_texts(self, tiny_pairs_csv: Path) -> None:
        loaded = task.load(config(tiny_pairs_csv, text="first", text_pair="second"))
        written = pd.read_csv(tiny_pairs_csv)
        expected = {(a, b, c) for a, b, c in zip(written["first"], written["second"], written["label"], strict=True)}
        assert loaded.labels == ("different", "same")
        assert {(a, b, loaded.labels[c]) for a, b, c in all_rows(loaded)} == expected

    def test_three_classes(self, tiny_three_csv: Path) -> None:
        loaded = task.load(config(tiny_three_csv))
        assert loaded.labels == ("negative", "positive", "so-so")
        assert Counter(row[2] for row in all_rows(loaded)) == {0: 100, 1: 100, 2: 100}

    @pytest.mark.parametrize("numbers", [[0, 1, 2], [1, 2, 10], [-1, 0, 1], [0.0, 1.0, 2.0]])
    def test_classes_that_are_numbers_stand_in_their_order(self, tmp_path: Path, numbers: list[float]) -> None:
        data = frame(classes=3)
        names = data["label"].tolist()
        data["label"] = [numbers[("negative", "positive", "so-so").index(name)] for name in names]
        loaded = task.load(config(saved(tmp_path, data)))
        assert loaded.labels == tuple(str(int(number)) for number in numbers)
        by_text = dict(zip(data["text"], names, strict=True))
        assert all(("negative", "positive", "so-so")[row[2]] == by_text[row[0]] for row in all_rows(loaded))

    @pytest.mark.parametrize("names", [("false", "true"), ("False", "True"), ("01", "02"), ("1.5", "2.0")])
    @pytest.mark.parametrize("suffix", [".csv", ".tsv"])
    def test_classes_are_called_as_the_file_calls_them(
        self, tmp_path: Path, names: tuple[str, str], suffix: str
    ) -> None:
        data = frame()
        data["label"] = [names[label == "positive"] for label in data["label"]]
        file = tmp_path / f"data{suffix}"
        data.to_csv(file, index=False, sep="\t" if suffix == ".tsv" else ",")
        assert task.load(config(file)).labels == names

    def test_texts_that_are_numbers_all_stay_as_they_are_written(self, tmp_path: Path) -> None:
        data = frame()
        data["text"] = [f"{number:05d}" for number in range(len(data))]
        assert {row[0] for row in all_rows(task.load(config(saved(tmp_path, data))))} == set(data["text"])

    def test_texts_that_look_like_missing_values_or_numbers_are_texts(self, tmp_path: Path) -> None:
        data = frame()
        data.loc[0, "text"], data.loc[1, "text"] = "12", "007"
        loaded = task.load(config(saved(tmp_path, data)))
        assert {"12", "007"} <= {row[0] for row in all_rows(loaded)}


class TestRefusals:
    def refused(self, file: Path, why: str, *, labels: tuple[str, ...] | None = None, **fields: Any) -> None:
        with pytest.raises(DataError, match=why) as caught:
            task.load(config(file, **fields), labels=labels)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("content", [b"", b"\n\n", b"text,label\n"])
    def test_an_empty_file(self, tmp_path: Path, content: bytes) -> None:
        file = tmp_path / "data.csv"
        file.write_bytes(content)
        self.refused(file, "is empty|holds no rows")

    @pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv.gz"])
    def test_an_empty_file_of_another_format(self, tmp_path: Path, suffix: str) -> None:
        file = tmp_path / f"data.{suffix}"
        file.touch()
        self.refused(file, f"data.{suffix}: (is empty|cannot be read)|holds no rows")

    @pytest.mark.parametrize(
        ("suffix", "content"),
        [
            ("jsonl", b'{"text": "a", "label": '),
            ("csv", b'text,label\n"open,1\n'),
            ("csv", b"text,label\na,b,c,d\n\xff\xfe,1\n"),
            ("parquet", b"PAR1 but not"),
            ("csv.gz", gzip.compress(b"text,label\n" * 1000)[:-10]),
            ("csv.gz", b"text,label\na,b\n"),
            ("csv.xz", b"text,label\na,b\n"),
            ("csv.zip", b"text,label\na,b\n"),
        ],
        ids=["half-json", "open-quote", "ragged", "no-parquet", "cut-gzip", "no-gzip", "no-xz", "no-zip"],
    )
    def test_a_file_that_cannot_be_read(self, tmp_path: Path, suffix: str, content: bytes) -> None:
        file = tmp_path / f"data.{suffix}"
        file.write_bytes(content)
        self.refused(file, r"data: .*: (cannot be read|is empty|holds no rows)")

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        self.refused(tmp_path / "none.csv", r"none\.csv: no such file")
        self.refused(tmp_path / "none.parquet", r"none\.parquet: no such file")

    def test_a_file_of_another_kind(self, tmp_path: Path) -> None:
        (tmp_path / "data.xlsx").touch()
        self.refused(tmp_path / "data.xlsx", r"must be a \.csv, \.tsv, \.jsonl or \.parquet file")


def test_json_numbers_are_not_dates(tmp_path: Path) -> None:
    """`pandas.read_json` turns columns with telling names, such as ``date``, into times unless told not to."""
    rows = [{"text": text, "date": 1_000_000 + n % 2} for n, (text, _) in enumerate(make_texts(100, 2, seed=0))]
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert task.load(config(file, label="date")).labels == ("1000000", "1000001")


def test_texts_are_not_read_as_missing(tmp_path: Path) -> None:
    """A text or class called None or NA is a word, not a gap."""
    rows = [{"text": text, "label": ("None", "NA")[label]} for text, label in make_texts(100, 2, seed=0)]
    rows[0]["text"] = "null"
    assert task.load(config(write_csv(tmp_path / "data.csv", rows))).labels == ("NA", "None")
