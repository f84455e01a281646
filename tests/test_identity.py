"""The identity of a study: what may not change within it is told apart, in words that fit on a line."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest

from autocompress.anatomy import BlockShape, ModelShape
from autocompress.binding import bind
from autocompress.config import RunConfig
from autocompress.errors import StudyError
from autocompress.identity import Identity, difference, identity_of
from autocompress.records import LATENCY_PROTOCOL
from autocompress.space import SearchSpace

SHAPE = ModelShape(hidden=32, blocks=(BlockShape(heads=4, head_size=8, neurons=64),) * 2, vocabulary=1000)


def identity(space: str = "encoder-small", **sections: object) -> dict[str, object]:
    run = RunConfig.from_mapping(sections)
    return identity_of(run, model="m", data="d", space=bind(SearchSpace.load(space), SHAPE, tokens=64))


def test_a_study_of_before_static_ranges_is_another_one_with_onnx_runtime_alone() -> None:
    assert "arithmetic" not in identity()
    now = identity(target={"runtime": "onnxruntime"})
    before = {name: value for name, value in now.items() if name != "arithmetic"}
    assert str(difference(before, now)).startswith("arithmetic: null became ")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"target": {"tokens": 17}}, ["target"]),
        ({"objectives": ["accuracy", "latency"]}, ["objectives"]),
        ({"search": {"guide": "loss"}}, ["objectives"]),
        ({"recovery": {"epochs": 7}}, ["recovery"]),
        ({"space": "encoder-bits"}, ["space"]),
        ({"data": {"calibration_rows": 512}}, ["rows"]),
        ({"data": {"reconstruction_rows": 512}}, ["rows"]),
        ({"seed": 9}, ["seed"]),
    ],
)
def test_what_belongs_to_a_study_is_told_apart(changed: dict[str, object], named: list[str]) -> None:
    space = str(changed.pop("space", "encoder-small"))
    said = difference(identity(), identity(space, **changed))
    assert said is not None
    assert [part.split(":")[0] for part in said.split("; ")] == named


@pytest.mark.parametrize("changed", [{"search": {"trials": 7}}, {"search": {"seed": 3}}, {"name": "other"}])
def test_what_may_change_is_not(changed: dict[str, object]) -> None:
    assert difference(identity(), identity(**changed)) is None


def test_latencies_that_were_taken_otherwise_make_another_study() -> None:
    before = {name: value for name, value in identity().items() if name != "latency"}
    assert difference(before, identity()) == f"latency: null became {LATENCY_PROTOCOL}"


def test_studies_from_before_rows_and_seed_were_told_go_on() -> None:
    before = {name: value for name, value in identity().items() if name not in ("rows", "seed")}
    assert difference(before, identity(data={"calibration_rows": 512}, seed=9)) is None


def test_a_difference_is_said_in_short() -> None:
    assert difference({"schema": 1, "a": 1, "b": 2}, {"a": 1, "c": "x"}) == "b: 2 became null; c: null became x"
    said = difference({"a": "x" * 1000}, {"a": "y" * 1000})
    assert said is not None
    assert len(said) < 300


@pytest.mark.parametrize(
    ("space", "written"),
    [
        ("encoder-small", "2b38ce694140"),
        ("encoder-pruning", "95b7ad439dca"),
        ("encoder-students", "a7a9e8875845"),
        ("encoder-inputs", "a22e70e95aad"),
    ],
)
def test_studies_of_spaces_go_on_that_do_not_use_what_came_later(space: str, written: str) -> None:
    """With what was written for the same file before lengths, vocabularies and other architectures of students."""
    assert identity(space)["space"] == f"{space} {written}"


def test_vocabulary_length_and_reconstruction_belong_to_a_study() -> None:
    spaces = [SearchSpace.load("encoder-inputs")]
    spaces.append(spaces[0].model_copy(update={"max_tokens": ("full", 0.5)}))
    spaces.append(spaces[0].model_copy(update={"rules": ()}))
    spaces.append(spaces[0].model_copy(update={"reconstruct": (False, True)}))
    found = {
        str(identity_of(RunConfig(), model="m", data="d", space=bind(space, SHAPE, tokens=64))["space"])
        for space in spaces
    }
    assert len(found) == len(spaces)


def test_architectures_of_students_belong_to_a_study() -> None:
    changes: list[dict[str, object]] = [{}, {"activation": "relu"}, {"hidden": 0.5}, {"hidden": 16}, {"share": 2}]
    found = set()
    for change in changes:
        students = {"a": {"blocks": [1], "heads": 2, **change}}
        space = SearchSpace.model_validate({"schema": 1, "name": "s", "students": students})
        found.add(str(identity_of(RunConfig(), model="m", data="d", space=bind(space, SHAPE, tokens=64))["space"]))
    assert len(found) == len(changes)


def test_studies_from_before_there_were_more_options_of_recovery_go_on() -> None:
    """With what was written before relations, penalties, patience, seeds and counted epochs."""
    written = {"alpha": 0.5, "batch_size": 32, "epochs": 1.0, "learning_rate": 3e-4, "precision": "auto"}
    assert identity()["recovery"] == {**written, "temperature": 2.0}


@pytest.mark.parametrize(
    "option", [{"hidden": 1}, {"relations": 1}, {"l1": 1}, {"l2": 1}, {"patience": 1}, {"seeds": 2}]
)
def test_what_concerns_picked_points_alone_belongs_to_their_plans(option: dict[str, float]) -> None:
    assert difference(identity(), identity(recovery=option)) is None


@pytest.mark.parametrize("option", [{"alpha": 0}, {"epochs": "auto"}, {"temperature": 1}, {"batch_size": 8}])
def test_what_does_not_stand_in_plans_belongs_to_the_study(option: dict[str, object]) -> None:
    said = difference(identity(), identity(recovery=option))
    assert said is not None
    assert said.startswith("recovery: ")


class TestIdentity:
    FOUND: ClassVar = {"model": "m", "data": "fingerprint, 64 tokens", "machine": "ours"}

    def of(self, stored: dict[str, object] | None) -> Identity:
        return Identity(stored, RunConfig.from_mapping({}), Path("out"))

    def test_other_rows_are_refused(self) -> None:
        self.of(self.FOUND).require_data("fingerprint")
        with pytest.raises(StudyError, match=r"^data: demo/movies: holds other rows than those that out was scored on"):
            self.of(self.FOUND).require_data("another")

    def test_another_model_or_machine_is_refused(self) -> None:
        known = self.of(self.FOUND)
        known.require_model("m")
        known.require_machine("ours")
        assert known.is_of_model("m")
        assert not known.is_of_model("another")
        with pytest.raises(StudyError, match=r"^model: demo/minilm: is not the one that out compresses"):
            known.require_model("another")
        with pytest.raises(StudyError, match=r"are of another machine.* retarget out -o NEW measures its front here"):
            known.require_machine("another")

    def test_a_study_that_does_not_say_what_it_is_of_is_taken_as_it_is(self) -> None:
        unknown = self.of(None)
        unknown.require_known("out")
        unknown.require_current("out")
        unknown.require_same("out", self.FOUND)
        unknown.require_data("fingerprint")
        unknown.require_model("m")
        unknown.require_machine("ours")

    def test_where_a_study_has_moved_a_way_on_is_named(self) -> None:
        with pytest.raises(StudyError, match=r"machine: ours became theirs\); use another --out; .+ out -o NEW"):
            self.of(self.FOUND).require_same("out", {**self.FOUND, "machine": "theirs"})
        with pytest.raises(StudyError, match=r"\(model: m became n\); use another --out$"):
            self.of(self.FOUND).require_same("out", {**self.FOUND, "model": "n"})
