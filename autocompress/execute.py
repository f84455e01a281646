"""A study's candidates handed out to workers, and what comes back told to it; also what Ctrl-C does meanwhile.

The driver alone writes the study.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from autocompress.desk import DIED, Job, Result
from autocompress.distribute import LEAVE_S, Workers
from autocompress.errors import StudyError
from autocompress.plan import CompressionPlan
from autocompress.records import Candidate, Measurement, Stopped
from autocompress.study import Study

_AHEAD, _MORE_AHEAD_FOR = 1, 16
"""Jobs that wait at the desk beyond those that are worked on; one more for each so many workers, for whom the driver is
busy at times with what serves all of them."""
_GLANCE_S = 0.2
"""Time between two looks whether Ctrl-C was pressed, while nothing comes."""


class _Leaving:
    """What Ctrl-C does while candidates are evaluated: once, those that are running may end; twice, none may.

    Where it is not this thread or program that Ctrl-C is for, it does what it did.
    """

    def __init__(self) -> None:
        self._since: float | None = None
        self._at_once = False
        self._before: Any = None

    def __enter__(self) -> _Leaving:
        own = threading.current_thread() is threading.main_thread()
        if own and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._before = signal.signal(signal.SIGINT, self._pressed)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _pressed(self, *_: object) -> None:
        if self._at_once or self.asked:
            raise KeyboardInterrupt
        self._since = time.monotonic()

    @property
    def asked(self) -> bool:
        return self._since is not None

    @property
    def late(self) -> bool:
        """Whether there is no time left."""
        return self._since is not None and time.monotonic() - self._since > LEAVE_S

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Let go of what takes longer than anybody would wait."""
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False


def execute(
    study: Study,
    *,
    workers: Workers,
    prepare: Callable[[CompressionPlan], None],
    alone: Callable[[CompressionPlan], bool],
    told: Callable[[Candidate], None],
) -> None:
    """Evaluate the study's remaining candidates.

    Args:
        study: open for writing.
        workers: entered; it need not have started yet.
        prepare: called before a plan is handed out; makes what workers then find in the bank.
        alone: whether that keeps all cores busy for long; no candidate is then evaluated meanwhile, since that would
            take several times as long as without.
        told: called after each candidate was recorded.

    Raises:
        StudyError: if Ray cannot be started, or died too often, or no room is left on a disk.
        KeyboardInterrupt: after Ctrl-C, once what was running has ended and is recorded, or there is no time left.
    """
    with _Leaving() as leaving:
        _execute(study, workers, prepare, alone, told, leaving)


def _execute(
    study: Study,
    workers: Workers,
    prepare: Callable[[CompressionPlan], None],
    alone: Callable[[CompressionPlan], bool],
    told: Callable[[Candidate], None],
    leaving: _Leaving,
) -> None:
    running: dict[int, CompressionPlan] = {}
    ended = gone = withdrawn = False

    def hand_out() -> None:
        nonlocal ended
        asked = study.ask()
        if asked is None:
            ended = True
            workers.close()
            return
        number, plan = asked
        while running and alone(plan) and tell_next():
            pass
        running[number] = plan
        if gone or leaving.asked:
            return
        with leaving.at_once():
            prepare(plan)
        front = study.rivals() if study.run.search.stop_early else []
        workers.put(Job(number, plan.to_json(), front))

    def tell(number: int, outcome: Measurement | Stopped | str) -> None:
        told(study.tell(number, running.pop(number), outcome))

    def tell_next() -> bool:
        """Wait for a result and tell it; False once all workers have gone home."""
        nonlocal gone
        result = wait()
        if result is None:
            gone = True
            return False
        number, outcome = result
        [(kind, value)] = outcome.items()
        if kind == "end":
            raise StudyError(f"search: {value}, and run the same command again to continue")
        kinds = {"measurement": Measurement, "stopped": Stopped}
        tell(number, value if kind == "failure" else kinds[kind](**value))
        return True

    def wait() -> Result | None:
        nonlocal withdrawn
        while not leaving.late:
            if leaving.asked and not withdrawn:
                withdrawn = True
                workers.withdraw()
            with contextlib.suppress(TimeoutError):
                return workers.next_result(_GLANCE_S)
        raise KeyboardInterrupt

    def fill() -> None:
        wanted = workers.count + _AHEAD + workers.count // _MORE_AHEAD_FOR
        while not (ended or gone or leaving.asked) and len(running) < wanted:
            hand_out()

    workers.open()
    fill()
    # Nobody waits for workers that have nothing to do any more, such as one that cannot begin on its node.
    while not gone and (running or not ended) and tell_next():
        fill()
    if leaving.asked:
        raise KeyboardInterrupt
    for number in list(running):
        tell(number, DIED)  # no worker is left to do it
