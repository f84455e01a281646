"""The report while a search runs: one page on loopback that follows."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers_browser import browser, opened
from test_results import MAJORITY, made_study

from autocompress import api
from autocompress.errors import ConfigError
from autocompress.results import write_results


def ask(address: str, path: str = "/", *, host: str | None = None, method: str = "GET") -> tuple[int, str, str]:
    """Return status, body and type of an answer."""
    port = int(address.rstrip("/").rpartition(":")[2])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, headers={} if host is None else {"Host": host})
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), answer.headers.get("Content-Type", "")
    finally:
        connection.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The results of a study that has 6 of the 8 candidates that are wanted."""
    study = made_study(tmp_path / "results", majority=MAJORITY)
    write_results(study)
    text = (study.folder / "run.yaml").read_text(encoding="utf-8")
    (study.folder / "run.yaml").write_text(text.replace("trials: 6", "trials: 8"), encoding="utf-8")
    return study.folder


@pytest.fixture
def address(folder: Path) -> Iterator[str]:
    with api.serve(folder) as found:
        yield found


def test_it_serves_the_report_with_how_far_the_search_is(address: str) -> None:
    status, text, kind = ask(address)
    assert (status, kind) == (200, "text/html; charset=utf-8")
    assert "<h1>made</h1>" in text
    assert "6 of 8 candidates at " in text
    _, version, _ = ask(address, "/version")
    assert f'"version":"{version}"' in text


def test_a_finished_search_says_nothing_of_its_standing(tmp_path: Path) -> None:
    study = made_study(tmp_path / "results", majority=MAJORITY)
    write_results(study)
    with api.serve(study.folder) as address:
        assert 'class="standing"' not in ask(address)[1]


def test_what_a_search_does_after_its_last_candidate_is_said(tmp_path: Path) -> None:
    study = made_study(tmp_path / "results", majority=MAJORITY)
    write_results(study)
    stage = study.folder / "stage.txt"
    with api.serve(study.folder) as address:
        versions = [ask(address, "/version")[1]]
        stage.write_text("timing the front anew", encoding="utf-8")
        assert "; what is left to do: timing the front anew." in ask(address)[1]
        versions.append(ask(address, "/version")[1])
        stage.unlink()
        assert "what is left to do" not in ask(address)[1]
    assert versions[0] != versions[1]


def test_a_search_that_went_no_further_is_not_said_to_go_on(address: str) -> None:
    assert re.search(r"6 of 8 candidates at [\d:]{8}; where a search goes on, this page follows\.", ask(address)[1])


def test_it_is_said_where_the_space_holds_fewer_than_were_asked_for(address: str, folder: Path) -> None:
    (folder / "stage.txt").write_text("timing the front anew", encoding="utf-8")
    assert re.search(r"6 of 8 candidates at [\d:]{8}; what is left to do: timing the front anew\.", ask(address)[1])


def test_what_is_written_gives_another_version(address: str, folder: Path) -> None:
    first = ask(address, "/version")[1]
    assert ask(address, "/version")[1] == first
    with (folder / "study.csv").open("a", encoding="utf-8") as file:
        file.write("\n")
    second = ask(address, "/version")[1]
    assert second != first
    assert f'"version":"{second}"' in ask(address)[1]


def test_what_could_not_be_shown_is_asked_for_again(address: str, folder: Path) -> None:
    run, aside = folder / "run.yaml", folder / "aside.yaml"
    run.rename(aside)
    assert "Nothing to show yet" in ask(address)[1]
    aside.rename(run)  # of which the version knows nothing
    assert "<h1>made</h1>" in ask(address)[1]


@pytest.mark.parametrize("path", ["/run.yaml", "/../run.yaml", "/%2e%2e/run.yaml", "/version/", "/study.journal"])
def test_nothing_else_is_served(address: str, path: str) -> None:
    assert ask(address, path)[0] == 404


@pytest.mark.parametrize("host", ["example.com", "example.com:80", "127.0.0.1.example.com:80", "localhost.", ""])
def test_another_hosts_name_is_refused(address: str, host: str) -> None:
    status, text, _ = ask(address, host=host)
    assert status == 403
    assert "<h1>made</h1>" not in text


def test_localhost_is_this_host(address: str) -> None:
    for host in ("localhost:1", "127.0.0.1", "localhost"):
        assert ask(address, host=host)[0] == 200


def test_there_is_nothing_to_be_changed(address: str) -> None:
    assert ask(address, method="POST")[0] == 501


def test_it_listens_on_loopback_alone(address: str) -> None:
    port = int(address.rstrip("/").rpartition(":")[2])
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
    # Of the addresses of this host, all of 127.0.0.0/8 lead to a socket that listens everywhere.
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", port), timeout=5).close()


def test_before_the_reference_is_measured_the_page_waits(folder: Path) -> None:
    (folder / "environment.json").unlink()
    with api.serve(folder) as address:
        text = ask(address)[1]
    assert "Nothing to show yet" in text
    assert 'http-equiv="refresh"' in text


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_is_none_is_refused(folder: Path, port: int) -> None:
    with pytest.raises(ConfigError, match=r"--port: must be within 0\.\.65535"), api.serve(folder, port=port):
        pass


def test_a_port_that_is_taken_is_refused(folder: Path, address: str) -> None:
    port = int(address.rstrip("/").rpartition(":")[2])
    with pytest.raises(ConfigError, match=f"--port: {port} cannot be had"), api.serve(folder, port=port):
        pass


@pytest.mark.slow
def test_the_command_serves_until_it_is_interrupted(folder: Path) -> None:
    command = [sys.executable, "-m", "autocompress.cli", "status", str(folder), "--serve", "--port", "0"]
    serving = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
        # As at a terminal: what a script starts in the background would ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert serving.stderr is not None
        line = serving.stderr.readline()
        address = next(word for word in line.split() if word.startswith("http://"))
        assert "<h1>made</h1>" in ask(address)[1]
        serving.send_signal(signal.SIGINT)
        out, _ = serving.communicate(timeout=30)
    finally:
        serving.kill()
        serving.wait()
    assert serving.returncode == 0
    assert "wanted: 8" in out


@pytest.mark.slow
def test_a_page_that_is_open_follows_as_it_was_left(folder: Path, address: str) -> None:
    with browser() as chromium:
        page = chromium.new_page()
        errors = opened(page, address)
        page.locator("#axis-x").select_option("size")
        page.locator("#only").check()
        page.locator("#limit-size").focus()
        page.keyboard.press("Home")
        limit = page.locator("#limit-size-value").text_content()
        page.evaluate("window.before = true")
        page.evaluate("document.querySelector('.tall').scrollTop = 7")
        at = page.evaluate("document.querySelector('.tall').scrollTop")
        with (folder / "study.csv").open("a", encoding="utf-8") as file:
            file.write("\n")
        page.wait_for_function("window.before === undefined", timeout=30_000)
        page.wait_for_selector("html[data-ready]")
        assert page.locator("#axis-x").input_value() == "size"
        assert page.evaluate("document.getElementById('figure-front').layout.xaxis.title.text") == "size, MB"
        assert page.locator("#only").is_checked()
        assert page.locator("#limit-size-value").text_content() == limit != "any"
        assert page.evaluate("document.activeElement.id") == "limit-size"
        assert page.evaluate("document.querySelector('.tall').scrollTop") == at
        assert errors == []


@pytest.mark.slow
@pytest.mark.parametrize("place", ["#best-fastest", "#chosen", "#copy"])
def test_the_keyboard_stays_on_what_is_made_anew(folder: Path, address: str, place: str) -> None:
    with browser() as chromium:
        page = chromium.new_page()
        errors = opened(page, address)
        page.locator(place).focus()
        page.evaluate("window.before = true")
        with (folder / "study.csv").open("a", encoding="utf-8") as file:
            file.write("\n")
        page.wait_for_function("window.before === undefined", timeout=30_000)
        page.wait_for_selector("html[data-ready]")
        assert page.evaluate("document.activeElement.id") == place[1:]
        assert errors == []


@pytest.mark.slow
def test_another_study_in_the_same_place_is_another_page(folder: Path, address: str) -> None:
    with browser() as chromium:
        page = chromium.new_page()
        errors = opened(page, address)
        kept = {"fields": {"axis-x": "memory"}, "limits": {"latency": 0.001}, "scroll": 0, "within": []}
        page.evaluate(
            "(kept) => sessionStorage.setItem('report autocompress export other --trial ', kept)", json.dumps(kept)
        )
        page.reload()
        page.wait_for_selector("html[data-ready]")
        assert page.locator("#limit-latency-value").text_content() == "any"
        # Nor does an axis that this study has not measured.
        own = page.evaluate("`report ${JSON.parse(document.getElementById('data').textContent).command[0]}`")
        page.evaluate("([own, kept]) => sessionStorage.setItem(own, kept)", [own, json.dumps({**kept, "limits": {}})])
        page.reload()
        page.wait_for_selector("html[data-ready]")
        assert page.locator("#axis-x").input_value() == "latency"
        assert errors == []


@pytest.mark.slow
def test_a_page_that_nobody_serves_any_more_says_so(folder: Path) -> None:
    with browser() as chromium:
        page = chromium.new_page()
        with api.serve(folder) as address:
            opened(page, address)
        page.wait_for_function(
            "document.querySelector('.standing').textContent.includes('Nobody serves')", timeout=30_000
        )
