"""The crew's look at its cluster, with a Ray of paper; `test_distribute.py` and `test_cluster.py` have real ones."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from autocompress import crew


class PaperRay:
    """A Ray in which no result comes until there were so many looks at its nodes."""

    exceptions = SimpleNamespace(GetTimeoutError=TimeoutError)

    def __init__(self, nodes: list[dict[str, Any]], looks: int) -> None:
        self._nodes, self._looks = nodes, looks

    def get(self, _: object, *, timeout: float) -> str:
        self._looks -= 1
        if self._looks >= 0:
            raise TimeoutError
        return "a result"

    def nodes(self) -> list[dict[str, Any]]:
        return self._nodes


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> crew._Site:
    minutes = itertools.count(0.0, 60.0)
    monkeypatch.setattr(crew.time, "monotonic", lambda: next(minutes))
    found: Any = crew._Site.__new__(crew._Site)
    found._desk = SimpleNamespace(result=SimpleNamespace(remote=lambda: "asked"))
    found._crew = SimpleNamespace(threads=2, exclusive=False, resources={"fast": 1.0}, most=5)
    return found  # type: ignore[no-any-return]


def node(*, alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"Alive": alive, "Resources": resources}


HEAD = node(CPU=0.0)


@pytest.mark.parametrize("nodes", [[HEAD, node(CPU=2.0, fast=1.0)], [node(CPU=4.0, fast=1.0)]])
def test_as_long_as_a_worker_has_a_place_its_result_is_waited_for(
    site: crew._Site, monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, Any]]
) -> None:
    monkeypatch.setattr(crew, "ray", PaperRay(nodes, looks=50))
    assert site._next_result() == "a result"


@pytest.mark.parametrize("lacking", [node(CPU=1.0, fast=1.0), node(CPU=8.0), node(alive=False, CPU=8.0, fast=1.0)])
def test_a_cluster_without_a_place_for_workers_is_not_waited_for_without_end(
    site: Any, monkeypatch: pytest.MonkeyPatch, lacking: dict[str, Any]
) -> None:
    monkeypatch.setattr(crew, "ray", PaperRay([HEAD, lacking], looks=8))
    assert site._next_result() == "a result", "it may come back"
    monkeypatch.setattr(crew, "ray", PaperRay([HEAD, lacking], looks=50))
    with pytest.raises(RuntimeError, match=r"^no node has had CPU: 2, fast: 1 for 600 s$"):
        site._next_result()
    site._crew.most = 0  # nobody is to work; a device may
    monkeypatch.setattr(crew, "ray", PaperRay([HEAD, lacking], looks=50))
    assert site._next_result() == "a result"


def test_without_any_node_there_is_nothing_to_wait_for(site: crew._Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "ray", PaperRay([node(alive=False, CPU=8.0)], looks=1))
    with pytest.raises(RuntimeError, match="no node of Ray is alive"):
        site._next_result()
