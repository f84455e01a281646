"""Fresh processes: they find what this one finds, nothing of the folder they are started in, and end with it all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from autocompress import fresh

NAME = "lies_about"


def found(folder: Path) -> bool:
    command, environment = fresh.python("-c", f"import {NAME}")
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, check=False).returncode == 0


def test_modules_are_those_of_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"{NAME}.py").touch()
    plain = subprocess.run([sys.executable, "-c", f"import {NAME}"], cwd=tmp_path, capture_output=True, check=False)
    assert plain.returncode == 0, "where nothing is done it is found"
    assert not found(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert found(tmp_path.parent)


def test_a_session_ends_with_all_its_groups(tmp_path: Path) -> None:
    program = """if True:
        import subprocess, sys
        sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
        below = [subprocess.Popen(sleep), subprocess.Popen(sleep, process_group=0)]
        apart = subprocess.Popen(sleep, start_new_session=True)
        print(apart.pid, *(process.pid for process in below), flush=True)
    """
    command, environment = fresh.python("-c", program)
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, start_new_session=True) as first:
        assert first.stdout is not None
        apart, *below = map(int, first.stdout.readline().split())
        first.wait()  # what it started goes on without it
        try:
            assert {os.getsid(pid) for pid in below} == {first.pid}
            started = time.monotonic()
            fresh.end(first.pid)
            assert time.monotonic() - started < 5, "it does not wait for what has ended"
            assert not any(running(pid) for pid in below)
            assert running(apart), "another session is left alone"
        finally:
            os.kill(apart, signal.SIGKILL)
    fresh.end(first.pid)  # where there is nothing to end


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
