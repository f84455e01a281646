"""Lose a node of three in the middle of a search: ``results/benchmarks/cluster-nodes.json``.

``python benchmarks/cluster_nodes.py`` starts Ray nodes of one core on this machine and searches on the demo twice: on
three nodes of which one is killed with all that it runs, and on three that live. The first plans of a search are the
uniform ones, whatever is found: the plans of both are the same, and their scores can be compared one by one.
"""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

from figures import ROOT, Figures
from ray_nodes import Nodes

from autocompress import api
from autocompress.records import Candidate

CANDIDATES = 24
LOST_AFTER = 8
"""Candidates that are told before the node goes."""


def searched(nodes: Nodes, folder: Path, lose: int | None) -> dict[str, Candidate]:
    """Search on the nodes; returns the candidates by plan."""
    settings = [f"search.trials={CANDIDATES}", "search.stop_early=false", "search.skip_behind=false"]
    settings.append(f"storage.bank={folder.parent / 'bank'}")
    process = subprocess.Popen(
        [sys.executable, "-m", "autocompress.cli", "search", "demo", "--out", str(folder), "--address", nodes.address]
        + [part for setting in settings for part in ("--set", setting)],
        cwd=ROOT,
        env={**os.environ, **nodes.environment, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if lose is not None and re.search(rf"\[ *{LOST_AFTER}/", line):
            nodes.lose(lose)
    if process.wait() != 0:
        raise SystemExit(f"the search ended with {process.returncode}")
    return {c.plan.plan_id: c for c in api.open_study(folder).candidates()}


def agree(one: Candidate, other: Candidate) -> bool:
    """Say whether two scores of a plan differ by no more than their intervals."""
    a, b = one.score, other.score
    latency = a.latency_ratio_low <= b.latency_ratio_high and b.latency_ratio_low <= a.latency_ratio_high
    return a.accuracy == b.accuracy and a.size_bytes == b.size_bytes and latency


def main() -> None:
    figures = Figures("cluster-nodes", "python benchmarks/cluster_nodes.py")
    found = []
    with tempfile.TemporaryDirectory(prefix="autocompress-bench-") as scratch:
        for name, lose in (("disturbed", -1), ("undisturbed", None)):
            nodes = Nodes(secrets.token_hex(16))
            try:
                nodes.wait()
                nodes.grow()
                nodes.grow()
                found.append(searched(nodes, Path(scratch) / name, lose))
                alive = nodes.alive()
            finally:
                nodes.stop()
            wanted = 2 if lose is not None else 3
            figures.add(f"{name}: nodes in the end", alive, "nodes", f"{wanted}", alive == wanted)
            done = sum(c.state == "COMPLETE" for c in found[-1].values())
            figures.add(f"{name}: complete candidates", done, "candidates", f"{CANDIDATES}", done == CANDIDATES)
        disturbed, undisturbed = found
        fronts = [api.open_study(Path(scratch) / name).front().points for name in ("disturbed", "undisturbed")]
        ids = [{c.plan.plan_id for c in points} for points in fronts]
        both = ids[0] | ids[1]
        same = sum(agree(disturbed[p], undisturbed[p]) for p in both if p in disturbed and p in undisturbed)
        figures.add(
            "plans of either search that the other has, too", len(disturbed.keys() & undisturbed.keys()), "plans"
        )
        figures.add("points on either front", len(both), "points")
        figures.add("points on both fronts", len(ids[0] & ids[1]), "points")
        figures.add(
            "points on either front whose scores agree within their intervals",
            same,
            "points",
            f">= {0.95:.0%} of them",
            same >= 0.95 * len(both),
        )
    figures.write()


if __name__ == "__main__":
    main()
