"""What is known of the uncompressed model: measured once for a model, its data and a target, and read by all."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers_records import make_reference
from test_study import SHAPE, run_of

from autocompress import machine
from autocompress.errors import StudyError
from autocompress.reference import SCHEMA, ensure_reference, has_reference, reference_key

MAJORITY = 0.6


class Paper:
    """A workshop that measures on paper, and counts how often."""

    def __init__(self, folder: Path, *, model: str = "m") -> None:
        self.run = run_of()
        self.reference_folder = folder / "artefacts" / "reference"
        self.task = SimpleNamespace(fingerprint="d", shared_rows=3)
        self.teacher = SimpleNamespace(base=model, shape=SHAPE)
        self.majority = MAJORITY
        self.splits = {"search": SimpleNamespace(cut=0)}
        self.gauge = SimpleNamespace(machine=machine.fingerprint(), fingerprint={"runtime_options": {"threads": 1}})
        self.measured = 0

    def build(self, plan: Any, folder: Path) -> Path:
        assert plan.plan_id
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def score(self, artefact: Path) -> Any:
        assert artefact == self.reference_folder
        self.measured += 1
        return make_reference()


def ensured(folder: Path, shop: Paper) -> tuple[dict[str, Any], list[str]]:
    """Return what the file holds after it was seen to, and what was said."""
    said: list[str] = []
    ensure_reference(folder, shop, said.append)  # type: ignore[arg-type]
    return json.loads((folder / "environment.json").read_text(encoding="utf-8")), said


def test_two_versions_of_a_runtime_are_not_mixed(tmp_path: Path) -> None:
    shop = Paper(tmp_path)
    ensured(tmp_path, shop)
    installed = machine.versions()["openvino"]
    other = {**machine.versions(), "openvino": "1.2.3", "ray": "4.5.6"}
    shop.gauge.machine = {**machine.fingerprint(), "versions": other}
    with pytest.raises(StudyError, match=rf"was measured with openvino {installed}, and 1\.2\.3 is here.* retarget"):
        ensured(tmp_path, shop)
    shop.gauge.machine = {**machine.fingerprint(), "versions": {**other, "openvino": installed}}
    ensured(tmp_path, shop)
    assert shop.measured == 1


def test_it_is_measured_once(tmp_path: Path) -> None:
    shop = Paper(tmp_path)
    assert not has_reference(tmp_path, shop)  # type: ignore[arg-type]
    found, said = ensured(tmp_path, shop)
    assert said == ["measuring the uncompressed model"]
    assert has_reference(tmp_path, shop)  # type: ignore[arg-type]
    assert found["schema"] == SCHEMA
    assert found["reference"] == json.loads(json.dumps(dataclasses.asdict(make_reference())))
    assert (found["majority"], found["shared_rows"], found["cut_rows"]) == (MAJORITY, 3, 0)
    assert found["key"] == json.loads(json.dumps(reference_key(shop)))  # type: ignore[arg-type]
    assert ensured(tmp_path, shop) == (found, [])
    assert shop.measured == 1


@pytest.mark.parametrize("gone", ["another model", "its artefact"])
def test_it_is_measured_anew_where_it_is_not_that_of_the_run(tmp_path: Path, gone: str) -> None:
    before, _ = ensured(tmp_path, Paper(tmp_path))
    if gone == "its artefact":
        (tmp_path / "artefacts" / "reference").rmdir()
    shop = Paper(tmp_path, model="other" if gone == "another model" else "m")
    assert not has_reference(tmp_path, shop)  # type: ignore[arg-type]
    found, _ = ensured(tmp_path, shop)
    assert shop.measured == 1
    assert (found["key"] == before["key"]) == (gone == "its artefact")


def test_a_study_that_has_lost_the_artefact_keeps_what_was_measured(tmp_path: Path) -> None:
    before, _ = ensured(tmp_path, Paper(tmp_path))
    (tmp_path / "artefacts" / "reference").rmdir()
    (tmp_path / "study.journal").write_bytes(b"{}\n")
    shop = Paper(tmp_path)
    found, said = ensured(tmp_path, shop)
    assert (found, said) == (before, ["building the uncompressed model again"])
    assert (shop.measured, shop.reference_folder.is_dir()) == (0, True)


def test_a_journal_that_nothing_was_written_to_is_no_study(tmp_path: Path) -> None:
    """As a killed driver may leave it: what it had measured is not taken for that of another model."""
    ensured(tmp_path, Paper(tmp_path))
    (tmp_path / "study.journal").touch()
    shop = Paper(tmp_path, model="other")
    assert not has_reference(tmp_path, shop)  # type: ignore[arg-type]
    found, _ = ensured(tmp_path, shop)
    assert (found["key"]["model"], shop.measured) == ("other", 1)


def test_what_an_earlier_version_did_not_write_is_added_and_nothing_measured(tmp_path: Path) -> None:
    shop = Paper(tmp_path)
    whole, _ = ensured(tmp_path, shop)
    file = tmp_path / "environment.json"
    file.write_text(json.dumps({k: v for k, v in whole.items() if k not in ("shape", "majority")}), encoding="utf-8")
    found, said = ensured(tmp_path, shop)
    assert (found, said, shop.measured) == (whole, [], 1)


@pytest.mark.parametrize(
    ("text", "why"),
    [("{", r"environment\.json: not readable as JSON"), ('{"schema": 9}', r"schema must be 1, got 9")],
)
def test_a_file_that_is_none_is_said(tmp_path: Path, text: str, why: str) -> None:
    shop = Paper(tmp_path)
    ensured(tmp_path, shop)
    (tmp_path / "environment.json").write_text(text, encoding="utf-8")
    with pytest.raises(StudyError, match=why):
        ensured(tmp_path, shop)
    assert shop.measured == 1
