"""What every benchmark writes: named figures with their targets, the command, the commit and the machine."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path

from autocompress import machine

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "results" / "benchmarks"


@dataclass
class Figure:
    """One measured figure; ``target`` is a bound in words, ``holds`` whether the value meets it."""

    name: str
    value: float
    unit: str
    interval: list[float] | None
    target: str
    holds: bool
    commit: str = ""
    cpu: dict[str, object] | None = None
    """On which it was measured, where that is not the file's."""
    extremes: list[float] | None = None
    """The smallest and the largest of what the value sums up, which is no interval."""


@dataclass
class Figures:
    """The figures of one benchmark, written to ``results/benchmarks/<name>.json``.

    Args:
        name: of the file.
        command: that reproduces them.
    """

    name: str
    command: str
    figures: list[Figure] = field(default_factory=list)
    more: dict[str, object] = field(default_factory=dict)
    """Tables behind the figures, written beside them."""

    def add(
        self,
        name: str,
        value: float,
        unit: str,
        target: str = "reported",
        holds: bool = True,
        interval: list[float] | None = None,
        extremes: list[float] | None = None,
    ) -> None:
        """Add a figure, in place of one of the same name, and print it."""
        figure = Figure(name, float(value), unit, interval, target, bool(holds), commit(), extremes=extremes)
        known = [n for n, old in enumerate(self.figures) if old.name == name]
        if known:
            self.figures[known[0]] = figure
        else:
            self.figures.append(figure)
        spread = "" if interval is None else f" [{interval[0]:.6g}, {interval[1]:.6g}]"
        print(f"{'ok  ' if holds else 'MISS'} {name}: {value:.6g}{spread} {unit} (target: {target})", flush=True)

    @property
    def file(self) -> Path:
        return FOLDER / f"{self.name}.json"

    def read(self) -> None:
        """Start from the figures that are already on file, so that a part can be measured anew."""
        if self.file.exists():
            content = json.loads(self.file.read_text(encoding="utf-8"))
            known = {"commit": content["commit"], "cpu": content["fingerprint"]["cpu"]}
            self.figures = [Figure(**{**known, **figure}) for figure in content["figures"]]
            self.more = content.get("more", {})

    def write(self) -> None:
        """Write the file."""
        fingerprint = machine.fingerprint()
        figures = [asdict(figure) for figure in self.figures]
        for figure in figures:
            if figure["cpu"] in (None, fingerprint["cpu"]):
                del figure["cpu"]
            if figure["extremes"] is None:
                del figure["extremes"]
        content = {
            "figures": figures,
            "command": self.command,
            "commit": commit(),
            "fingerprint": fingerprint,
            **({"more": self.more} if self.more else {}),
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {self.file.relative_to(ROOT)}")


def commit() -> str:
    """Return the commit that is measured; with a plus if the tree differs from it."""
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=no", "autocompress"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
