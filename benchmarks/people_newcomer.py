"""Follow README as somebody with a model and a CSV of their own would: ``results/benchmarks/people-newcomer.json``.

``python benchmarks/people_newcomer.py`` clones the last commit, makes a virtual environment, and gives the commands of
README as they stand there: its installation, and what it says of one's own model and data. The model is the packaged
encoder, as a folder, and the CSV has the packaged tweets under column names that README does not know; that they have
to be named is all that is added. What comes out is then run by its own program in an environment that has nothing else.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from figures import ROOT, Figures

import autocompress
from autocompress.origins import locate

COLUMNS = {"text": "what they wrote", "label": "mood"}
MOST_COMMANDS = 4


def commands(readme: str) -> list[str]:
    """Return what README says to type, from an empty environment to an exported point."""
    two, own = (re.search(rf"^## {title}\n(?:.*\n)*?```sh\n((?:.*\n)*?)```", readme, re.MULTILINE) for title in TITLES)
    assert two is not None and own is not None, "README has both"
    named = " ".join(f"--{name} {json.dumps(column)}" for name, column in COLUMNS.items())
    init, *others = own[1].strip().splitlines()
    return [two[1].split("&&")[0].strip(), f"{init} {named}", *others]


TITLES = ("Two commands", "Your own model and data")


def own_things(folder: Path) -> int:
    """Put a model and data where README's commands look for them; returns the number of rows."""
    shutil.copytree(locate("demo/minilm"), folder / "my-model")
    rows = pd.read_csv(Path(autocompress.__file__).parent / "demo" / "tweets.csv.gz")
    with (folder / "reviews.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", *COLUMNS.values()])
        writer.writerows([number, row.text, row.label] for number, row in enumerate(rows.itertuples()))
    return len(rows)


def run(command: str, folder: Path, environment: dict[str, str]) -> tuple[float, str]:
    """Give a command to a shell; returns seconds and what it printed.

    Raises:
        SystemExit: if it fails, with the end of what it said.
    """
    print(f"$ {command}", flush=True)
    started = time.perf_counter()
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"{command} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return time.perf_counter() - started, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, help="leave the clone, with all that was made in it, here")
    options = parser.parse_args()
    figures = Figures("people-newcomer", "python benchmarks/people_newcomer.py")
    with tempfile.TemporaryDirectory(prefix="autocompress-bench-") as scratch:
        clone = options.keep or Path(scratch) / "autocompress"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        venv = Path(scratch) / "venv"
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        environment = {
            **os.environ,
            "PATH": f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "HF_HUB_OFFLINE": "1",
        }
        typed = commands((clone / "README.md").read_text(encoding="utf-8"))
        install, *others = typed
        figures.more["commands"] = typed
        figures.add("rows of the CSV", own_things(clone), "rows")
        seconds, _ = run(install, clone, environment)
        figures.add("installation", seconds / 60, "minutes")
        environment["XDG_CACHE_HOME"] = str(Path(scratch) / "cache")  # only now, so that pip may use its own
        for command in others:
            seconds, _ = run(command, clone, environment)
            figures.add(" ".join(command.split()[:2]), seconds / 60, "minutes")
        figures.add(
            "commands from nothing to an exported point",
            len(typed),
            "commands",
            f"<= {MOST_COMMANDS}",
            len(typed) <= MOST_COMMANDS,
        )
        exported = json.loads((clone / "mine" / "measurement.json").read_text(encoding="utf-8"))
        figures.add("exported point: accuracy on held-out rows", exported["test"]["value"], "share")
        times = 1 / exported["search"]["latency_ratio"]
        figures.add("exported point: times faster than the uncompressed model", times, "times")
        elsewhere = Path(scratch) / "elsewhere"
        subprocess.run([sys.executable, "-m", "venv", str(elsewhere)], check=True)
        pip = [str(elsewhere / "bin" / "pip"), "install", "-q", "-c", "constraints.txt"]
        subprocess.run([*pip, "numpy", "tokenizers", exported["runtime"]], cwd=clone, check=True)
        said = subprocess.run(
            [str(elsewhere / "bin" / "python"), "mine/predict.py", "what a lovely day", "this is the worst flight"],
            cwd=clone,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        figures.more["predict.py said"] = said.splitlines()
        known = sum(any(label in line for label in exported["labels"]) for line in said.splitlines())
        figures.add("predict.py, without this package: texts with a class", known, "texts", "2", known == 2)
    figures.write()


if __name__ == "__main__":
    main()
