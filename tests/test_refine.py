"""The end of a search, with a study and a workshop of paper: what is timed anew, and which artefacts stay."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers_records import make_candidate, make_reference

from autocompress.decisions import MaxTokens, PruneNeurons, Recover
from autocompress.errors import DepotError, DeviceError, MeasurementError, PlanError, StudyError
from autocompress.front import Front
from autocompress.pareto import contenders
from autocompress.plan import MODEL_SITE, CompressionPlan
from autocompress.records import Candidate, Measurement
from autocompress.refine import _by_gain, _confirm, _reconstruct, _recover, drop_dominated

ALL = ("accuracy", "size_bytes", "latency")


def timed(number: int, accuracy: float, ratio: float, low: float) -> Candidate:
    plan = CompressionPlan(((MODEL_SITE, MaxTokens(tokens=number + 1)),))
    candidate = make_candidate(number, plan=plan, accuracy=accuracy, size_bytes=10_000_000, ratio=ratio)
    return dataclasses.replace(candidate, measurement=dataclasses.replace(candidate.score, latency_ratio_low=low))


class Paper:
    """A study of given candidates and the folder of their artefacts; what each latency is found to be is given, too."""

    def __init__(self, folder: Path, candidates: Sequence[Candidate], truth: dict[int, float]) -> None:
        self.artefacts, self.truth = folder, truth
        self.known = {c.number: c for c in candidates}
        self.rounds: list[list[int]] = []
        self.rebuilt: list[int] = []
        self.run = SimpleNamespace(search=SimpleNamespace(confirm_pairs=6, keep_artefacts="front"))
        for candidate in candidates:
            (folder / candidate.plan.plan_id).mkdir()
        (folder / "reference").mkdir()

    def candidates(self) -> list[Candidate]:
        return list(self.known.values())

    def of_plan(self, plan_id: str) -> Candidate | None:
        return next((c for c in self.known.values() if c.plan.plan_id == plan_id), None)

    def front(self) -> Front:
        return Front.of(self.candidates(), make_reference(), ALL)

    def contenders(self, among: Sequence[Candidate]) -> list[Candidate]:
        return contenders(self.front().points, among, ALL)

    def confirm(self, latest: Mapping[int, Measurement]) -> list[Candidate]:
        for number, measured in latest.items():
            self.known[number] = dataclasses.replace(self.known[number], measurement=measured)
        return [self.known[number] for number in latest]

    def kept(self, candidate: Candidate) -> Measurement:
        folder = self.artefacts / candidate.plan.plan_id
        if not folder.is_dir():
            self.rebuilt.append(candidate.number)
            folder.mkdir()
        return candidate.score

    def confirmed(self, points: Sequence[tuple[CompressionPlan, Measurement]], **_: Any) -> list[Measurement]:
        numbers = [c.number for plan, _ in points if (c := self.of_plan(plan.plan_id)) is not None]
        self.rounds.append(numbers)
        ratios = [self.truth[number] for number in numbers]
        return [
            dataclasses.replace(score, latency_ratio=ratio, latency_ratio_low=ratio, confirmed=True)
            for ratio, (_, score) in zip(ratios, points, strict=True)
        ]

    def left(self) -> set[int]:
        found = (self.of_plan(folder.name) for folder in self.artefacts.iterdir())
        return {c.number for c in found if c is not None}


def test_what_was_timed_at_a_bad_moment_comes_back(tmp_path: Path) -> None:
    """The third was a little slower than the first when it was timed; the fourth is slower at any time."""
    candidates = [
        timed(0, 0.8, 0.3, 0.29),
        timed(1, 0.9, 0.5, 0.49),
        timed(2, 0.8, 0.305, 0.25),
        timed(3, 0.8, 0.4, 0.39),
    ]
    paper: Any = Paper(tmp_path, candidates, {0: 0.31, 1: 0.5, 2: 0.28})
    drop_dominated(paper, tmp_path, candidates[3])
    assert paper.left() == {0, 1, 2}
    _confirm(paper, paper, None, lambda _: None, lambda _: None)
    assert paper.rounds == [[1, 0, 2]]
    assert {c.number for c in paper.front().points} == {1, 2}
    assert paper.left() == {1, 2}
    assert paper.rebuilt == []


def test_a_latency_that_does_not_hold_lets_others_on_the_front_and_is_told_once(tmp_path: Path) -> None:
    candidates = [timed(0, 0.8, 0.3, 0.29), timed(1, 0.8, 0.4, 0.39), timed(2, 0.8, 0.5, 0.49)]
    paper: Any = Paper(tmp_path, candidates, {0: 0.45, 1: 0.42})
    drop_dominated(paper, tmp_path, candidates[2])
    assert paper.left() == {0}
    stages: list[str] = []
    _confirm(paper, paper, None, lambda _: None, stages.append)
    assert paper.rounds == [[0], [1]]
    assert paper.rebuilt == [1]
    assert paper.left() == {1}
    _confirm(paper, paper, None, lambda _: None, stages.append)
    assert len(paper.rounds) == 2, "nothing is left to be timed"
    assert stages == ["timing the front anew"]


def test_what_cannot_be_made_again_as_it_was_is_left_as_it_is(tmp_path: Path) -> None:
    paper: Any = Paper(tmp_path, [timed(0, 0.9, 0.5, 0.49), timed(1, 0.8, 0.3, 0.29)], {1: 0.31})
    kept = paper.kept

    def otherwise(candidate: Candidate) -> Measurement:
        if candidate.number == 0:
            raise MeasurementError("what is built from its plan now is another one")
        return kept(candidate)

    paper.kept, said = otherwise, list[str]()
    _confirm(paper, paper, None, said.append, lambda _: None)
    assert paper.rounds == [[1]]
    assert said == ["trial 0 cannot be timed anew: what is built from its plan now is another one"]
    assert [c.score.confirmed for c in paper.front().points] == [False, True]


@pytest.mark.parametrize("error", [DeviceError("gone"), DepotError("gone"), StudyError("gone")])
def test_what_every_point_would_meet_ends_it(tmp_path: Path, error: Exception) -> None:
    paper: Any = Paper(tmp_path, [make_candidate(n, accuracy=0.8 + n / 100) for n in range(3)], {})
    paper.run.search.recover, paper.run.search.reconstruct = 3, True
    paper.run.objectives, paper.reference = ALL, make_reference()
    tried: list[CompressionPlan] = []

    def gone(plan: CompressionPlan) -> CompressionPlan:
        tried.append(plan)
        raise error

    paper.recovering = paper.evaluate = gone
    paper.add = lambda *_, **__: pytest.fail("nothing was evaluated")
    paper.kept = lambda candidate: gone(candidate.plan)
    for part in (_recover, _reconstruct, lambda *values: _confirm(*values[:2], None, *values[2:])):
        tried.clear()
        with pytest.raises(type(error), match="gone"):
            part(paper, paper, lambda _: None, lambda _: None)
        assert len(tried) == 1


@pytest.mark.parametrize("confirmed", [False, True])
def test_a_new_point_has_those_timed_anew_that_were_not(tmp_path: Path, confirmed: bool) -> None:
    old, new = timed(0, 0.9, 0.5, 0.49), timed(1, 0.8, 0.3, 0.29)
    old = dataclasses.replace(old, measurement=dataclasses.replace(old.score, confirmed=confirmed))
    paper: Any = Paper(tmp_path, [old, new], {0: 0.5, 1: 0.3})
    _confirm(paper, paper, None, lambda _: None, lambda _: None)
    assert [sorted(numbers) for numbers in paper.rounds] == [[1] if confirmed else [0, 1]]
    _confirm(paper, paper, None, lambda _: None, lambda _: None)
    assert len(paper.rounds) == 1, "where there is nothing new, nothing is timed"


def test_what_has_something_to_win_is_recovered_first() -> None:
    """Of the front; a point behind it comes later, whatever it lost."""
    reference = make_reference()
    plan = CompressionPlan((("block.0.ffn", PruneNeurons(keep=8)),))
    as_good = make_candidate(0, plan=plan, accuracy=0.88, size_bytes=20_000_000, ratio=0.5)
    small = make_candidate(1, plan=plan, accuracy=0.70, size_bytes=2_000_000, ratio=0.05)
    behind = make_candidate(2, plan=plan, accuracy=0.60, size_bytes=3_000_000, ratio=0.06)
    study: Any = SimpleNamespace(run=SimpleNamespace(objectives=ALL), reference=reference)
    assert [c.number for c in _by_gain([as_good, small, behind], study)] == [1, 0, 2]
    study.run.objectives = ("size_bytes", "latency")
    assert [c.number for c in _by_gain([behind, small], study)] == [1, 2]
    assert _by_gain([], study) == []


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("epochs", [1.0, 0.0])
def test_as_many_points_are_recovered_as_are_asked_for_and_one_that_cannot_be_costs_no_other(
    tmp_path: Path, epochs: float, by_hand: bool
) -> None:
    plans = [CompressionPlan(((f"block.{n}.ffn", PruneNeurons(keep=8)),)) for n in range(4)]
    candidates = [make_candidate(n, plan=plan, accuracy=0.9 - n / 100) for n, plan in enumerate(plans)]
    if by_hand:  # in a way that the run file does not ask for
        other = plans[3].with_decision(MODEL_SITE, Recover(epochs=7))
        candidates.append(dataclasses.replace(make_candidate(4, plan=other), origin="recover"))
    paper: Any = Paper(tmp_path, candidates, {})
    paper.run.search.recover, paper.run.objectives, paper.reference = 2, ALL, make_reference()
    paper.run.recovery = SimpleNamespace(epochs=epochs)
    said: list[str] = []

    def recovering(plan: CompressionPlan) -> CompressionPlan:
        if plan == plans[0]:
            raise PlanError("nothing is left of it")
        return plan.with_decision(MODEL_SITE, Recover(epochs=epochs, reconstruct=True))

    def add(plan: CompressionPlan, measured: Measurement, *, origin: str) -> Candidate:
        number = len(paper.known)
        paper.known[number] = dataclasses.replace(
            make_candidate(number, plan=plan), measurement=measured, origin=origin
        )
        return paper.known[number]

    paper.recovering, paper.add = recovering, add
    paper.evaluate = lambda plan: make_candidate(0, plan=plan, accuracy=0.95).score
    for _ in range(2):
        _recover(paper, paper, said.append, lambda _: None)
        made = [c.plan.without(Recover) for c in paper.candidates() if c.origin == "recover"]
        assert made == [*([plans[3]] if by_hand else []), *plans[1:3]]
    assert said.count("trial 0 cannot be recovered: nothing is left of it") == 1


def test_half_as_many_contenders_are_timed_as_the_front_has_points(tmp_path: Path) -> None:
    front = [timed(0, 0.8, 0.3, 0.29), timed(1, 0.9, 0.5, 0.49)]
    candidates = [*front, *(timed(n, 0.8, 0.3 + n / 1000, 0.2) for n in range(2, 6))]
    paper: Any = Paper(tmp_path, candidates, {1: 0.5, **dict.fromkeys((0, *range(2, 6)), 0.3)})
    _confirm(paper, paper, None, lambda _: None, lambda _: None)
    assert paper.rounds == [[1, 0, 2]]
