"""Measure the report of a large study and take pictures of a real one: ``results/benchmarks/people-report.json``.

``python benchmarks/people_report.py [--results RESULTS]`` on an idle machine. The large study has 10,000 candidates of
encoder-joint with made-up scores, and a random search of as many beside it. A page is ready once it has drawn its first
picture and answers; the time is taken in Chromium from the start of the navigation. With ``--results``, the report of a
finished search is opened at both widths, in light and dark, and its pictures are left in ``docs/pictures``.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from engine_cost import MINILM, score_of
from figures import ROOT, Figures
from playwright.sync_api import sync_playwright

from autocompress import api
from autocompress.binding import BoundSpace, bind
from autocompress.front import Front
from autocompress.plan import CompressionPlan
from autocompress.records import Candidate
from autocompress.report.comparison import Comparison
from autocompress.report.page import Report
from autocompress.results import report_of
from autocompress.seeds import uniform_ladder
from autocompress.space import SearchSpace

CANDIDATES = 10_000
LOADS = 5
MEGABYTES, SECONDS = 10.0, 3.0
PICTURES = ROOT / "docs" / "pictures"
SIZES = {1280: 1500, 400: 2200}
"""Widths of the pictures and how much of the page they show, in pixels."""
# Lines and pictures in three dimensions are drawn by a GPU, or by what stands in for one.
FLAGS = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]


def drawn(space: BoundSpace, rng: random.Random) -> tuple[CompressionPlan, dict[str, Any]]:
    params: dict[str, Any] = {}

    def choose(name: str, choices: Any) -> Any:
        params[name] = rng.choice(choices)
        return params[name]

    return space.decode(choose), params


def candidates(space: BoundSpace, *, seed: int) -> list[Candidate]:
    """Return candidates of the space, the uniform ladder first."""
    rng, found, known = random.Random(seed), [], set()
    ladder = [(space.plan(params), params) for params in uniform_ladder(space)]
    while len(found) < CANDIDATES:
        origin = "uniform" if ladder else "sampler"
        plan, params = ladder.pop(0) if ladder else drawn(space, rng)
        if plan.plan_id in known:
            continue
        known.add(plan.plan_id)
        found.append(
            Candidate(
                number=len(found), state="COMPLETE", plan=plan, params=params, measurement=score_of(plan), origin=origin
            )
        )
    return found


def large(figures: Figures, browser: Any) -> None:
    space = bind(SearchSpace.load("encoder-joint"), MINILM, tokens=64)
    every, others = candidates(space, seed=0), candidates(space, seed=1)
    report = Report(
        title="a large study",
        front=Front.of(every, score_of(CompressionPlan(())), ("accuracy", "size_bytes", "latency")),
        candidates=every,
        environment={},
        comparison=Comparison(0.5, every, random=others),
        shape=MINILM,
    )
    with tempfile.TemporaryDirectory(prefix="autocompress-bench-") as scratch:
        file = Path(scratch) / "report.html"
        started = time.perf_counter()
        report.write(file)
        figures.add(f"report of {CANDIDATES} candidates: written in", time.perf_counter() - started, "seconds")
        size = file.stat().st_size / 1e6
        figures.add(f"report of {CANDIDATES} candidates: size", size, "MB", f"<= {MEGABYTES:g}", size <= MEGABYTES)
        ready = [ready_ms(browser, file) / 1000 for _ in range(LOADS)]
    what = f"report of {CANDIDATES} candidates: ready in Chromium, median of {LOADS}"
    found = median(ready)
    figures.add(what, found, "seconds", f"<= {SECONDS:g}", found <= SECONDS)
    figures.add(f"{what}: slowest load", max(ready), "seconds")


def ready_ms(browser: Any, file: Path) -> float:
    """Return how long a page takes in a browser that has not seen it."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    try:
        page = context.new_page()
        page.goto(file.as_uri())
        page.wait_for_selector("html[data-ready]", timeout=60_000)
        return float(page.locator("html").get_attribute("data-ready"))
    finally:
        context.close()


def pictures(browser: Any, results: Path) -> None:
    """Take pictures of a finished search's report."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="autocompress-bench-") as scratch:
        file = Path(scratch) / "report.html"
        report = report_of(api.open_study(results))
        named = (f"autocompress export results/{report.title} --trial ", *report.command[1:])
        dataclasses.replace(report, command=named).write(file)  # wherever it was kept
        for width, height in SIZES.items():
            for scheme in ("light", "dark"):
                page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
                page.goto(file.as_uri())
                page.wait_for_selector("html[data-ready]")
                page.wait_for_selector("#detail table.plan")  # which a study of before does not have
                page.wait_for_timeout(500)  # what is animated comes to rest
                clip = {"x": 0, "y": 0, "width": width, "height": height}
                page.screenshot(path=PICTURES / f"report-{width}-{scheme}.png", full_page=True, clip=clip)
                page.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, help="a finished search, of whose report pictures are taken")
    options = parser.parse_args()
    figures = Figures("people-report", "python benchmarks/people_report.py")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        large(figures, browser)
        if options.results is not None:
            pictures(browser, options.results)
        browser.close()
    figures.write()


if __name__ == "__main__":
    main()
