"""A search on a Ray cluster that others started: real nodes on this machine, lost, refused and left."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_distribute import ended
from test_search import command, lines_until, start_search

from autocompress import machine
from autocompress.config import RunConfig

pytestmark = pytest.mark.slow

TRIALS = 8


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Nodes:
    """A cluster of nodes of one core each, all on the loopback address.

    Args:
        token: without which nobody is let in; None lets in anybody.
    """

    def __init__(self, token: str | None) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self.client_address = f"ray://127.0.0.1:{free_port()}"
        self.token = token
        self._folder = tempfile.mkdtemp(prefix="ray")  # of a short name: sockets stand in it
        self._nodes: list[subprocess.Popen[bytes]] = []
        client = self.client_address.rpartition(":")[2]
        self._start("--head", f"--port={self.address.partition(':')[2]}", f"--ray-client-server-port={client}",
                    "--include-dashboard=false", f"--temp-dir={self._folder}")  # fmt: skip

    @property
    def environment(self) -> dict[str, str]:
        auth = {"RAY_AUTH_MODE": "disabled"} if self.token is None else {"RAY_AUTH_MODE": "token"}
        return auth if self.token is None else {**auth, "RAY_AUTH_TOKEN": self.token}

    def grow(self) -> None:
        self._start(f"--address={self.address}")

    def _start(self, *arguments: str) -> None:
        ray = Path(sys.executable).with_name("ray")
        self._nodes.append(
            subprocess.Popen(
                [str(ray), "start", "--node-ip-address=127.0.0.1", "--num-cpus=1", "--disable-usage-stats", "--block",
                 "--object-store-memory=100000000", *arguments],
                env={**os.environ, **self.environment, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        )  # fmt: skip

    def lose(self, number: int) -> None:
        """End a node and all that it runs at once."""
        os.killpg(self._nodes[number].pid, signal.SIGKILL)
        self._nodes[number].wait()

    def alive(self) -> int:
        """Return how many nodes are there."""
        code = (
            "import sys, ray; ray.init(sys.argv[1], log_to_driver=False); "
            "print(sum(node['Alive'] for node in ray.nodes()))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, self.address],
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        return int(done.stdout) if done.returncode == 0 else 0

    def wait(self, nodes: int) -> None:
        until = time.monotonic() + 90
        while self.alive() < nodes:
            assert time.monotonic() < until, "the cluster did not start"
            time.sleep(0.5)

    def stop(self) -> None:
        for node in reversed(self._nodes):
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)
                node.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    found = Nodes(secrets.token_hex(16))
    try:
        found.wait(1)
        yield found
    finally:
        found.stop()


@pytest.fixture
def workplace(
    tmp_path: Path, tiny_run: Callable[..., RunConfig], bert_headed_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder with a run file of the tiny model, whose paths mean nothing elsewhere."""
    shutil.copytree(bert_headed_folder, tmp_path / "model")
    run = tiny_run(["model.id=model", f"search.trials={TRIALS}", "search.workers=null", "search.stop_early=false"])
    (tmp_path / "run.yaml").write_text(run.to_yaml(), encoding="utf-8")
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def enter(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in nodes.environment.items():
        monkeypatch.setenv(name, value)


def test_a_search_outlives_a_node(nodes: Nodes, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes.grow()
    nodes.grow()
    nodes.wait(3)
    enter(nodes, monkeypatch)
    search = start_search(workplace, workplace / "out", "search.trials=16", options=("--address", nodes.address))
    said = "".join(lines_until(search, "] trial "))
    assert f"joining the cluster at {nodes.address}" in said
    nodes.lose(-1)
    candidates = ended(search, workplace / "out", 16)
    assert {c.state for c in candidates} == {"COMPLETE"}
    assert {c.score.fingerprint["id"] for c in candidates} == {machine.fingerprint()["id"]}


def test_the_same_command_goes_on_with_it(nodes: Nodes, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(nodes, monkeypatch)
    there = ("--out", "out", "--address", nodes.address)
    assert command("search", "run.yaml", *there, "--set", "search.trials=3", cwd=workplace).code == 0
    done = command("search", "run.yaml", *there, cwd=workplace)
    assert done.code == 0, done.err
    assert f"evaluating {TRIALS - 3} of {TRIALS} candidates" in done.err


def test_from_another_machine(nodes: Nodes, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("grpc", reason="Ray's client needs it")
    enter(nodes, monkeypatch)
    done = command("search", "run.yaml", "--out", "out", "--address", nodes.client_address, cwd=workplace)
    assert done.code == 0, done.err
    assert f"[  {TRIALS}/{TRIALS}] trial " in done.err


@pytest.mark.parametrize("token", [None, "0" * 32])
def test_a_cluster_lets_nobody_in_without_its_token(
    nodes: Nodes, workplace: Path, monkeypatch: pytest.MonkeyPatch, token: str | None
) -> None:
    if token is not None:
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    monkeypatch.setenv("HOME", str(workplace))  # where Ray keeps one for the user
    done = command("search", "run.yaml", "--out", "out", "--address", nodes.address, cwd=workplace)
    assert done.code == 1
    assert "token" in done.err.splitlines()[-1]
    assert not (workplace / "out" / "study.journal").exists()


def test_what_no_node_has_is_said_before_anything_is_done(
    nodes: Nodes, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(nodes, monkeypatch)
    wanted, started = "search.resources={GPU: 1, big: 2}", time.monotonic()
    done = command("search", "run.yaml", "--out", "out", "--address", nodes.address, "--set", wanted, cwd=workplace)
    assert time.monotonic() - started < 60
    assert done.code == 1
    assert "a worker takes CPU: 1, GPU: 1, big: 2, which no node has; the nodes have: CPU: 1" in done.err
    here = command("search", "run.yaml", "--out", "out", "--set", wanted, cwd=workplace)
    assert here.code == 1
    assert "which no node has" in here.err


def test_a_cluster_that_asks_nobody_for_a_token_is_refused(workplace: Path) -> None:
    open_nodes = Nodes(None)
    try:
        open_nodes.wait(1)
        there = ("search", "run.yaml", "--out", "out", "--address", open_nodes.address)
        done = command(*there, cwd=workplace)
        assert done.code == 1
        assert "asks nobody for a token" in done.err
        assert "--insecure" in done.err
        assert not (workplace / "out" / "study.journal").exists()
        accepted = command(*there, "--insecure", "--set", "search.trials=2", cwd=workplace)
        assert accepted.code == 0, accepted.err
    finally:
        open_nodes.stop()


def test_a_cluster_that_is_not_there(workplace: Path) -> None:
    done = command("search", "run.yaml", "--out", "out", "--address", f"127.0.0.1:{free_port()}", cwd=workplace)
    assert done.code == 1
    assert "no cluster answers there" in done.err


def test_insecure_is_of_clusters(workplace: Path) -> None:
    done = command("search", "run.yaml", "--insecure", cwd=workplace)
    assert done.code == 2
    assert "--insecure: goes with --address" in done.err
