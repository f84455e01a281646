"""A search on a Ray cluster that others started: real nodes on this machine, lost, refused and left."""

from __future__ import annotations

import json
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from ftp_server import PROGRAM, served
from processes import descendants
from ray_nodes import Nodes, free_port
from test_distribute import ended
from test_search import by_number, command, lines_until, start_search

from autocompress import machine
from autocompress.config import RunConfig
from autocompress.crew import LATENCY_SLOT
from autocompress.runtimes.base import ARTIFACT_FILE

pytestmark = pytest.mark.slow

TRIALS = 8
FILES = Path(__file__).parents[1] / "docs" / "clusters"


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    found = Nodes(secrets.token_hex(16))
    try:
        found.wait()
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


def test_its_token_is_told_nobody(nodes: Nodes, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(nodes, monkeypatch)
    out, token = workplace / "out", str(nodes.token)
    search = start_search(workplace, out, "search.trials=3", options=("--address", nodes.address))
    said = "".join(lines_until(search, "] trial "))
    lines = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in [search.pid, *descendants(search.pid)]]
    rest, errors = search.communicate(timeout=120)
    assert search.returncode == 0, errors
    assert token not in said + rest + errors
    assert len(lines) > 1
    assert not [line for line in lines if token.encode() in line], "others may read command lines"
    written = [file for file in out.rglob("*") if file.is_file()]
    assert {"report.html", "environment.json", "run.yaml", "study.journal"} <= {file.name for file in written}
    assert not [file for file in written if token.encode() in file.read_bytes()]


def test_from_another_machine(nodes: Nodes, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("grpc", reason="Ray's client needs it")
    enter(nodes, monkeypatch)
    done = command("search", "run.yaml", "--out", "out", "--address", nodes.client_address, cwd=workplace)
    assert done.code == 0, done.err
    assert f"[  {TRIALS}/{TRIALS}] trial " in done.err


def test_a_driver_that_is_killed_leaves_the_cluster_free(
    nodes: Nodes, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(nodes, monkeypatch)
    for address in (nodes.address, nodes.client_address):
        out = workplace / f"out-{address.partition(':')[0]}"
        search = start_search(workplace, out, "search.trials=16", options=("--address", address))
        list(lines_until(search, "] trial "))
        search.kill()
        search.communicate()
        # It needs the places that the first one's workers had.
        again = ("--out", out, "--address", address, "--set", "search.trials=16")
        done = command("search", "run.yaml", *again, cwd=workplace)
        assert done.code == 0, done.err
        assert re.search(r"evaluating \d+ of 16 candidates", done.err), "the first was killed in the middle"
        assert len(by_number(out)) == 16


def test_a_cluster_that_loses_its_head_ends_the_search(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Nodes(secrets.token_hex(16))
    try:
        mine.wait()
        enter(mine, monkeypatch)
        search = start_search(workplace, workplace / "out", "search.trials=40", options=("--address", mine.address))
        list(lines_until(search, "] trial "))
        mine.lose(0)
        _, said = search.communicate(timeout=240)
    finally:
        mine.stop()
    assert search.returncode == 1, said
    assert "run the same command again to continue" in said.splitlines()[-1]
    told = by_number(workplace / "out")
    assert told
    # Without the cluster the same study goes on here.
    done = command("search", "run.yaml", "--out", "out", "--set", f"search.trials={len(told) + 2}", cwd=workplace)
    assert done.code == 0, done.err
    after = by_number(workplace / "out")
    assert len(after) == len(told) + 2
    assert told.keys() <= after.keys()


@pytest.mark.skipif(PROGRAM is None, reason="vsftpd is not installed")
def test_machines_without_a_common_folder_share_a_url(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    # Where nothing can be hidden from processes, all the rest is checked.
    hides = subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0
    there = tmp_path_factory.mktemp("there")
    (workplace / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(workplace / "tmp"))  # not even that is seen there
    monkeypatch.setenv("XDG_CACHE_HOME", str(workplace / "cache"))
    others = {"TMPDIR": "/tmp", "XDG_CACHE_HOME": str(there)}
    mine = Nodes(secrets.token_hex(16), unseen=workplace if hides else None, environment=others)
    with served(workplace / "shared") as url:
        try:
            mine.wait()
            mine.grow()
            enter(mine, monkeypatch)
            shared = ("storage.bank=null", f"storage.shared={url}", "search.keep_artefacts=all")
            options = ("--address", mine.address)
            search = start_search(workplace, workplace / "out", *shared, options=options)
            list(lines_until(search, "] trial "))
            search.kill()
            search.communicate()
            candidates = ended(
                start_search(workplace, workplace / "out", *shared, options=options), workplace / "out", TRIALS
            )
        finally:
            mine.stop()
    assert {c.state for c in candidates} == {"COMPLETE"}
    for candidate in candidates:
        assert (workplace / "out" / "artefacts" / candidate.plan.plan_id / ARTIFACT_FILE).exists()
    made = {file.parent.name for file in (there / "autocompress" / "bank").rglob("made_from.json")}
    assert made, "workers have a bank of their own"
    given = {file.name.removesuffix(".tar") for file in (workplace / "shared" / "bank").rglob("*.tar")}
    assert made <= given
    left = [str(file) for file in workplace.joinpath("shared", "artefacts").rglob("*.tar")]
    assert not left, "also what an interrupted search had left there"


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
        open_nodes.wait()
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


class TestFiles:
    """What docs/clusters holds, as far as it can be known without such a cluster."""

    def test_ray_up_takes_the_one_for_machines(self) -> None:
        from ray.autoscaler._private.util import prepare_config, validate_config

        given = yaml.safe_load((FILES / "ray-up.yaml").read_text(encoding="utf-8"))
        validate_config(prepare_config(given))
        for name in ("head_start_ray_commands", "worker_start_ray_commands"):
            stops, starts = given[name]
            assert stops.endswith("ray stop")
            assert starts.startswith("RAY_AUTH_MODE=token ")
            assert LATENCY_SLOT in starts
            assert "--disable-usage-stats" in starts
        assert given["min_workers"] == given["max_workers"] == len(given["provider"]["worker_ips"])

    def test_the_one_for_kubernetes_searches_behind_a_token(self) -> None:
        given = yaml.safe_load((FILES / "rayjob.yaml").read_text(encoding="utf-8"))
        cluster = given["spec"]["rayClusterSpec"]
        assert cluster["authOptions"] == {"mode": "token"}
        assert f"ray=={cluster['rayVersion']}" in (FILES.parents[1] / "constraints.txt").read_text().splitlines()
        program, verb, *options = given["spec"]["entrypoint"].split()
        assert (program, verb) == ("autocompress", "search")
        known = command("search", "--help", cwd=FILES).out
        assert {option for option in options if option.startswith("--")} <= set(re.findall(r"--[a-z]+", known))
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            # KubeRay hands it to a shell in quotes of its own.
            assert json.loads(json.loads(group["rayStartParams"]["resources"])) == {LATENCY_SLOT: 1}
            [container] = group["template"]["spec"]["containers"]
            assert container["resources"]["requests"] == container["resources"]["limits"]


def test_insecure_is_of_clusters(workplace: Path) -> None:
    done = command("search", "run.yaml", "--insecure", cwd=workplace)
    assert done.code == 2
    assert "--insecure: goes with --address" in done.err
