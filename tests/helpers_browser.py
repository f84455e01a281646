"""A real browser for tests that look at a page as people do."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

# Pictures of lines and those in three dimensions are drawn by a GPU, or by what stands in for one.
_ARGUMENTS = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]


@contextmanager
def browser() -> Iterator[Any]:
    """Yield a Chromium of Playwright's, or skip the test where none is installed."""
    from playwright.sync_api import sync_playwright

    found = shutil.which("chromium")
    if found is None:
        pytest.skip("Chromium is not installed")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=_ARGUMENTS)
        try:
            yield opened
        finally:
            opened.close()


def opened(page: Any, address: str) -> list[str]:
    """Open a report, wait until it is drawn, and return a list that errors are added to."""
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(address)
    page.wait_for_selector("html[data-ready]", timeout=60_000)
    return errors
