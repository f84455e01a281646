"""The model card: its numbers are those that it was given, its table holds whatever text comes, its plan is JSON."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers_records import make_candidate, make_measurement

from autocompress.config import RunConfig
from autocompress.decisions import Quantize
from autocompress.plan import CompressionPlan
from autocompress.records import Drop
from autocompress.report.card import model_card
from autocompress.scoring import Accuracy

PLAN = CompressionPlan((("head", Quantize(weight_bits=8, activation_bits=8)),))
TEST = Accuracy(value=0.83, low=0.81, high=0.85, loss=0.5, rows=700, predictions="")
DROP = Drop(0.009, -0.002, 0.02)


MACHINE: dict[str, Any] = {"system": "Linux x86_64", "cpu": {"name": "Some CPU", "features": ["avx2", "avx512_vnni"]}}


def card(
    *, name: str = "reviews", model: str = "some/model", plan: CompressionPlan = PLAN, **fingerprint: object
) -> str:
    score = make_measurement(accuracy=0.85, size_bytes=12_340_000, ratio=0.25)
    measured = dataclasses.replace(score, fingerprint={**MACHINE, **fingerprint})
    run = RunConfig.from_mapping({"name": name, "model": {"id": model}, "data": {"source": "demo/movies"}})
    about: dict[str, Any] = {"data": "0123abcd", "built_on": measured.fingerprint}
    return model_card(make_candidate(7, plan=plan), run, "openvino", measured, TEST, DROP, 0.991, **about)


def rows(text: str) -> dict[str, str]:
    found = re.findall(r"^\| ([^|]+) \| (.*) \|$", text, flags=re.MULTILINE)
    return dict(found)


def test_its_numbers_are_those_that_it_was_given() -> None:
    found = rows(card(versions={"openvino": "1", "torch": "2"}))
    assert found["Accuracy, search split"].startswith("85.00 % [")
    assert found["Accuracy, held-out test split"] == "83.00 % [81.00, 85.00], 700 rows"
    assert found["Accuracy lost, held-out test split"] == "0.9 points (-0.2 to 2.0)"
    assert found["Selection optimism"].startswith("+2.00 points")
    assert found["Size"] == "12.34 MB"
    assert found["Latency over the uncompressed model's"] == "0.250 [0.245, 0.255]"
    assert found["Measured on"] == "Some CPU"
    assert found["Data, fingerprint of its rows"] == "demo/movies, 0123abcd"
    assert found["Versions"] == "openvino 1, torch 2"
    assert found["Same predictions as the study's candidate"] == "99.1 % of the search rows"
    assert found["Trial, plan"] == f"7, {PLAN.plan_id}"


@pytest.mark.parametrize("features", [["avx2"], ["avx2", "avx512_vnni"]])
@pytest.mark.parametrize("plan", [PLAN, CompressionPlan()])
def test_it_says_where_eight_bits_compute_something_else(plan: CompressionPlan, features: list[str]) -> None:
    found = rows(card(plan=plan, cpu={"name": "any", "features": features}))
    assert ("Not for" in found) == (plan is PLAN and "avx512_vnni" in features)


def test_what_multiplies_floats_overflows_nowhere() -> None:
    score = dataclasses.replace(make_measurement(), fingerprint=MACHINE)
    run = RunConfig.from_mapping({"name": "a"})
    about: dict[str, Any] = {"data": "0123abcd", "built_on": MACHINE, "timed": False}
    made = model_card(make_candidate(7, plan=PLAN), run, "transformers", score, TEST, DROP, 0.991, **about)
    assert "Not for" not in rows(made)


def test_its_front_matter_names_the_model_that_it_comes_from() -> None:
    _, front_matter, _ = card().split("---\n", 2)
    assert yaml.safe_load(front_matter)["base_model"] == "some/model"


@pytest.mark.parametrize(
    "model",
    [
        "=cmd|' /C calc'!A1",
        "a: b",
        "x\n---\nlicense: mit",
        "---",
        "- one",
        "[a, b]",
        "!!python/name:os.system",
        "#",
        "'",
        "../model",
        "/home/somebody/model",
    ],
)
def test_a_model_that_no_hub_can_have_stays_out_of_the_front_matter(model: str) -> None:
    found = re.match(r"---\n(.*?\n)---\n\n# ", card(model=model), flags=re.DOTALL)
    assert found is not None
    assert yaml.safe_load(found[1]) == {"library_name": "autocompress", "pipeline_tag": "text-classification"}
    assert len(re.findall("^---$", card(model=model), flags=re.MULTILINE)) == 2


def test_the_packaged_model_is_named_as_it_is_published() -> None:
    _, front_matter, _ = card(model="demo/minilm").split("---\n", 2)
    assert yaml.safe_load(front_matter)["base_model"] == "sentence-transformers/all-MiniLM-L6-v2"


def test_a_local_folder_is_no_name_of_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some" / "model").mkdir(parents=True)
    _, front_matter, _ = card().split("---\n", 2)
    assert "base_model" not in yaml.safe_load(front_matter)


def test_it_names_no_path_of_the_machine_that_made_it(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    found = card(model=str(tmp_path / "model"))
    assert str(tmp_path) not in found
    assert "| Model | model (local) |" in found


def test_its_plan_can_be_read_back() -> None:
    [plan] = re.findall(r"```json\n(.*)\n```", card(), flags=re.DOTALL)
    assert CompressionPlan.from_json(plan) == PLAN
    assert json.loads(plan)


@pytest.mark.parametrize("cpu", ["a | b", "<script>", "two\nlines"])
def test_text_from_outside_stays_in_its_cell(cpu: str) -> None:
    plain, found = card(), card(cpu={**MACHINE["cpu"], "name": cpu})
    assert len(found.splitlines()) == len(plain.splitlines())
    assert "<script>" not in found
    [line] = [line for line in found.splitlines() if line.startswith("| Measured on |")]
    assert len(re.findall(r"(?<!\\)\|", line)) == 3
