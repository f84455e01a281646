"""Handing out: every candidate is told once, training runs alone, and Ctrl-C and a full disk end a search in order.

Studies and workers are of paper here; `test_distribute.py` has real ones.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from autocompress import execute as handing_out
from autocompress.config import RunConfig
from autocompress.decisions import MaxTokens
from autocompress.desk import Job
from autocompress.errors import StudyError
from autocompress.execute import execute
from autocompress.plan import MODEL_SITE, CompressionPlan


@pytest.mark.parametrize("gone_home_after", [None, 1])
def test_what_keeps_all_cores_busy_waits_until_nothing_runs(gone_home_after: int | None) -> None:
    """With a study and workers of paper: eight plans, of which the third and the sixth need training."""
    plans = [CompressionPlan(((MODEL_SITE, MaxTokens(tokens=n + 1)),)) for n in range(8)]
    slow, happened = {plans[2], plans[5]}, list[str]()

    class PaperStudy:
        run = RunConfig()

        def __init__(self) -> None:
            self.left = iter(enumerate(plans))

        def ask(self) -> tuple[int, CompressionPlan] | None:
            return next(self.left, None)

        def rivals(self) -> list[list[float]]:
            return []

        def tell(self, number: int, plan: CompressionPlan, result: Any) -> int:
            assert plan is plans[number]
            happened.append(f"told {number}" if isinstance(result, str) and result == "no" else f"lost {number}")
            return number

    class PaperWorkers:
        count = 2

        def __init__(self) -> None:
            self.jobs: list[int] = []
            self.done, self.left = 0, False

        def open(self) -> None: ...

        def close(self) -> None: ...

        def put(self, job: Job) -> None:
            self.jobs.append(job.number)

        def next_result(self, timeout: float) -> Any:
            assert not self.left, "Ray would be started again"
            if not self.jobs or self.done == gone_home_after:
                self.left = True
                return None
            self.done += 1
            return self.jobs.pop(0), {"failure": "no"}

    workers: Any = PaperWorkers()

    def prepare(plan: CompressionPlan) -> None:
        happened.append(f"prepared {plans.index(plan)}, {len(workers.jobs)} running")

    study: Any = PaperStudy()
    execute(study, workers=workers, prepare=prepare, alone=slow.__contains__, told=lambda _: None)
    told = [line for line in happened if line.startswith(("told", "lost"))]
    prepared = [line for line in happened if line.startswith("prepared")]
    if gone_home_after is None:
        assert sorted(told) == [f"told {n}" for n in range(8)]
        assert prepared[2] == "prepared 2, 0 running"
        assert prepared[5] == "prepared 5, 0 running"
        assert prepared[7] == "prepared 7, 2 running", "the others do not wait"
    else:
        assert told == ["told 0", "lost 1", "lost 2"], "what was asked for is told"
        assert len(prepared) == 2, "nothing is trained for nobody"


def test_nobody_waits_for_a_worker_that_has_nothing_to_do() -> None:
    """Such as one that dies again and again while it begins, on a node that lacks something."""
    asked, results = iter([(0, CompressionPlan())]), iter([(0, {"failure": "no"})])
    study: Any = SimpleNamespace(run=RunConfig(), ask=lambda: next(asked, None), rivals=list, tell=lambda *_: "told")
    there: Any = SimpleNamespace(
        count=2, open=lambda: None, close=lambda: None, put=lambda _: None, next_result=lambda _: next(results)
    )
    told: list[Any] = []
    execute(study, workers=there, prepare=lambda _: None, alone=lambda _: False, told=told.append)
    assert told == ["told"]


def test_a_full_disk_ends_the_search() -> None:
    asked = iter([(0, CompressionPlan())])
    study: Any = SimpleNamespace(run=RunConfig(), ask=lambda: next(asked, None), rivals=list)
    found: Any = SimpleNamespace(
        count=1,
        open=lambda: None,
        close=lambda: None,
        put=lambda _: None,
        next_result=lambda _: (0, {"end": "no space is left in /results; make room"}),
    )
    with pytest.raises(StudyError, match=r"^search: no space is left in /results; make room, and run the same command"):
        execute(study, workers=found, prepare=lambda _: None, alone=lambda _: False, told=lambda _: None)


class Interrupted:
    """A study of endless plans, and two workers of paper: Ctrl-C is pressed before the first of them is done."""

    run = RunConfig()
    count = 2

    def __init__(self, presses: int = 1) -> None:
        self.presses = presses
        self.numbers = iter(range(100))
        self.happened: list[str] = []
        self.jobs: list[int] = []

    def ask(self) -> tuple[int, CompressionPlan]:
        number = next(self.numbers)
        return number, CompressionPlan(((MODEL_SITE, MaxTokens(tokens=number + 1)),))

    def rivals(self) -> list[list[float]]:
        return []

    def tell(self, number: int, *_: Any) -> int:
        self.happened.append(f"told {number}")
        return number

    def open(self) -> None: ...

    def close(self) -> None: ...

    def put(self, job: Job) -> None:
        self.jobs.append(job.number)

    def withdraw(self) -> None:
        self.happened.append("withdrawn")
        del self.jobs[self.count :]

    def next_result(self, timeout: float) -> Any:
        if self.presses:
            self.presses -= 1
            signal.raise_signal(signal.SIGINT)
            raise TimeoutError
        return (self.jobs.pop(0), {"failure": "no"}) if self.jobs else None


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """What it does in a program that was not started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    left = signal.signal(signal.SIGINT, before)
    assert left is signal.default_int_handler, "it does afterwards what it did"


def interrupted(paper: Any, prepare: Callable[[CompressionPlan], None] = lambda _: None) -> list[str]:
    with pytest.raises(KeyboardInterrupt):
        execute(paper, workers=paper, prepare=prepare, alone=lambda _: False, told=lambda _: None)
    happened: list[str] = paper.happened
    return happened


@pytest.mark.usefixtures("ctrl_c")
class TestCtrlC:
    def test_once_lets_what_runs_come_to_its_end(self) -> None:
        paper = Interrupted()
        assert interrupted(paper) == ["withdrawn", "told 0", "told 1"]
        assert next(paper.numbers) == 3, "one lay at the desk, and nothing is proposed any more"

    def test_twice_ends_at_once(self) -> None:
        assert interrupted(Interrupted(presses=2)) == ["withdrawn"]

    def test_nobody_waits_for_ever(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(handing_out, "LEAVE_S", 0.0)
        assert "told 0" not in interrupted(Interrupted())

    def test_a_distillation_is_let_go(self) -> None:
        assert interrupted(Interrupted(presses=0), lambda _: signal.raise_signal(signal.SIGINT)) == []

    def test_while_a_distillation_waits_for_what_runs_it_does_not_begin(self) -> None:
        paper, trained = Interrupted(), list[CompressionPlan]()
        third = CompressionPlan(((MODEL_SITE, MaxTokens(tokens=3)),))
        with pytest.raises(KeyboardInterrupt):
            execute(
                cast(Any, paper),
                workers=cast(Any, paper),
                prepare=trained.append,
                alone=lambda plan: plan == third,
                told=lambda _: None,
            )
        assert paper.happened == ["withdrawn", "told 0", "told 1"]
        assert third not in trained

    def test_in_another_thread_it_is_left_alone(self) -> None:
        done: Any = SimpleNamespace(run=RunConfig(), ask=lambda: None, rivals=list, count=1)
        done.open = done.close = lambda: None
        done.next_result = lambda _: None

        def search() -> None:
            execute(done, workers=done, prepare=lambda _: None, alone=lambda _: False, told=lambda _: None)

        thread = threading.Thread(target=search)
        thread.start()
        thread.join()
