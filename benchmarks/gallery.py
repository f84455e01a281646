"""Make the runs that are kept in ``results/``, each from an empty bank, on an idle machine.

``python benchmarks/gallery.py``; then ``python benchmarks/readme.py`` draws their pictures. README's run comes from
``search_demo.py``, which measures it, too.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from figures import ROOT

KEPT = ("run.yaml", "study.csv", "pareto.csv", "report.html", "environment.json")
RUNS = {
    "minilm-tweets-onnxruntime": (
        *("--data", "demo/tweets", "--set", "target.runtime=onnxruntime"),
        *("--set", "search.recover=4", "--set", "baselines=[random]"),
    ),
}
"""Options of `autocompress search demo` by the folder of what it found."""


def keep(results: Path, folder: Path) -> None:
    """Copy what a search tells; what names the folder that it was made in names one of README's."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        text = (results / name).read_text(encoding="utf-8")
        (folder / name).write_text(text.replace(str(results), "results/demo"), encoding="utf-8")


def make(name: str) -> None:
    with tempfile.TemporaryDirectory(prefix="autocompress-bench-") as scratch:
        results = Path(scratch) / "demo"
        command = [sys.executable, "-m", "autocompress.cli", "search", "demo", "--out", str(results), *RUNS[name]]
        environment = {**os.environ, "XDG_CACHE_HOME": f"{scratch}/cache", "HF_HUB_OFFLINE": "1"}
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        keep(results, ROOT / "results" / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=RUNS, help="make this one")
    only = parser.parse_args().only
    for name in [only] if only else RUNS:
        make(name)


if __name__ == "__main__":
    main()
