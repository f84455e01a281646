"""Serve the report of a study while its search runs: on loopback, and nothing but that one page.

The page asks for the version of what it shows and loads itself anew when there is another. Requests for other hosts'
names are refused: a page from elsewhere could have a name of its own lead here (DNS rebinding).
"""

from __future__ import annotations

import dataclasses
import html
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from autocompress import __version__
from autocompress.errors import AutocompressError, ConfigError
from autocompress.results import STAGE, report_of
from autocompress.study import Study

HOST = "127.0.0.1"
_NAMES = (HOST, "localhost")
_WAIT_S = 5
"""Between two looks of a page that waits for the first candidate."""
_WRITTEN = ("study.csv", "report.html", "environment.json", STAGE)
"""Files that a search writes as it goes on."""


class Live:
    """The report of a results folder as it stands, made anew when the search has written something.

    Args:
        folder: results folder of a search.
        open_study: opens it for reading.
    """

    def __init__(self, folder: Path, open_study: Callable[[Path], Study]) -> None:
        self._folder, self._open = folder, open_study
        self._lock = threading.Lock()
        self._made: tuple[str, str] | None = None

    def version(self) -> str:
        """Return what changes with the study."""
        found = []
        for name in _WRITTEN:
            try:
                about = (self._folder / name).stat()
            except OSError:
                continue
            found.append(f"{about.st_mtime_ns:x}-{about.st_size:x}")
        return ".".join(found)

    def page(self) -> str:
        """Return the report; while there is nothing to show, a page that says so and looks again."""
        with self._lock:  # of several that ask at once, one makes it
            version = self.version()
            if self._made is None or self._made[0] != version:
                try:
                    self._made = version, self._make(version)
                except AutocompressError as error:  # asked again, it may be mended
                    return _waiting(str(error))
            return self._made[1]

    def _make(self, version: str) -> str:
        with closing(self._open(self._folder)) as study:
            report = report_of(study)
        said = f"{study.finished} of {study.run.search.trials} candidates at {time.strftime('%H:%M:%S')}; "
        try:
            said += f"what is left to do: {(self._folder / STAGE).read_text(encoding='utf-8')}."
        except OSError:  # a search that has ended, perhaps since its space holds no others, or has that before it
            ended = study.finished >= study.run.search.trials
            said = "" if ended else f"{said}where a search goes on, this page follows."
        return dataclasses.replace(report, standing=said, version=version).html()


def _waiting(reason: str) -> str:
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="{_WAIT_S}">'
        f"<title>autocompress</title></head><body><p>Nothing to show yet: {html.escape(reason)}</p></body></html>"
    )


def server_of(live: Live, port: int) -> ThreadingHTTPServer:
    """Return a server of one page on the loopback address; ``serve_forever`` runs it.

    Args:
        live: what it serves.
        port: 0 for one that is free.

    Raises:
        ConfigError: if the port cannot be had.
    """

    class Handler(BaseHTTPRequestHandler):
        server_version = f"autocompress/{__version__}"
        sys_version = ""
        timeout = 30

        def do_GET(self) -> None:
            # Browsers leave out the port 80.
            if (self.headers.get("Host") or "").rsplit(":", 1)[0] not in _NAMES:
                self.send_error(HTTPStatus.FORBIDDEN)
                return
            path = self.path.partition("?")[0]
            if path == "/":
                self._say("text/html; charset=utf-8", live.page())
            elif path == "/version":
                self._say("text/plain; charset=utf-8", live.version())
            else:
                self.send_error(HTTPStatus.NOT_FOUND)

        def _say(self, kind: str, text: str) -> None:
            body = text.encode("utf-8", errors="replace")
            self.send_response(HTTPStatus.OK)
            for name, value in (
                ("Content-Type", kind),
                ("Content-Length", str(len(body))),
                ("Cache-Control", "no-store"),
                ("X-Content-Type-Options", "nosniff"),
                ("X-Frame-Options", "DENY"),
            ):
                self.send_header(name, value)
            with suppress(ConnectionError):  # the page was closed meanwhile
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Keep the terminal for what matters."""

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise ConfigError(f"--port: {port} cannot be had ({error.strerror}); 0 takes one that is free") from None
    except OverflowError:
        raise ConfigError(f"--port: must be within 0..65535, got {port}") from None
