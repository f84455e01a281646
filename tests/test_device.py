"""Latency on a device: another node than accuracy, real ones on this machine, which call their CPU otherwise."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_nodes import Nodes
from test_cluster import enter, workplace
from test_search import by_number, command, lines_until, start_search

from autocompress import api, machine

pytestmark = pytest.mark.slow
__all__ = ["workplace"]

DEVICE = "search.device={device_test: 1}"
OTHER_CPU = """
import autocompress.machine as machine
real = machine.cpu()
machine.cpu = lambda: {{**real, **{changed!r}}}
"""


def add_device(nodes: Nodes, folder: Path, name: str = "device_test", **changed: object) -> None:
    folder.mkdir(exist_ok=True)
    code = OTHER_CPU.format(changed={"name": "a device", **changed})
    (folder / "sitecustomize.py").write_text(code, encoding="utf-8")
    offered = ("--num-cpus=0", "--resources", json.dumps({name: 1}))
    nodes.grow(*offered, environment={"PYTHONPATH": str(folder)})


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    found = Nodes(secrets.token_hex(16))
    try:
        found.wait()
        add_device(found, tmp_path_factory.mktemp("device"))
        yield found
    finally:
        found.stop()


def test_latency_is_measured_on_the_device(nodes: Nodes, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(nodes, monkeypatch)
    there = ("--out", "out", "--address", nodes.address, "--set", DEVICE)
    done = command("search", "run.yaml", *there, "--set", "search.confirm_pairs=2", cwd=workplace)
    assert done.code == 0, done.err
    assert "on the device" in done.err
    candidates = by_number(workplace / "out").values()
    assert {c.state for c in candidates} == {"COMPLETE"}
    assert {c.score.fingerprint["cpu"]["name"] for c in candidates} == {"a device"}
    assert all(c.score.confirmed for c in api.open_study(workplace / "out").front().points)
    environment = json.loads((workplace / "out" / "environment.json").read_text(encoding="utf-8"))
    assert environment["machine"]["cpu"]["name"] == "a device" != machine.cpu()["name"]
    # The same command finds all done, from the device's word that it is the same machine.
    again = command("search", "run.yaml", *there, "--set", "search.confirm_pairs=2", cwd=workplace)
    assert again.code == 0, again.err
    # A point is recovered as it was searched, and not without the device.
    point = ("recover", "out", "--pick", "size", "--epochs", "1")
    alone = command(*point, cwd=workplace)
    assert alone.code != 0
    assert "--address" in alone.err
    recovered = command(*point, "--address", nodes.address, "--json", cwd=workplace)
    assert recovered.code == 0, recovered.err
    found = by_number(workplace / "out")
    assert found[json.loads(recovered.out)["trial"]].score.fingerprint["cpu"]["name"] == "a device"


def test_a_device_is_of_a_cluster(workplace: Path) -> None:
    alone = command("search", "run.yaml", "--out", "out", "--set", DEVICE, cwd=workplace)
    assert (alone.code, "search.device: names nodes of a cluster; give its --address" in alone.err) == (2, True)


def test_a_search_waits_for_its_device_to_come_back_but_not_for_ever(
    nodes: Nodes, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(nodes, monkeypatch)
    options = ("--address", nodes.address)
    settings = ("search.trials=100", DEVICE, "search.device_wait=20")
    search = start_search(workplace, workplace / "out", *settings, options=options)
    list(lines_until(search, "] trial "))
    nodes.lose(-1)
    add_device(nodes, workplace / "device")
    for _ in range(3):  # what was timed before may still be on its way
        list(lines_until(search, "] trial "))
    nodes.lose(-1)
    _, said = search.communicate(timeout=300)
    assert search.returncode == 1
    assert "no node has device_test: 1 any more" in said.splitlines()[-1]
    assert "run the same command again" in said.splitlines()[-1]
    candidates = by_number(workplace / "out").values()
    assert len(candidates) >= 4
    assert {c.state for c in candidates} == {"COMPLETE"}


@pytest.mark.skipif(machine.adds_in_16_bits(), reason="weights that are made here overflow nowhere")
def test_a_device_on_which_sums_of_eight_bits_overflow_is_refused(
    nodes: Nodes, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(nodes, monkeypatch)
    add_device(nodes, workplace / "device", "device_old", features=["avx2"])
    options = ("--address", nodes.address, "--set", "search.device={device_old: 1}")
    done = command("search", "run.yaml", "--out", "out", *options, cwd=workplace)
    assert done.code == 1
    assert "the device a device adds 8-bit products in 16 bits" in done.err
