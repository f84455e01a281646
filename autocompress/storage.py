"""Where a study's records stand: in a journal file in its results folder, or in a PostgreSQL database."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, RDBStorage

from autocompress.errors import StudyError, first_line, quoted
from autocompress.journal import Journal, repair_tail

JOURNAL, DATABASE = "study.journal", "study.json"
"""Files of a results folder: the records, or the database that holds them."""
DATABASE_SCHEMA = 1
_IN_JOURNAL = "autocompress"
"""Name of the one study in a journal."""
_LET_GO_S = 5.0
"""Time within which a database learns that a driver was killed, and lets its study go."""


class Records:
    """A study's records, open."""

    storage: BaseStorage
    name: str
    """Of the study in the storage."""
    where: str
    """Words for messages."""
    repaired: Path | None = None
    """The file as it was, if a torn end was cut off."""

    def names(self) -> list[str]:
        """Return the names of all studies in the storage."""
        raise NotImplementedError

    def batch(self) -> AbstractContextManager[None]:
        """Return what joins records that belong together, as far as the storage can."""
        return nullcontext()

    def close(self) -> None:
        """Let others have it."""


def holds_study(folder: Path) -> bool:
    """Say whether a results folder has a study; a journal of nothing is what a killed driver had begun."""
    return any((folder / name).exists() and (folder / name).stat().st_size > 0 for name in (JOURNAL, DATABASE))


def open_records(folder: Path, url: str | None, *, name: str, writable: bool) -> Records:
    """Open the records of a results folder; begins them if they are to be written.

    Args:
        folder: the results folder.
        url: of the database that new records go to; None for a journal.
        name: of the run.
        writable: repair a journal, keep other drivers off a database.

    Raises:
        StudyError: if there are none to read, if they cannot be read, or stand elsewhere than ``url`` says.
    """
    file = folder / DATABASE
    if file.exists():
        known = _database_of(file)
        if url is not None and url != known["database"]:
            raise StudyError(f"{folder}: this study is in {known['database']}, not in {url}; use another --out")
        return _Database(known["database"], known["study"], writable)
    if url is None:
        return _Journal(folder, writable)
    if (folder / JOURNAL).exists():
        raise StudyError(f"{folder}: this study is in its {JOURNAL}; leave out storage.study or use another --out")
    if not writable:
        raise StudyError(f"{folder}: holds no study yet")
    # Several folders may have runs of one name in a database.
    found = _Database(url, f"{name}-{secrets.token_hex(8)}", writable)
    content = {"schema": DATABASE_SCHEMA, "database": url, "study": found.name}
    aside = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    aside.write_text(json.dumps(content, indent=1), encoding="utf-8")
    aside.replace(file)
    return found


def _database_of(file: Path) -> dict[str, Any]:
    try:
        known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if known["schema"] != DATABASE_SCHEMA:
            raise StudyError(f"{file}: schema must be {DATABASE_SCHEMA}, got {known['schema']!r}")
        return {"database": str(known["database"]), "study": str(known["study"])}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise StudyError(f"{file}: cannot be read ({error})") from None


class _Journal(Records):
    """Records in a file of the results folder."""

    name = _IN_JOURNAL

    def __init__(self, folder: Path, writable: bool) -> None:
        journal = folder / JOURNAL
        self._folder, self.where = folder, str(journal)
        if not writable and not journal.exists():
            raise StudyError(f"{folder}: holds no {JOURNAL}; run: autocompress search RUN --out {quoted(folder)}")
        self.repaired = repair_tail(journal) if writable else None
        try:
            self.storage = self._journal = Journal(journal)
        except (ValueError, TypeError, LookupError, OSError) as error:
            raise self._unreadable(error) from None

    def names(self) -> list[str]:
        try:
            return optuna.get_all_study_names(self.storage)
        except (ValueError, TypeError, LookupError, OSError) as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: Exception) -> StudyError:
        return StudyError(
            f"{self.where}: cannot be read ({first_line(error)}); what can be is written into a new file by: "
            f"autocompress salvage {quoted(self._folder)}"
        )

    def batch(self) -> AbstractContextManager[None]:
        return self._journal.batch()


class _Database(Records):
    """Records in a PostgreSQL database, each in a transaction of its own.

    The lock that keeps other drivers off is the server's, and ends with the connection, whatever happens to the driver:
    those of files do not hold between machines on every file system.
    """

    def __init__(self, url: str, name: str, writable: bool) -> None:
        import sqlalchemy

        self.name, self.where = name, url
        self._held: Any = None
        try:
            target = sqlalchemy.make_url(url).set(drivername="postgresql+psycopg")
            self.storage = self._storage = RDBStorage(target.render_as_string(), engine_kwargs={"pool_pre_ping": True})
            if writable:
                self._hold()
        except (sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
            raise self._unreachable(error) from None

    def _unreachable(self, error: Exception) -> StudyError:
        if isinstance(error, ImportError):
            return StudyError(f'{self.where}: no driver is installed; run: pip install "autocompress[postgresql]"')
        met = error.__cause__ or error  # Optuna says only that something was met
        reason = str(getattr(met, "orig", None) or met).strip().splitlines()[0]
        return StudyError(f"{self.where}: cannot be reached ({reason})")

    @contextmanager
    def batch(self) -> Iterator[None]:
        import sqlalchemy

        try:
            yield
        except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError) as error:
            raise self._unreachable(error) from None

    def _hold(self) -> None:
        import sqlalchemy

        key = int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "big", signed=True)
        self._held = self._storage.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        asked, until = sqlalchemy.text("SELECT pg_try_advisory_lock(:key)"), time.monotonic() + _LET_GO_S
        while not self._held.execute(asked, {"key": key}).scalar():
            if time.monotonic() > until:
                self.close()
                raise StudyError(f"{self.where}: another search drives the study {self.name}; wait for it")
            time.sleep(0.1)

    def names(self) -> list[str]:
        import sqlalchemy

        try:
            return optuna.get_all_study_names(self.storage)
        except sqlalchemy.exc.SQLAlchemyError as error:
            raise self._unreachable(error) from None

    def close(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None
        self._storage.engine.dispose()
