"""The report as people use it: in a browser, with mouse and keyboard."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers_browser import browser, opened
from helpers_records import SEARCH, front_of, make_candidate, make_reference

from autocompress.anatomy import BlockShape, ModelShape
from autocompress.decisions import LowRank, PruneHeads, PruneNeurons, Quantize
from autocompress.front import Front
from autocompress.plan import CompressionPlan
from autocompress.records import Candidate
from autocompress.report.comparison import Comparison
from autocompress.report.page import Report

pytestmark = pytest.mark.slow

MINILM = ModelShape(hidden=384, blocks=(BlockShape(heads=12, head_size=32, neurons=1536),) * 2, vocabulary=30_522)
PLAN = CompressionPlan(
    (
        ("block.0.attention", PruneHeads(keep=6)),
        ("block.0.attention", Quantize(weight_bits=8, activation_bits=8)),
        ("block.1.ffn", PruneNeurons(keep=768)),
        ("block.1.ffn", LowRank(rank=96)),
    )
)
POINTS = [dataclasses.replace(SEARCH[0], plan=PLAN), *SEARCH[1:]]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as found:
        yield found


@pytest.fixture
def page(chromium: Any) -> Iterator[Any]:
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    yield context.new_page()
    context.close()


def write(folder: Path, candidates: list[Candidate], title: str = "a search", **more: Any) -> str:
    """Write a report and return its address."""
    path = folder / "report.html"
    Report(
        title=title,
        front=front_of(candidates),
        candidates=candidates,
        environment=more.pop("environment", {}),
        shape=MINILM,
        command=("autocompress export results/a --trial ", " -o a-trial-", ""),
        **more,
    ).write(path)
    return path.as_uri()


def drawn(page: Any) -> dict[str, int]:
    """Return how many markers each part of the picture has."""
    found: dict[str, int] = page.evaluate(
        "Object.fromEntries(document.getElementById('figure-front').data.map(t => [t.name, t.x.length]))"
    )
    return found


def slide(page: Any, name: str, step: int) -> None:
    page.locator(f"#limit-{name}").evaluate(
        "(slider, step) => { slider.value = step; slider.dispatchEvent(new Event('input')); }", step
    )


def test_limits_filter_the_front_and_count_it(page: Any, tmp_path: Path) -> None:
    errors = opened(page, write(tmp_path, POINTS))
    count = page.locator("#count")
    assert "3 points of the front, 5 measured candidates, of which 1 break a constraint" in count.text_content()
    assert drawn(page)["Pareto front"] == 3
    slide(page, "latency", 1)  # the second fastest of 4.0, 12.8 and 14.4 ms
    assert page.locator("#limit-latency-value").text_content() == "12.8 ms"
    assert "2 of 3 points of the front and 2 of 5 candidates keep to the limits." in count.text_content()
    assert drawn(page)["Pareto front"] == 3, "those beyond are only faint"
    page.locator("#only").check()
    assert drawn(page)["Pareto front"] == 2
    assert "other candidates" not in drawn(page)
    slide(page, "drop", 0)
    assert "1 of 3 points" in count.text_content()
    assert "fastest: trial 0" in count.text_content()
    page.locator("#reset").click()
    assert "3 points of the front, 5 measured" in count.text_content()
    assert page.locator("#limit-latency-value").text_content() == "any"
    assert errors == []


def test_limits_name_the_points_that_pick_would_take(page: Any, tmp_path: Path) -> None:
    tied = [
        make_candidate(0, accuracy=0.87, ratio=0.12345678, size_bytes=40_123_456),
        make_candidate(1, accuracy=0.87, ratio=0.11345678, size_bytes=50_000_000),
        make_candidate(2, accuracy=0.85, ratio=0.05, size_bytes=60_000_000),
    ]
    opened(page, write(tmp_path, tied))
    slide(page, "latency", 2)
    for wish, name in (("accuracy", "most accurate"), ("latency", "fastest"), ("size", "smallest")):
        said = page.locator("#limit-latency-value").text_content().removesuffix(" ms")
        number = front_of(tied).pick(prefer=wish, max_latency_ms=float(said)).number  # type: ignore[arg-type]
        assert f"{name}: trial {number}" in page.locator("#count").text_content()
    slide(page, "size", 0)
    said = page.locator("#limit-size-value").text_content().removesuffix(" MB")
    assert front_of(tied).pick(max_size_mb=float(said)).number == 0


def test_a_click_on_a_marker_shows_the_point(page: Any, tmp_path: Path) -> None:
    errors = opened(page, write(tmp_path, POINTS))
    assert page.locator("#detail h3").text_content() == "Trial 0", "the first that is recommended"
    x, y = page.evaluate(
        """() => {
          const plot = document.getElementById("figure-front"), box = plot.getBoundingClientRect();
          const trace = plot.data.find(t => t.name === "Pareto front"), n = trace.customdata.indexOf(2);
          const {xaxis, yaxis} = plot._fullLayout;
          const across = xaxis.type === "log" ? Math.log10(trace.x[n]) : trace.x[n];
          return [box.left + xaxis._offset + xaxis.c2p(xaxis.type === "log" ? trace.x[n] : across),
                  box.top + yaxis._offset + yaxis.c2p(trace.y[n])];
        }"""
    )
    page.mouse.move(x, y)
    page.wait_for_selector("#figure-front .hoverlayer .hovertext")
    page.mouse.click(x, y)
    page.wait_for_function("document.querySelector('#detail h3').textContent === 'Trial 2'")
    said = page.locator("#detail").text_content()
    assert "83.0 % (80.5 to 85.2)" in said
    assert "lost on the same rows5.0 points (4.0 to 6.0)" in said
    assert "6.0x smaller" in said
    assert "more accurate: trial 1" in said
    assert page.locator("#command").input_value() == "autocompress export results/a --trial 2 -o a-trial-2"
    assert page.url.endswith("#trial-2")
    assert drawn(page)["selected"] == 1
    assert errors == []


def test_a_point_is_reached_by_keyboard_and_by_address(page: Any, tmp_path: Path) -> None:
    address = write(tmp_path, POINTS)
    opened(page, address)
    page.locator("table [data-trial='1']").focus()
    page.keyboard.press("Enter")
    assert page.locator("#detail h3").text_content() == "Trial 1"
    page.locator("#limit-size").focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator("#limit-size-value").text_content() == "40 MB"
    opened(page, f"{address}#trial-2")
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert page.locator("#detail h3").text_content() == "Trial 2"


def test_a_plan_is_drawn_block_by_block(page: Any, tmp_path: Path) -> None:
    opened(page, write(tmp_path, POINTS))
    rows = page.locator("#detail table.plan tbody tr").all()
    cells = [[cell.text_content() for cell in row.locator("td").all()] for row in rows]
    assert cells == [
        ["6", "full", "w8a8", "1536", "full", "w32"],
        ["12", "full", "w32", "768", "96", "w32"],
    ]
    shares = [cell.evaluate("cell => cell.style.getPropertyValue('--share')") for cell in rows[0].locator("td").all()]
    assert shares == ["35%", "70%", "42%", "70%", "70%", "70%"]
    failed = page.locator("#candidates tr", has_text="logits: not finite").locator("button")
    failed.click()
    assert "logits: not finite" in page.locator("#detail .failure").text_content()
    assert page.locator("#command").count() == 0, "there is nothing to export"
    page.locator("#candidates button", has_text="3").click()
    assert "not on the front" in page.locator("#detail").text_content()
    assert page.locator("#command").input_value() == "autocompress export results/a --trial 3 -o a-trial-3"


def test_axes_can_be_chosen_and_there_are_three_dimensions(page: Any, tmp_path: Path) -> None:
    errors = opened(page, write(tmp_path, POINTS))
    title = "document.getElementById('figure-front').layout"
    page.locator("#axis-x").select_option("smaller")
    assert page.evaluate(f"{title}.xaxis.title.text") == "times smaller"
    front = "document.getElementById('figure-front').data.find(t => t.name === 'Pareto front')"
    assert sorted(page.evaluate(f"{front}.x")) == pytest.approx([2.25, 3, 6])
    assert page.evaluate(f"{front}.error_x") is None, "a size has no interval"
    page.locator("#solid").check()
    assert page.evaluate(f"{front}.type") == "scatter3d"
    assert page.evaluate(f"{front}.error_y.array.length") == 3
    assert page.evaluate(f"{title}.scene.zaxis.title.text") == "size, MB"
    page.locator("#solid").uncheck()
    page.locator("#log").check()
    assert page.evaluate(f"{title}.xaxis.type") == "log"
    assert errors == []


@pytest.mark.parametrize("axis", ["accuracy", "latency", "size"])
def test_an_axis_has_labels_whatever_it_spans(page: Any, tmp_path: Path, axis: str) -> None:
    opened(page, write(tmp_path, POINTS))
    page.locator("#log").check()
    page.locator("#axis-x").select_option(axis)
    labels = page.locator("#figure-front .xaxislayer-above .xtick").all_text_contents()
    assert len(labels) >= 2


def test_what_an_axis_cannot_show_is_said(page: Any, tmp_path: Path) -> None:
    known = [
        dataclasses.replace(c, measurement=dataclasses.replace(c.score, divergence=None if c.number else 0.1))
        for c in POINTS
        if c.measurement is not None
    ]
    opened(page, write(tmp_path, known))
    assert page.locator("#thinned").text_content() == ""
    page.locator("#axis-y").select_option("divergence")
    shown = drawn(page)
    assert page.locator("#thinned").text_content() == (
        " 4 candidates have no such number, or none that an axis can show."
    )
    assert "other candidates" not in shown
    assert shown["Pareto front"] == 1


def test_the_command_is_copied_and_if_not_then_it_says_so(page: Any, tmp_path: Path) -> None:
    page.add_init_script(
        "Object.defineProperty(navigator, 'clipboard', {value: {writeText: async (text) => { window.copied = text; }}})"
    )
    opened(page, write(tmp_path, POINTS))
    page.locator(".command button").click()
    assert page.locator(".command button").text_content() == "Copied"
    assert page.evaluate("window.copied") == page.locator("#command").input_value()
    page.evaluate(
        """() => {
          navigator.clipboard.writeText = async () => { throw new Error("not allowed"); };
          document.execCommand = () => false;
        }"""
    )
    page.locator("#candidates button").first.click()
    page.locator(".command button").click()
    page.wait_for_function("document.querySelector('.command button').textContent === 'Selected'")


@pytest.mark.parametrize(
    ("objectives", "titles"),
    [
        (("accuracy", "size_bytes", "latency"), ["latency, ms (median)", "accuracy, %", "size, MB"]),
        (("accuracy", "size_bytes"), ["size, MB", "accuracy, %", "latency, ms (median)"]),
        (("divergence", "peak_memory", "latency"), ["latency, ms (median)", "divergence, nats", "memory, MB"]),
    ],
)
def test_axes_follow_the_objectives(page: Any, tmp_path: Path, objectives: tuple[str, ...], titles: list[str]) -> None:
    points = [
        dataclasses.replace(
            c, measurement=dataclasses.replace(c.score, divergence=c.number / 100, peak_memory_bytes=10**7 + c.number)
        )
        for c in POINTS
        if c.measurement is not None
    ]
    path = tmp_path / "report.html"
    front = Front.of(points, make_reference(), objectives)
    Report(title="a", front=front, candidates=points, environment={}).write(path)
    errors = opened(page, path.as_uri())
    plot = "document.getElementById('figure-front')"
    assert page.evaluate(f"[{plot}.layout.xaxis.title.text, {plot}.layout.yaxis.title.text]") == titles[:2]
    colours = f"{plot}.data.find(t => t.name === 'Pareto front').marker.colorbar.title.text"
    assert page.evaluate(colours) == titles[2]
    assert errors == []


def test_limits_hold_for_the_random_search_too(page: Any, tmp_path: Path) -> None:
    opened(page, write(tmp_path, POINTS, comparison=Comparison(0.5, POINTS, random=POINTS)))
    assert drawn(page)["random search's front"] == 3
    slide(page, "latency", 0)
    assert drawn(page)["random search's front"] == 3, "they are shown unless only what keeps to the limits is"
    page.locator("#only").check()
    assert drawn(page)["random search's front"] == 1


def test_the_keyboard_stays_where_what_it_pressed_has_gone(page: Any, tmp_path: Path) -> None:
    many = [make_candidate(n, accuracy=0.7 + 0.0001 * n, ratio=0.2 + 0.0001 * n) for n in range(150)]
    opened(page, write(tmp_path, many))
    page.locator("#detail .near button").first.press("Enter")
    assert page.evaluate("document.activeElement === document.querySelector('#detail h3')")
    page.locator("#more").press("Enter")
    assert page.evaluate("document.activeElement.closest('#candidates') !== null")


def test_a_page_before_anything_is_measured_has_its_axes(page: Any, tmp_path: Path) -> None:
    errors = opened(page, write(tmp_path, [make_candidate(0, state="FAIL")]))
    assert [page.locator(f"#axis-{axis}").input_value() for axis in "xyz"] == ["latency", "accuracy", "size"]
    assert errors == []


def test_on_a_logarithmic_axis_what_is_nothing_is_left_out(page: Any, tmp_path: Path) -> None:
    many = [
        dataclasses.replace(c, measurement=dataclasses.replace(c.score, divergence=c.number % 1000 / 10_000))
        for c in (make_candidate(n, accuracy=0.8 - 0.00005 * n, ratio=0.2 + 0.0001 * n) for n in range(2000))
    ]
    errors = opened(page, write(tmp_path, many))
    page.locator("#axis-x").select_option("divergence")
    page.locator("#log").check()
    assert drawn(page)["other candidates"] > 50
    assert errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_is_kept_of_a_block_can_be_read(chromium: Any, tmp_path: Path, scheme: str) -> None:
    page = chromium.new_page(viewport={"width": 1280, "height": 900}, color_scheme=scheme)
    try:
        opened(page, write(tmp_path, POINTS))
        contrasts = page.evaluate(
            """() => {
              const numbers = (colour) => {
                const found = colour.match(/[\\d.]+/g).map(Number).slice(0, 3);
                return colour.startsWith("color(") ? found : found.map((v) => v / 255);
              };
              const light = (colour) => {
                const [r, g, b] = numbers(colour).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
              };
              return [...document.querySelectorAll("td.heat")].map((cell) => {
                const style = getComputedStyle(cell);
                const [low, high] = [light(style.color), light(style.backgroundColor)].sort((a, b) => a - b);
                return (high + 0.05) / (low + 0.05);
              });
            }"""
        )
        assert len(contrasts) == 12
        assert min(contrasts) >= 4.5, "WCAG 2.2, 1.4.3"
    finally:
        page.close()


def test_every_picture_is_drawn_when_it_is_seen(page: Any, tmp_path: Path) -> None:
    many = [
        make_candidate(n, accuracy=0.7 + 0.004 * n, ratio=0.2 + 0.02 * n, params={"ffn.bits.0": 8 if n % 2 else 4})
        for n in range(30)
    ]
    many = [dataclasses.replace(c, span=(c.number, c.number + 1.5)) for c in many]
    comparison = Comparison(0.5, many, random=many[:10])
    errors = opened(page, write(tmp_path, many, comparison=comparison))
    assert "random search's front" in drawn(page)
    for name in ("volume", "volume-time", "parallel", "importance"):
        page.locator(f"#figure-{name}").scroll_into_view_if_needed()
        page.wait_for_selector(f"#figure-{name} .plot-container")
    assert errors == []


@pytest.mark.parametrize(("width", "scheme"), itertools.product((1280, 400), ("light", "dark")))
def test_it_fits_any_screen_in_light_and_dark(chromium: Any, tmp_path: Path, width: int, scheme: str) -> None:
    page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    try:
        errors = opened(page, write(tmp_path, POINTS, comparison=Comparison(0.5, POINTS)))
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 24, 31)")
        text = page.evaluate("document.getElementById('figure-front').layout.font.color")
        assert text == ("#1c2430" if scheme == "light" else "#e4e9f0")
        assert errors == []
    finally:
        page.close()


def test_nothing_from_outside_strikes(page: Any, tmp_path: Path) -> None:
    strike = """</script></style></title><img src=x onerror="document.body.dataset.struck=1">"""
    (tmp_path / "bare.html").write_text(f"<!doctype html><title>a</title><body>{strike}", encoding="utf-8")
    page.goto((tmp_path / "bare.html").as_uri())
    page.wait_for_function("document.body.dataset.struck === '1'", timeout=5000)  # it does where nothing is done
    plan = CompressionPlan(((strike, PruneNeurons(keep=2)),))
    candidates = [
        make_candidate(0, plan=plan, params={strike: strike}, origin=strike),
        make_candidate(1, plan=plan, ratio=0.7),
        make_candidate(2, state=strike, failure=strike, plan=plan),
        make_candidate(3, state="FAIL", failure=strike, plan=plan),
        *(make_candidate(4 + n, plan=plan, ratio=0.8 + 0.001 * n, params={strike: n % 2}) for n in range(30)),
    ]
    opened(
        page,
        write(
            tmp_path,
            candidates,
            strike,
            environment={strike: {strike: [strike]}},
            notes=[strike],
            comparison=Comparison(0.5, candidates, predictor={strike: 0.5}),
        ),
    )
    for button in page.locator("#candidates button").all()[:4]:
        button.click()
    for name in ("volume", "parallel", "importance"):
        page.locator(f"#figure-{name}").scroll_into_view_if_needed()
        page.wait_for_selector(f"#figure-{name} .plot-container")
    assert strike in page.locator("#detail").text_content()
    assert page.evaluate("document.body.dataset.struck") is None
    assert page.locator("img").count() == 0


def test_thousands_of_candidates_are_thinned_and_listed_on_demand(page: Any, tmp_path: Path) -> None:
    many = [
        make_candidate(n, accuracy=0.6 + 0.25 * (n % 7) / 7, size_bytes=20_000_000 + 5000 * n, ratio=0.2 + 0.0001 * n)
        for n in range(3000)
    ]
    path = tmp_path / "report.html"
    opened(page, write(tmp_path, many))
    assert path.stat().st_size < 10e6
    assert drawn(page)["other candidates"] < 3000
    assert "lie under others that are drawn" in page.locator("#thinned").text_content()
    assert page.locator("#candidates tr").count() == 100
    page.locator("#more").click()
    assert page.locator("#candidates tr").count() == 3000
