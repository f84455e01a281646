"""Write the measured figures into README.md and docs, and draw README's pictures, from what the benchmarks wrote.

``python benchmarks/readme.py [--chromium /usr/bin/chromium | --tables]``. Pictures are screenshots of plotly's figures
in headless Chromium; no figure is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from held_out import DATA
from plotly.subplots import make_subplots

from autocompress.config import RunConfig
from autocompress.front import CLOSE, Front
from autocompress.plan import CompressionPlan
from autocompress.records import Candidate, Measurement
from autocompress.report.figures import dress, front_figure

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "results" / "benchmarks"
TOOLS = "search-against-tools"
RUNTIMES = {"openvino": "OpenVINO", "onnxruntime": "ONNX Runtime"}
TOOL_NAMES = {"nncf": "NNCF", "onnxruntime": "ONNX Runtime's quantisation", "olive": "Olive, random search"}
ALIKE = "quantised alone"
"""Ours where it does no more than the tools were used for."""
SHOWN = (78, 89)
"""Accuracies that the picture of tools shows, in %."""
COLOURS = {
    "autocompress": "#1f77b4",
    f"autocompress, {ALIKE}": "#7fb3d5",
    "NNCF": "#e08a1e",
    "ONNX Runtime's quantisation": "#d1495b",
    "Olive, random search": "#7a5195",
}
HEADER = ("| what | measured | 95 % interval | target | |", "|---|---|---|---|---|")
DEMO = "search-demo"
FRONTS = ("methods-front", "methods-front-avx2")
METHODS = {
    "methods-ablation": "without any training",
    "methods-vocabulary": "without any training",
    "methods-recovery": "each way trained once, for the same passes unless it says otherwise",
}
"""Tables of methods and their plain counterparts, and how they were made."""
OPTIONS = {
    "pruning": ("methods-ablation", "% of (heads|neurons): "),
    "rank": ("methods-ablation", "^rank "),
    "bits": ("methods-ablation", r"(bits|w\da8): "),
    "vocabulary": ("methods-vocabulary", ""),
    "reconstruction": ("methods-ablation", "reconstructed"),
    "recovery": ("methods-recovery", ""),
}
"""Parts of the page of options: the table that tells their effect, and which of its methods."""
LEFT_OUT = "methods-left-out"
PLANS = "methods-plans"
JOINT = "methods-joint"
ESTIMATORS, ROUNDS = ("latency-estimators", "latency-estimators-shared"), (4, 6, 12)
PEOPLE = ("people-export", "people-newcomer", "people-report")
COST, SHARED, VOLUME = "search-cost", "search-cost-shared", "search-hypervolume"
SEARCH = (COST, VOLUME, TOOLS, "search-rungs", "search-engine-cost")
_OVER = (
    "{}, 200 evaluations, 5 seeds: hypervolume over {}",
    "{}, 200 evaluations, 5 seeds: as accurate as the best of its candidates for no bytes and no time, over {}",
)
_BEST = ("{}, {}, best of {} times {}", "{}, {}, best of {} times {}: retained on test rows")
_AIMS = (
    ("without training", "4", "faster"),
    ("without training", "12", "smaller"),
    ("of both searches", "6", "faster, recovered"),
    ("of both searches", "10", "faster, recovered"),
)
_DEMO_WORDS = (
    "main job, from an empty bank to report.html",
    "fastest point of the front within 1 point of accuracy",
    "smallest point within 1 point of accuracy",
)
SUMMARY = {
    DEMO: (
        *_DEMO_WORDS,
        "evaluated candidates",
        "kill -9: finished candidates lost",
    ),
    COST: (
        "first front of 5 points",
        "empty bank: 200 candidates",
        "empty bank: 200 candidates, over the Trainer",
        "warm bank, another seed: 200 candidates",
        "warm bank, another seed: 200 candidates, over the Trainer",
        "front timed anew: within 5 % of the stored ratio",
        "latency predictor, 50 held-out candidates: mean absolute error",
    ),
    VOLUME: tuple(
        name.format(data, over)
        for data in DATA
        for over in ("random search's", "the uniform ladder's")
        for name in _OVER
    ),
    TOOLS: tuple(
        name
        for runtime in RUNTIMES
        for name in (
            f"{runtime}: our hypervolume over the best tool's",
            f"{runtime}: the same on the held-out test rows",
            f"{runtime}, ours, quantised alone (encoder-bits): hypervolume over the best tool's",
        )
    ),
    FRONTS[0]: tuple(name.format(data, *aim) for data in DATA for aim in _AIMS for name in _BEST),
    "cluster-kills": ("kills of a worker", "kills of a driver", "finished candidates lost"),
}
"""What README shows of each benchmark: what was aimed at, also where it falls short."""


class _Named(CompressionPlan):
    """A plan known by its words only, as a CSV file has it."""

    def __init__(self, said: str) -> None:
        super().__init__()
        object.__setattr__(self, "said", said)

    def words(self) -> str:
        return str(self.said)  # type: ignore[attr-defined]


def candidates(run: Path, reference: Measurement) -> list[Candidate]:
    """Read the ``study.csv`` of a committed run back into candidates."""
    found = []
    for row in pd.read_csv(run / "study.csv").to_dict("records"):
        if row["state"] != "COMPLETE":
            continue
        score: dict[str, Any] = {k: row[k] for k in row if k in Measurement.__dataclass_fields__}
        rest = {"loss": 0.0, "rows": reference.rows, "reference_ms": reference.latency_ms, "predictions": ""}
        measured = Measurement(**{**rest, **score})
        told = {"number": row["number"], "feasible": bool(row["feasible"]), "plan": _Named(row["plan"])}
        found.append(Candidate(state="COMPLETE", measurement=measured, **told))
    return found


def picture(run: Path, chromium: str) -> None:
    """Draw ``front.png`` of a committed run."""
    reference = Measurement.from_json(json.dumps(json.loads((run / "environment.json").read_text())["reference"]))
    every = candidates(run, reference)
    front = Front.of(every, reference, RunConfig.from_file(run / "run.yaml").objectives)
    figure = front_figure(front, [c for c in every if c not in front.points])
    figure.update_layout(width=1100, height=640)
    shoot(figure, run / "front.png", chromium)


def shoot(figure: go.Figure, file: Path, chromium: str) -> None:
    """Write a figure as PNG."""
    width, height = figure.layout.width + 20, figure.layout.height + 20
    with tempfile.TemporaryDirectory() as scratch:
        page = Path(scratch) / "figure.html"
        figure.write_html(page, include_plotlyjs=True, config={"displayModeBar": False})
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={scratch}/profile"]
        flags += [f"--window-size={width},{height}", "--hide-scrollbars", "--virtual-time-budget=8000"]
        subprocess.run([chromium, *flags, f"--screenshot={file}", page.as_uri()], check=True, timeout=120)


def tools_picture(chromium: str) -> None:
    """Draw ``against-tools.png``: our fronts and the points of other tools, accuracy over speed."""
    more = contents(TOOLS)["more"]
    figure = make_subplots(cols=2, shared_yaxes=True, horizontal_spacing=0.03, subplot_titles=list(RUNTIMES.values()))
    largest = max(point["size_bytes"] for point in more["points"])
    for column, runtime in enumerate(RUNTIMES, start=1):
        points = [p for p in more["points"] if p["runtime"] == runtime]
        groups = {
            TOOL_NAMES[tool]: [
                (p["accuracy"], p["size_bytes"], p["latency_ratio"]) for p in points if p["tool"] == tool
            ]
            for tool in sorted({p["tool"] for p in points})
        }
        groups |= fronts_of(more, runtime)
        for name, group in groups.items():
            figure.add_trace(
                go.Scatter(
                    name=name,
                    legendgroup=name,
                    showlegend=column == 1 or name not in {trace.name for trace in figure.data},
                    x=[1 / ratio for _, _, ratio in group],
                    y=[100 * accuracy for accuracy, _, _ in group],
                    mode="markers",
                    marker={
                        "size": [size for _, size, _ in group],
                        "sizemode": "area",
                        "sizeref": 2 * largest / 26**2,
                        "sizemin": 3,
                        "color": COLOURS[name],
                        "opacity": 0.8,
                        "line": {"width": 1, "color": "#33363b"},
                    },
                ),
                row=1,
                col=column,
            )
    dress(figure, height=520)
    figure.update_layout(width=1100, margin={"t": 80}, legend={"y": 1.08})
    figure.update_xaxes(
        title="times faster than the uncompressed model, marker area is size",
        type="log",
        range=[math.log10(0.45), math.log10(60)],
        tickvals=[0.5, 1, 2, 5, 10, 20, 50],
    )
    figure.update_yaxes(title="accuracy, %", range=list(SHOWN), col=1)
    shoot(figure, FIGURES / "against-tools.png", chromium)


def fronts_of(more: Mapping[str, Any], runtime: str) -> dict[str, list[tuple[float, float, float]]]:
    """Return our fronts that stand beside those of other tools, each as accuracy, bytes and ratio."""
    return {
        "autocompress": more[f"{runtime}: our front, accuracy, bytes and ratio"],
        f"autocompress, {ALIKE}": more[f"{runtime}: our front, {ALIKE}"],
    }


def tools_table() -> str:
    """Return the fastest and the smallest model of every tool that lose at most a point of accuracy."""
    content = contents(TOOLS)
    more = content["more"]
    lines = ["| | fastest that loses at most 1 point | smallest that loses at most 1 point |", "|---|---|---|"]
    for runtime, name in RUNTIMES.items():
        points = [p for p in more["points"] if p["runtime"] == runtime]
        accuracy, size_bytes = more[f"{runtime}: uncompressed, accuracy and bytes"]
        names = ("accuracy", "size_bytes", "latency_ratio")
        fronts = fronts_of(more, runtime)
        groups = {name: [dict(zip(names, row, strict=True)) for row in front] for name, front in fronts.items()}
        groups |= {TOOL_NAMES[t]: [p for p in points if p["tool"] == t] for t in sorted({p["tool"] for p in points})}
        for tool, group in groups.items():
            close = [p for p in group if p["accuracy"] >= accuracy - CLOSE - 1e-9]
            if not close:
                lines.append(f"| {name}: {tool} | none | none |")
                continue
            fastest, smallest = (min(close, key=lambda p: p[key]) for key in ("latency_ratio", "size_bytes"))
            cells = [
                f"{1 / fastest['latency_ratio']:.1f}x faster, {_beside(fastest)}",
                f"{size_bytes / smallest['size_bytes']:.1f}x smaller, {_beside(smallest)}",
            ]
            lines.append(f"| {name}: {tool} | {' | '.join(cells)} |")
    ours = [row[0] for runtime in RUNTIMES for front in fronts_of(more, runtime).values() for row in front]
    theirs = [point["accuracy"] for point in more["points"]]
    hidden, others = (sum(100 * accuracy < SHOWN[0] for accuracy in each) for each in (ours, theirs))
    said = (
        f"{measured_on(content)}. Accuracy is on the search rows, on which both sides chose; that of the uncompressed "
        f"model is {accuracy:.1%}. Of our {len(ours)} points {hidden} lie below the picture, of the tools' "
        f"{len(theirs)} points {others}. Reproduce with `{content['command']}` "
        f"([as JSON](results/benchmarks/{TOOLS}.json))."
    )
    return "\n".join([said, "", *lines])


def _beside(point: Mapping[str, float]) -> str:
    return f"{point['size_bytes'] / 1e6:.1f} MB, {point['accuracy']:.1%}"


def cpu_words(cpu: dict[str, Any]) -> str:
    """Say what kind of processor it is."""
    return f"{cpu['cores']} cores of {cpu['name']} ({', '.join(cpu['features'])})"


def measured_on(content: dict[str, Any]) -> str:
    """Say on what the figures of a benchmark were taken."""
    cpu, versions = content["fingerprint"]["cpu"], content["fingerprint"]["versions"]
    others = dict.fromkeys(cpu_words(figure["cpu"]) for figure in content["figures"] if "cpu" in figure)
    return (
        f"Measured on {', and in part on '.join([cpu_words(cpu), *others])} with OpenVINO "
        f"{versions['openvino']}, ONNX Runtime {versions.get('onnxruntime', '-')} and torch {versions['torch']}"
    )


def rows(content: dict[str, Any], *, with_target: bool = False, only: Sequence[str] | None = None) -> list[str]:
    """Return a benchmark's figures as rows of a table: those of some names, those with a target, or all of them."""
    found = []
    for figure in content["figures"]:
        if figure["name"] not in only if only is not None else with_target and figure["target"] == "reported":
            continue
        low, high = figure["interval"] or figure.get("extremes") or ("", "")
        interval = f"{low:.4g} to {high:.4g}" if low != "" else ""
        interval += "" if figure["interval"] or not interval else ", the least and the most"
        mark = "" if figure["target"] == "reported" else ("holds" if figure["holds"] else "**falls short**")
        value = f"{figure['value']:.4g} {figure['unit']}"
        found.append(f"| {figure['name']} | {value} | {interval} | {figure['target']} | {mark} |")
    return found


def contents(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FIGURES / f"{name}.json").read_text(encoding="utf-8"))
    return found


def names_of(name: str) -> list[str]:
    """Return what the figures of a benchmark are called."""
    return [figure["name"] for figure in contents(name)["figures"]]


def table(name: str, *, with_target: bool = False) -> str:
    """Return a benchmark's figures, or those that have a target, as Markdown, with how to reproduce them."""
    content = contents(name)
    said = f"{measured_on(content)}; {reproduced(name)}."
    return "\n".join([said, "", *HEADER, *rows(content, with_target=with_target)])


def reproduced(name: str) -> str:
    """Say how a benchmark is run again, and where its figures are, for a page in docs."""
    return f"reproduce with `{contents(name)['command']}` ([as JSON](../results/benchmarks/{name}.json))"


def grouped(benchmarks: Mapping[str, Sequence[str] | None], *, up: str) -> str:
    """Return figures that have a target or are named, benchmark by benchmark.

    Args:
        benchmarks: the names of their figures that are shown, None for all.
        up: the way from the page to the repository's root.
    """
    lines, first = [*HEADER], contents(next(iter(benchmarks)))
    for name, only in benchmarks.items():
        content = contents(name)
        if lost := {*(only or ())} - {figure["name"] for figure in content["figures"]}:
            raise SystemExit(f"{name}.json: has no figure {', '.join(sorted(lost))}")
        cpu = content["fingerprint"]["cpu"]
        where = "" if cpu == first["fingerprint"]["cpu"] else f" on {cpu_words(cpu)}"
        shown = [figure for figure in content["figures"] if only is None or figure["name"] in only]
        commits = dict.fromkeys(figure["commit"][:7] for figure in shown if figure.get("commit"))
        how = f"[as JSON]({up}results/benchmarks/{name}.json), of {', '.join(commits) or content['commit'][:7]}"
        lines.append(f"| **`{content['command']}`**{where} ({how}) | | | | |")
        lines += rows(content, with_target=True, only=only)
    return "\n".join([f"{measured_on(first)}, where no other CPU is named.", "", *lines])


def methods_table(file: str, how: str, only: str = "") -> str:
    """Return what compression methods gain over their plain counterparts, a data set beside the other.

    Args:
        file: of the benchmark.
        how: they were made.
        only: pattern of the methods that are shown.
    """
    content = contents(file)
    figures = {figure["name"]: figure for figure in content["figures"]}
    parts = [name.split(", ", 2) for name in figures if name.endswith(": accuracy gained")]
    data = list(dict.fromkeys(part[0] for part in parts))
    methods = [method for method in dict.fromkeys(part[1] for part in parts) if re.search(only, method)]
    heads = [f"{name}: accuracy gained, test rows | divergence, search / test" for name in data]
    lines = [f"| at no more bytes | {' | '.join(heads)} |"]
    lines.append(f"|---|{'---|---|' * len(data)}")
    for method in methods:
        cells = []
        for name in data:
            gained = figures.get(f"{name}, {method}, test rows: accuracy gained")
            if gained is None:  # not measured there
                cells.append(" | ")
                continue
            low, high = (100 * end for end in gained["interval"])
            left = [
                figures[f"{name}, {method}, {split} rows: divergence from the full model"]["value"]
                for split in ("search", "test")
            ]
            cells.append(
                f"{100 * gained['value']:+.1f} points [{low:+.1f}, {high:+.1f}] | {left[0]:.2f} / {left[1]:.2f}"
            )
        lines.append(f"| {method} | {' | '.join(cells)} |")
    said = f"{measured_on(content)}, {how}, accuracy with paired bootstrap intervals"
    return "\n".join([f"{said}; {reproduced(file)}.", "", *lines])


def joint_table() -> str:
    """Return what the joint search has over searches of one axis, the best of each data set first."""
    content = contents(JOINT)
    figures = {figure["name"]: figure for figure in content["figures"]}
    over = ": the joint search's hypervolume over it"
    volumes = {name.removesuffix(over): figure for name, figure in figures.items() if name.endswith(over)}
    lines = [
        "| joint search over that of | hypervolume | points met at no more cost | accuracy gained there, test rows |",
        "|---|---|---|---|",
    ]
    for name, volume in sorted(volumes.items(), key=lambda item: (item[0].split(", ")[0], item[1]["value"])):
        cells = [f"{volume['value']:.2f} times", "", ""]
        share = figures.get(f"{name}: points that the joint front has one for")
        gained = figures.get(f"{name}: accuracy gained there, test rows, mean")
        if share is not None:
            cells[1] = f"{share['value']:.0%} {share['unit'].removeprefix('share ')}"
        if gained is not None:
            low, high = (100 * end for end in gained["interval"])
            cells[2] = f"{100 * gained['value']:+.1f} points [{low:+.1f}, {high:+.1f}] in the mean"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    said = f"{measured_on(content)}, without any training, as many candidates for each search or all that a space has"
    return "\n".join([f"{said}; {reproduced(JOINT)}.", "", *lines])


def estimators_table(name: str) -> str:
    """Return how far latency ratios differ between processes, by what is made of the runs and how many there are."""
    content = contents(name)
    figures = {figure["name"]: figure for figure in content["figures"]}
    over = ": ratio over that of lower quartiles"
    lines = [
        f"| | ratio | {' | '.join(f'{rounds} pairs: differs by (time)' for rounds in ROUNDS)} |",
        f"|---|---|{'---|' * len(ROUNDS)}",
    ]
    for way in [name.removesuffix(over) for name in figures if name.endswith(over)]:
        cells = [f"{figures[way + over]['value']:.3f}"]
        for rounds in ROUNDS:
            of = f"{way}, {rounds} rounds of 1: "
            apart, spent = figures[f"{of}standard deviation between processes"], figures[f"{of}what is run takes"]
            low, high = (100 * end for end in apart["interval"])
            cells.append(f"{apart['value']:.1%} [{low:.1f}, {high:.1f}] ({1e3 * spent['value']:.0f} ms)")
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join([f"{measured_on(content)}; {reproduced(name)}.", "", *lines])


def demo_words() -> str:
    """Say in a sentence how long the first command takes, and what comes of it."""
    content = contents(DEMO)
    values = {figure["name"]: float(figure["value"]) for figure in content["figures"]}
    job, fastest, smallest = (values[name] for name in _DEMO_WORDS)
    points, installed = values["points on the front"], values["installation of .[demo], package cache warm"]
    cpu = content["fingerprint"]["cpu"]
    return (
        f"On {cpu['cores']} cores of {cpu['name']} the search takes {job:.0f} minutes, and installing what was "
        f"downloaded before {installed / 60:.0f} more. Of the {points:.0f} points of its front, those within one point "
        f"of the uncompressed model's accuracy are up to **{fastest:.1f} times faster** or **{smallest:.0f} times "
        "smaller** ([all figures](#measured))."
    )


def put(page: Path, parts: Mapping[str, str]) -> None:
    """Write parts of a page between the marks of their names."""
    text = page.read_text(encoding="utf-8")
    for name, part in parts.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        text = f"{text.split(begin)[0]}{begin}\n{part}\n{end}{text.split(end)[1]}"
    page.write_text(text, encoding="utf-8")


def tables() -> None:
    """Fill the tables of all pages."""
    methods = [methods_table(file, how) for file, how in METHODS.items() if (FIGURES / f"{file}.json").exists()]
    methods += [joint_table()] if (FIGURES / f"{JOINT}.json").exists() else []
    put(ROOT / "README.md", {"demo": demo_words(), "summary": grouped(SUMMARY, up=""), "tools": tools_table()})
    put(
        ROOT / "docs" / "results.md",
        {
            "figures": table(DEMO),
            "search": grouped({**dict.fromkeys(SEARCH), TOOLS: names_of(TOOLS)}, up="../"),
            "shared": table(SHARED, with_target=True),
            "plans": table(PLANS),
            "people": grouped({name: None for name in PEOPLE if (FIGURES / f"{name}.json").exists()}, up="../"),
            "front": "\n\n".join(table(name, with_target=True) for name in FRONTS),
            "methods": "\n\n".join(methods),
            "left-out": methods_table(LEFT_OUT, "in torch, without any training"),
        },
    )
    effects = {name: methods_table(file, METHODS[file], only) for name, (file, only) in OPTIONS.items()}
    put(ROOT / "docs" / "options.md", effects | {"joint": joint_table()})
    put(
        ROOT / "docs" / "scoring.md",
        {
            "estimators": "\n\n".join(
                estimators_table(name) for name in ESTIMATORS if (FIGURES / f"{name}.json").exists()
            )
        },
    )
    clusters = [table(file.stem) for file in sorted(FIGURES.glob("cluster-*.json"))]
    put(ROOT / "docs" / "clusters.md", {"cluster": "\n\n".join(clusters)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--tables", action="store_true", help="fill the tables only, and draw nothing")
    options = parser.parse_args()
    if not options.tables:
        for file in sorted((ROOT / "results").glob("*/README.md")):
            picture(file.parent, options.chromium)
        tools_picture(options.chromium)
    tables()


if __name__ == "__main__":
    main()
