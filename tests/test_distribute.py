"""Ray executes: exact counts with several workers, whatever happens to them, and reasons that reach the study."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import ipaddress
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from processes import busy_workers, descendants, named
from safetensors.torch import load_file, save_file
from test_search import alive, by_number, command, lines_until, read_csv, start_search
from test_study import plan_ids, states

from autocompress import machine
from autocompress.config import RunConfig
from autocompress.decisions import Student
from autocompress.desk import DIED, Desk, Job
from autocompress.distribute import Workers
from autocompress.errors import DepotError, StudyError
from autocompress.evaluate import Workshop
from autocompress.plan import MODEL_SITE, CompressionPlan
from autocompress.records import Candidate, Stopped

pytestmark = pytest.mark.slow

TRIALS = 6


@pytest.fixture
def workplace(tmp_path: Path, tiny_run: Callable[..., RunConfig], bert_headed_folder: Path) -> Callable[..., Path]:
    """Return a function that makes a folder with a run file of the tiny model with a head, for two workers."""

    def make(*overrides: str) -> Path:
        model = f"model.id={json.dumps(str(bert_headed_folder))}"
        # Which candidates are given up depends on who is done first; what ends otherwise is counted here.
        settings = [model, f"search.trials={TRIALS}", "search.workers=2", "search.stop_early=false"]
        run = tiny_run([*settings, *overrides])
        (tmp_path / "run.yaml").write_text(run.to_yaml(), encoding="utf-8")
        return tmp_path

    return make


def kill_a_busy_worker(search: subprocess.Popen[str]) -> int:
    """Kill one worker in mid-trial; return how many were busy."""
    until = time.monotonic() + 60
    while not (busy := busy_workers(search.pid)):
        assert search.poll() is None
        assert time.monotonic() < until, "no worker became busy"
        time.sleep(0.02)
    os.kill(busy[0], signal.SIGKILL)
    return len(busy)


def ended(search: subprocess.Popen[str], out: Path, trials: int = TRIALS, said: str = "") -> list[Candidate]:
    """Wait for the search; check that the study is whole and return its candidates."""
    try:
        _, err = search.communicate(timeout=300)
    finally:
        search.kill()
    assert search.returncode == 0, err
    assert "Traceback" not in err
    assert said in err
    candidates = list(by_number(out).values())
    assert len(candidates) == trials
    assert len(set(plan_ids(candidates))) == trials
    assert not {"RUNNING", "WAITING"} & set(states(out))
    assert len(read_csv(out / "study.csv")) == trials
    return candidates


def test_a_worker_killed_in_mid_trial_is_replaced(workplace: Callable[..., Path]) -> None:
    folder = workplace()
    search = start_search(folder, folder / "out")
    list(lines_until(search, "] trial "))
    kill_a_busy_worker(search)
    candidates = ended(search, folder / "out")
    assert [c.state for c in candidates] == ["COMPLETE"] * TRIALS
    assert states(folder / "out") == {"COMPLETE": TRIALS}


def test_stopped_candidates_reach_the_study(workplace: Callable[..., Path]) -> None:
    folder = workplace("search.stop_early=true", "search.guide=divergence", "search.trials=12", "search.workers=1")
    done = command("search", "run.yaml", "--out", folder / "out", cwd=folder)
    assert done.code == 0, done.err
    candidates = by_number(folder / "out").values()
    assert len(candidates) == 12
    assert {c.state for c in candidates} <= {"COMPLETE", "PRUNED"}
    front = set(read_csv(folder / "out" / "pareto.csv")["number"])
    for candidate in candidates:
        if candidate.state == "PRUNED":
            assert candidate.number not in front
            assert re.search(r"divergence at least .* of 60 rows; the front has", candidate.failure or "")
            assert not (folder / "out" / "artefacts" / candidate.plan.plan_id).exists()


def test_without_retries_only_its_trial_fails(workplace: Callable[..., Path]) -> None:
    # At more than one thread latency is wall time, for which a candidate has the machine to itself.
    folder = workplace("search.max_retries=0", "target.threads=2")
    search = start_search(folder, folder / "out")
    list(lines_until(search, "] trial "))
    assert kill_a_busy_worker(search) == 1, "one at a time, in spite of two workers"
    candidates = ended(search, folder / "out")
    assert sorted(c.state for c in candidates) == ["COMPLETE"] * (TRIALS - 1) + ["FAIL"]
    failed = next(c for c in candidates if c.state == "FAIL")
    assert failed.failure == "the worker died or ended without a result in every attempt"
    assert failed.number not in set(read_csv(folder / "out" / "pareto.csv")["number"])


def test_a_student_of_not_a_number_fails_and_the_others_finish(
    workplace: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    bank = tmp_path_factory.mktemp("poisoned")
    # The student's turn comes after the uniform plans of the full model; then predictions are learned, too.
    folder = workplace(f"storage.bank={json.dumps(str(bank))}", "search.trials=16")
    # Everything is prepared as a search does it; then the student's weights go bad in the bank.
    workshop = Workshop(RunConfig.from_file(folder / "run.yaml"), folder / "unused")
    for student in workshop.space.students.values():
        workshop.prepare(CompressionPlan(((MODEL_SITE, student),)))
    (weights,) = bank.glob("distilled/*/weights.safetensors")
    tensors = load_file(weights)
    name = next(name for name in tensors if re.search(r"layer\.1\.output\.dense\.weight", name))
    tensors[name] = torch.full_like(tensors[name], torch.nan)
    save_file(tensors, weights)
    candidates = ended(start_search(folder, folder / "out"), folder / "out", 16)
    failed = [c for c in candidates if c.state == "FAIL"]
    assert failed
    assert {bool(c.plan.of_type(Student)) for c in failed} == {True}
    assert not [c for c in candidates if c.state == "COMPLETE" and c.plan.of_type(Student)]
    for candidate in failed:
        assert candidate.failure is not None
        assert re.search("finite|NaN", candidate.failure)
    table = read_csv(folder / "out" / "study.csv").set_index("number")
    assert {number: table["failure"][number] for number in table.index[table["state"] == "FAIL"]} == {
        c.number: c.failure for c in failed
    }
    assert not {c.number for c in failed} & set(read_csv(folder / "out" / "pareto.csv")["number"])


@pytest.fixture
def worker(workplace: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A worker as Tune would make it, in this process, on a folder that lacks the reference."""
    from autocompress.workers import Worker

    run = RunConfig.from_file(workplace() / "run.yaml")
    (artefacts := workplace() / "artefacts").mkdir()
    settings = json.dumps(run.model_dump(mode="json", by_alias=True))
    about = {"desk": None, "driver": machine.fingerprint(), "outposts": [], "exchange": None}
    return Worker({"run": settings, "artefacts": str(artefacts), **about})


def job(plan: str = CompressionPlan().to_json(), front: list[list[float]] | None = None) -> Job:
    return Job(0, plan, front or [], attempt=1)


def test_what_fails_while_a_worker_gets_ready_is_said(worker: Any) -> None:
    """And ends the search: candidate after candidate would fail of it while others work on one."""
    [(kind, reason)] = worker.outcome(job()).items()
    assert kind == "end"
    assert reason.startswith("node ")
    assert " cannot begin: " in reason
    assert reason.endswith("holds no artefact.json; give a folder that export wrote as openvino or onnx")


def test_a_run_that_a_worker_cannot_read_is_said(worker: Any) -> None:
    """As where another version was installed that has no such key; a worker that dies of it would say nothing."""
    from autocompress.workers import Worker

    settings = {**worker._settings, "run": json.dumps({"later": True}), "exchange": "memory://nobody/knows"}
    [(kind, reason)] = Worker(settings).outcome(job()).items()
    assert kind == "end"
    assert " cannot begin: run: later: unknown key" in reason


def test_a_defect_in_one_candidate_is_its_reason(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("division by zero\nand more")

    monkeypatch.setattr(Workshop, "ready", lambda _: None)
    monkeypatch.setattr(Workshop, "attempt", broken)
    assert worker.outcome(job()) == {"failure": "ZeroDivisionError: division by zero"}
    assert worker.outcome(job("no JSON"))["failure"].startswith("plan: not JSON")


def test_what_is_measured_elsewhere_ends_the_search(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    here = machine.fingerprint()
    for about, said in (
        ({**here, "id": "another", "cpu": {**here["cpu"], "name": "slow"}}, "has another CPU (slow, not"),
        ({**here, "versions": {**here["versions"], "torch": "1.0"}}, "has torch 1.0, the driver"),
        ({**here, "versions": {n: v for n, v in here["versions"].items() if n != "onnx"}}, "has onnx None, the driver"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(machine, "fingerprint", lambda about=about: about)
            [(kind, reason)] = worker.outcome(job()).items()
        assert kind == "end"
        assert said in reason
    shutil.rmtree(worker._artefacts)
    assert "has no folder" in worker.outcome(job())["end"]


class Killed(BaseException):
    """As if the kernel had ended the process, for its memory or otherwise."""


class NearDesk:
    """A desk in this process, called as Ray would call it."""

    def __init__(self) -> None:
        self.desk = Desk()

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *values: asyncio.run(getattr(self.desk, name)(*values)))


def test_a_candidate_that_kills_every_worker_is_tried_three_times(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from autocompress import workers

    tried: list[int] = []

    def outcome(job: Job) -> dict[str, Any]:
        tried.append(job.number)
        if job.number == 7:
            raise Killed
        return {"failure": "evaluated"}

    desk = NearDesk()
    monkeypatch.setattr(workers.ray, "get", lambda found: found)
    monkeypatch.setattr(worker, "_desk", desk)
    monkeypatch.setattr(worker, "_opened", lambda: None)
    monkeypatch.setattr(worker, "outcome", outcome)
    for number in (7, 8):
        desk.put.remote(Job(number, CompressionPlan().to_json(), []))
    for said in ("open", "close"):
        getattr(desk, said).remote()
    for _ in range(3):
        with pytest.raises(Killed):
            worker.step()
    worker.step()
    assert tried == [7, 7, 7, 8], "twice more than once"
    assert [desk.result.remote() for _ in range(2)] == [(7, {"failure": DIED}), (8, {"failure": "evaluated"})]


def test_a_full_disk_is_no_failure_of_a_candidate(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from autocompress import workers

    def full(**_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    def attempt(*_: Any) -> Any:
        raise RuntimeError("a library's own words")

    shop = SimpleNamespace(attempt=attempt, ready=lambda: None, bank=SimpleNamespace(root=worker._artefacts.parent))
    monkeypatch.setattr(worker, "_workshop", shop)
    assert worker.outcome(job()) == {"failure": "RuntimeError: a library's own words"}
    monkeypatch.setattr(workers.tempfile, "TemporaryFile", full)
    assert worker.outcome(job()) == {"end": f"no space is left in {worker._artefacts} (RuntimeError); make room"}


def test_shared_storage_that_is_gone_is_no_failure_of_a_candidate(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def get(*_: Any) -> bool:
        raise DepotError("storage.shared: s3://here: cannot be read (no such bucket)")

    there = SimpleNamespace(url="s3://here", get=get)
    monkeypatch.setattr(worker, "_workshop", SimpleNamespace(reference_folder=worker._artefacts / "reference"))
    monkeypatch.setattr(worker, "_exchange", there)
    assert worker.outcome(job()) == {"end": "storage.shared: s3://here: cannot be read (no such bucket)"}
    there.get = lambda *_: False
    assert worker.outcome(job()) == {"end": "storage.shared: s3://here has no reference; run the same command again"}


_FILLS_THE_MEMORY = """
import sys, threading, time
def inject():
    while "autocompress.evaluate" not in sys.modules or not hasattr(sys.modules["autocompress.evaluate"], "Workshop"):
        time.sleep(0.01)
    shop = sys.modules["autocompress.evaluate"].Workshop
    attempt = shop.attempt
    def filling(self, plan, front=()):
        try:
            open({chosen!r}, "x").write(plan.plan_id)
        except FileExistsError:
            pass
        if open({chosen!r}).read() == plan.plan_id:
            filled = bytearray({size})
            for at in range(0, len(filled), 4096):
                filled[at] = 1
            time.sleep(60)
        return attempt(self, plan, front)
    shop.attempt = filling
threading.Thread(target=inject, daemon=True).start()
"""


@pytest.fixture
def little_memory() -> Iterator[Path]:
    """A control group that may use little; the kernel kills one of its processes where that does not do."""
    root = Path("/sys/fs/cgroup")
    first, limit = (root / "memory", "memory.limit_in_bytes") if (root / "memory").is_dir() else (root, "memory.max")
    group = first / f"autocompress-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        pytest.skip("control groups are not ours to make")
    try:
        (group / limit).write_text(str(_ROOM), encoding="ascii")
    except OSError:
        group.rmdir()
        pytest.skip("the kernel does not account for memory here")
    yield group
    until = time.monotonic() + 30
    while True:
        try:
            group.rmdir()
            return
        except OSError:  # a process that ended is still in it
            assert time.monotonic() < until
            time.sleep(0.1)


_ROOM = 6 * 2**30


def test_a_candidate_that_fills_the_memory_fails_alone(
    workplace: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, little_memory: Path
) -> None:
    folder = workplace("search.max_retries=1")
    (injected := folder / "injected").mkdir()
    code = _FILLS_THE_MEMORY.format(chosen=str(folder / "chosen"), size=_ROOM)
    (injected / "sitecustomize.py").write_text(code, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(injected))
    search = start_search(folder, folder / "out")
    (little_memory / "cgroup.procs").write_text(str(search.pid), encoding="ascii")  # and all that it will start
    candidates = ended(search, folder / "out")
    [failed] = [c for c in candidates if c.state != "COMPLETE"]
    assert failed.failure == DIED
    assert failed.plan.plan_id == (folder / "chosen").read_text(encoding="ascii")


def test_a_worker_gives_up_what_cannot_reach_the_front(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Any]] = []
    given_up = Stopped(reason="3 hits in 15 of 60 rows", rows=15, size_bytes=9.0, latency=0.5)

    def attempt(_: Any, plan: CompressionPlan, front: Any) -> Stopped:
        asked.append((plan.plan_id, front))
        return given_up

    monkeypatch.setattr(Workshop, "ready", lambda _: None)
    monkeypatch.setattr(Workshop, "attempt", attempt)
    assert worker.outcome(job()) == {"stopped": dataclasses.asdict(given_up)}
    worker.outcome(job(front=[[-0.9, 1.0, 0.1]]))
    assert asked == [(CompressionPlan().plan_id, []), (CompressionPlan().plan_id, [[-0.9, 1.0, 0.1]])]


# Workers that lost their raylet may go on to their end, if that comes soon.
@pytest.mark.parametrize(
    ("title", "said"),
    [(b"autocompress.crew", "it is started again with what had no result yet"), (b"raylet/raylet", "")],
    ids=["its process", "the raylet"],
)
def test_a_search_outlives_ray(workplace: Callable[..., Path], title: bytes, said: str) -> None:
    folder = workplace("search.trials=16")
    search = start_search(folder, folder / "out")
    told = [re.findall(r"\] trial (\d+) ", line) for line in lines_until(search, "] trial ")]
    [ray] = named(search.pid, title)
    os.kill(ray, signal.SIGKILL)
    candidates = ended(search, folder / "out", 16, said)
    assert {c.state for c in candidates} == {"COMPLETE"}
    assert {int(number) for found in told for number in found} <= {c.number for c in candidates}


@pytest.fixture
def workers(workplace: Callable[..., Path], tmp_path: Path) -> Workers:
    return Workers(RunConfig.from_file(workplace() / "run.yaml"), tmp_path / "artefacts")


def listening(pids: Iterable[int]) -> dict[str, set[ipaddress.IPv4Address | ipaddress.IPv6Address]]:
    """Return the addresses on which processes wait for connections, by the name of the process."""
    waiting = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text(encoding="ascii").splitlines()[1:]:
            _, local, _, state, *_ = fields = line.split()
            if state == "0A":
                # 32-bit words in the machine's order of bytes.
                words = bytes.fromhex(local.partition(":")[0])
                packed = b"".join(words[at : at + 4][::-1] for at in range(0, len(words), 4))
                address = ipaddress.ip_address(packed)
                mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
                waiting[f"socket:[{fields[9]}]"] = mapped or address
    found: dict[str, set[ipaddress.IPv4Address | ipaddress.IPv6Address]] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            name = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip()
            for handle in Path(f"/proc/{pid}/fd").iterdir():
                if (socket := str(handle.readlink())) in waiting:
                    found.setdefault(name, set()).add(waiting[socket])
    return found


def reaches(address: str, token: str) -> subprocess.CompletedProcess[str]:
    """Try to get at Ray from another process."""
    code = f"import ray; ray.init(address={address!r}, log_to_driver=False); print(len(ray.nodes()))"
    known = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **known}, capture_output=True, text=True, timeout=120
    )


def test_nobody_else_reaches_ray(workers: Workers) -> None:
    others = descendants(os.getpid())
    with workers:
        until = time.monotonic() + 60
        while not named(os.getpid(), b"ray::"):  # a worker, which is there once all others are
            assert time.monotonic() < until, "no worker started"
            time.sleep(0.2)
        own = descendants(os.getpid()) - others
        found = listening(own)
        lines = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in own if Path(f"/proc/{pid}").exists()]
        [raylet] = named(os.getpid(), b"raylet/raylet")
        environment = Path(f"/proc/{raylet}/environ").read_text(encoding="utf-8").split("\0")
        settings = dict(line.split("=", 1) for line in environment if "=" in line)
        [address] = {match[1].decode() for line in lines if (match := re.search(rb"--gcs-address=([0-9.:]+)", line))}
        with_it, without = (reaches(address, token) for token in (settings["RAY_AUTH_TOKEN"], "another"))
    assert {"raylet", "gcs_server"} <= found.keys()
    assert all(address.is_loopback for addresses in found.values() for address in addresses), found
    assert with_it.returncode == 0, with_it.stderr
    assert with_it.stdout.strip() == "1"
    assert without.returncode != 0
    assert "token" in without.stderr
    assert not any(settings["RAY_AUTH_TOKEN"].encode() in line for line in lines), "others may read command lines"


def test_a_ray_that_always_dies_ends_the_search(workers: Workers) -> None:
    others, killed, over = descendants(os.getpid()), set[int](), threading.Event()

    def kill() -> None:
        while not over.wait(0.05):
            for ray in set(named(os.getpid(), b"autocompress.crew")) - others - killed:
                os.kill(ray, signal.SIGKILL)
                killed.add(ray)

    killer = threading.Thread(target=kill, daemon=True)
    with workers:
        killer.start()
        with pytest.raises(StudyError, match=r"Ray died 3 times \(it left no word\); run the same command again"):
            workers.next_result()
    over.set()
    killer.join()
    assert len(killed) == 3
    assert not {pid for pid in descendants(os.getpid()) - others if alive(pid)}


def test_why_ray_cannot_start_is_said(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/proc")
    with workers, pytest.raises(StudyError, match=r"search: Ray cannot be started \(.+\)"):
        workers.next_result()


def test_ray_ends_with_a_search_that_is_left_while_its_workers_start(workers: Workers) -> None:
    others = descendants(os.getpid())
    with workers:
        workers.open()
        until = time.monotonic() + 60
        while not named(os.getpid(), b"ray::"):
            assert time.monotonic() < until, "no worker was started"
            time.sleep(0.1)
        below = {pid for pid in descendants(os.getpid()) - others if alive(pid)}
    assert len(below) > 1
    assert not {pid for pid in below if alive(pid)}


def test_a_model_of_not_a_number_is_refused_before_the_first_candidate(
    workplace: Callable[..., Path], bert_headed_folder: Path
) -> None:
    folder = workplace()
    shutil.copytree(bert_headed_folder, folder / "bad")
    weights = folder / "bad" / "model.safetensors"
    tensors = load_file(weights)
    tensors["classifier.bias"] = torch.full_like(tensors["classifier.bias"], torch.nan)
    save_file(tensors, weights, metadata={"format": "pt"})
    done = command("search", "run.yaml", "--model", folder / "bad", "--out", folder / "out", cwd=folder)
    assert done.code == 1
    assert not (folder / "out" / "study.journal").exists()
