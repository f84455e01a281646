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
from statistics import median

from figures import ROOT, Figures
from ray_nodes import Nodes

from autocompress import api
from autocompress.records import Candidate

CANDIDATES = 24
LOST_AFTER = 8
"""Candidates that are told before the node goes."""
AGREEING = 0.95
"""Share of points that are to agree: that of intervals which hold what they are intervals of."""


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


def same(one: Candidate, other: Candidate) -> bool:
    """Say whether accuracy and size of a plan, which no measurement blurs, are the same."""
    return one.score.accuracy == other.score.accuracy and one.score.size_bytes == other.score.size_bytes


def apart(one: Candidate, other: Candidate) -> float:
    """Return by which share two latency ratios of a plan differ beyond their intervals, 0 where these overlap."""
    a, b = one.score, other.score
    gap = max(a.latency_ratio_low - b.latency_ratio_high, b.latency_ratio_low - a.latency_ratio_high)
    return max(0.0, gap / min(a.latency_ratio, b.latency_ratio))


def half_width(candidate: Candidate) -> float:
    """Return half of what the interval of a latency ratio spans, as a share of it."""
    score = candidate.score
    return (score.latency_ratio_high - score.latency_ratio_low) / (2 * score.latency_ratio)


def difference(one: Candidate, other: Candidate) -> float:
    """Return by which share two latency ratios of a plan differ."""
    first, second = one.score.latency_ratio, other.score.latency_ratio
    return abs(first - second) / min(first, second)


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
        pairs = [(disturbed[p], undisturbed[p]) for p in sorted(both) if p in disturbed and p in undisturbed]
        gaps = [apart(one, other) for one, other in pairs]
        figures.add(
            "plans of either search that the other has, too", len(disturbed.keys() & undisturbed.keys()), "plans"
        )
        figures.add("points on either front", len(both), "points")
        figures.add("points on both fronts", len(ids[0] & ids[1]), "points")
        for what, count, share in (
            ("accuracy and size are the same", sum(same(*pair) for pair in pairs), 1.0),
            ("latencies agree within their intervals", gaps.count(0.0), AGREEING),
        ):
            aim = f">= {share:.0%} of them"
            figures.add(f"points on either front whose {what}", count, "points", aim, count >= share * len(both))
        figures.add("largest gap between the intervals of a point's two latencies", max(gaps, default=0.0), "share")
        differences = [difference(*pair) for pair in pairs]
        widths = [half_width(candidate) for pair in pairs for candidate in pair]
        figures.add("difference of a point's two latencies, median", median(differences), "share")
        figures.add("half of what an interval of theirs spans, median", median(widths), "share")
    figures.write()


if __name__ == "__main__":
    main()
