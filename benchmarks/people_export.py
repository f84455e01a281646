"""Export points of a front in every format and look at what comes out: ``results/benchmarks/people-export.json``.

``python benchmarks/people_export.py RESULTS`` on an idle machine, with a finished search. Random points of its front
are exported in each format. An export reloads what it wrote in a fresh process; how many of the search rows it predicts
as the artefact that was scored, what it does on the held-out test rows, and, where the runtime is the one of the
search, how far its latency ratio is from the stored one, is what this tells.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from statistics import mean

from figures import Figures

from autocompress import api
from autocompress.delivery import Export
from autocompress.errors import AutocompressError
from autocompress.exported import FORMATS, UNPACKED
from autocompress.records import Candidate
from autocompress.study import Study

POINTS = 20
AGREE, SHIFT = 0.999, 0.05


def export(figures: Figures, study: Study, chosen: list[Candidate], name: str) -> None:
    """Export points in a format and tell what comes out."""
    found: list[Export] = []
    exported: list[Candidate] = []
    refused: list[str] = []
    rows = []
    with tempfile.TemporaryDirectory(prefix="autocompress-bench-") as scratch:
        for point in chosen:
            try:
                shipped = api.export(point, Path(scratch) / str(point.number), formats=[name])[name]
            except AutocompressError as error:
                refused.append(f"trial {point.number}: {error}")
                continue
            found.append(shipped)
            exported.append(point)
            shift = shipped.measurement.latency_ratio / point.score.latency_ratio - 1 if shipped.timed else None
            test, search = shipped.test.value, shipped.measurement.accuracy
            rows.append([point.number, shipped.agreement, shift, search, test])
            print(name, *rows[-1], flush=True)
    what = f"{name}, {len(chosen)} points"
    figures.add(f"{what}: refused", len(refused), "points", "0", not refused)
    figures.more[f"{name}: refused"] = refused
    if not found:
        return
    agreed = [shipped.agreement for shipped in found]
    # Where nothing is rounded to 8 bits while it runs, floats alone are added in another order.
    plain = [a for a, point in zip(agreed, exported, strict=True) if not point.plan.integer_arithmetic]
    if plain:
        what_plain = f"{what}, of these {len(plain)} without 8-bit activations: least agreement"
        figures.add(what_plain, min(plain), "of the rows", f">= {AGREE}", min(plain) >= AGREE)
    share = mean(agreement >= AGREE for agreement in agreed)
    figures.add(f"{what}: predict at least {AGREE:.1%} of rows as scored", share, "of the points", "1", share == 1)
    figures.add(f"{what}: least agreement", min(agreed), "of the rows", f">= {AGREE}", min(agreed) >= AGREE)
    # All are scored on the same rows.
    figures.add(f"{what}: agreement of all predictions", mean(agreed), "of them", f">= {AGREE}", mean(agreed) >= AGREE)
    if FORMATS.get(name) == study.run.target.runtime:
        within = mean(abs(row[2]) <= SHIFT for row in rows)
        said = f"{what}: latency ratio within {SHIFT:.0%} of the stored one"
        figures.add(said, within, "of the points", "1", within == 1)
    figures.more[f"{name}: trial, agreement, shift of the ratio, accuracy on search rows, on test rows"] = rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="results folder of a finished search")
    parser.add_argument("--points", type=int, default=POINTS, help="fewer are printed and not written")
    parser.add_argument("--formats", nargs="+", default=[*FORMATS, *UNPACKED], choices=[*FORMATS, *UNPACKED])
    options = parser.parse_args()
    figures = Figures("people-export", "python benchmarks/people_export.py RESULTS")
    figures.read()
    study = api.open_study(options.results)
    front = study.front().points
    chosen = random.Random(0).sample(front, min(options.points, len(front)))
    for name in options.formats:
        export(figures, study, chosen, name)
        if options.points >= POINTS:
            figures.write()  # what follows may be interrupted


if __name__ == "__main__":
    main()
