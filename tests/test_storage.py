"""Where records stand: each storage keeps what Optuna promises, and a results folder knows where its study is."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pytest
import sqlalchemy
from optuna.storages import BaseStorage, RDBStorage
from optuna.testing.pytest_storages import StorageTestCase
from test_search import command
from test_study import SMALL, evaluate, results_in, run_of, score_of

from autocompress.config import RunConfig
from autocompress.errors import ConfigError, StudyError
from autocompress.identity import identity_of
from autocompress.journal import Journal
from autocompress.storage import DATABASE, JOURNAL, holds_study
from autocompress.study import Study


class TestJournal(StorageTestCase):
    """What Optuna asks of any storage."""

    @pytest.fixture
    def storage(self, tmp_path: Path) -> BaseStorage:
        return Journal(tmp_path / JOURNAL)


@pytest.mark.slow
class TestPostgreSQL(StorageTestCase):
    """The same, of the server that is tested with."""

    @pytest.fixture
    def storage(self, postgresql: str) -> Iterator[BaseStorage]:
        found = RDBStorage(postgresql.replace("postgresql:", "postgresql+psycopg:"))
        for study in found.get_all_studies():
            found.delete_study(study._study_id)
        yield found
        found.engine.dispose()


def opened(folder: Path, *overrides: str) -> Study:
    run = run_of(*overrides)
    identity = identity_of(run, model="m", data="d", space=SMALL)
    return Study(folder, run, identity=identity, space=SMALL, writable=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return results_in(tmp_path / "results")


@pytest.mark.slow
class TestDatabase:
    def test_a_folder_knows_where_its_study_is(self, folder: Path, postgresql: str) -> None:
        study = opened(folder, f"storage.study={postgresql}")
        told = evaluate(study)
        study.close()
        assert {path.name for path in folder.iterdir()} == {"environment.json", "study.lock", DATABASE}
        assert holds_study(folder)
        for run in (run_of(), run_of(f"storage.study={postgresql}")):
            assert [c.number for c in Study(folder, run).candidates()] == [c.number for c in told]

    def test_studies_of_one_name_do_not_mix(self, tmp_path: Path, postgresql: str) -> None:
        studies = [opened(results_in(tmp_path / name), f"storage.study={postgresql}") for name in ("one", "other")]
        evaluate(studies[0], 2)
        assert [study.finished for study in studies] == [2, 0]
        for study in studies:
            study.close()

    def test_another_place_is_refused(self, folder: Path, postgresql: str) -> None:
        opened(folder).close()
        with pytest.raises(StudyError, match=r"this study is in its study\.journal; leave out storage\.study or use"):
            opened(folder, f"storage.study={postgresql}")
        (folder / JOURNAL).unlink()
        opened(folder, f"storage.study={postgresql}").close()
        with pytest.raises(StudyError, match=r"this study is in postgresql://me@.+, not in postgresql://you@h/d"):
            opened(folder, "storage.study=postgresql://you@h/d")

    def test_the_server_keeps_other_drivers_off(self, folder: Path, tmp_path: Path, postgresql: str) -> None:
        """Such as on another machine, where the lock of a file may not be seen."""
        first, elsewhere = opened(folder, f"storage.study={postgresql}"), results_in(tmp_path / "elsewhere")
        (elsewhere / DATABASE).write_bytes((folder / DATABASE).read_bytes())
        with pytest.raises(StudyError, match="another search drives the study demo-"):
            opened(elsewhere)
        first.close()
        opened(elsewhere).close()

    def test_a_server_that_goes_away_is_said(
        self, folder: Path, postgresql: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        study = opened(folder, f"storage.study={postgresql}")

        def gone(*_: object, **__: object) -> None:
            cause = sqlalchemy.exc.OperationalError("SELECT 1", {}, Exception("server closed the connection\nmore"))
            raise optuna.exceptions.StorageInternalError("An exception is raised during the commit.") from cause

        monkeypatch.setattr(study._study, "ask", gone)
        with pytest.raises(StudyError, match=r"^postgresql://.+: cannot be reached \(server closed the connection\)$"):
            study.ask()
        study.close()

    def test_a_driver_that_the_server_has_not_let_go_yet_is_waited_for(
        self, folder: Path, tmp_path: Path, postgresql: str
    ) -> None:
        """As after a SIGKILL, which the server learns of a moment later."""
        first, elsewhere = opened(folder, f"storage.study={postgresql}"), results_in(tmp_path / "elsewhere")
        (elsewhere / DATABASE).write_bytes((folder / DATABASE).read_bytes())
        letting_go = threading.Timer(1.0, first.close)
        letting_go.start()
        opened(elsewhere).close()
        letting_go.join()

    def test_a_connection_that_was_lost_is_made_again(self, folder: Path, postgresql: str) -> None:
        import psycopg

        study = opened(folder, f"storage.study={postgresql}")
        evaluate(study, 2)
        number, plan = study.ask() or pytest.fail("nothing asked for")
        with psycopg.connect(postgresql, autocommit=True) as other:
            # All but the one that holds the lock.
            other.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
                "AND pid <> pg_backend_pid() AND pid NOT IN (SELECT pid FROM pg_locks WHERE locktype = 'advisory')"
            )
        study.tell(number, plan, score_of(plan))
        evaluate(study)
        assert study.finished == 6
        study.close()

    def test_a_search_from_end_to_end(
        self, tmp_path: Path, tiny_run: Callable[..., RunConfig], bert_headed_folder: Path, postgresql: str
    ) -> None:
        run = tiny_run([f"model.id={json.dumps(str(bert_headed_folder))}", f"storage.study={postgresql}"])
        (tmp_path / "run.yaml").write_text(run.to_yaml(), encoding="utf-8")
        for trials in (3, 5):
            done = command("search", "run.yaml", "--set", f"search.trials={trials}", cwd=tmp_path)
            assert done.code == 0, done.err
            assert f"{trials} candidates" in done.err.splitlines()[-1]
        results = tmp_path / "results" / "tiny"
        assert (results / "report.html").is_file()
        assert not (results / JOURNAL).exists()
        assert "results/tiny" in command("ls", "studies", cwd=tmp_path).out
        assert command("pick", results, cwd=tmp_path).code == 0
        salvaged = command("salvage", results, cwd=tmp_path)
        assert salvaged.code == 1
        assert "no such file" in salvaged.err


def test_a_server_that_is_not_there_is_one_line(folder: Path) -> None:
    with pytest.raises(StudyError, match=r"^postgresql://me@127\.0\.0\.1:1/d: cannot be reached \(.+\)$"):
        opened(folder, "storage.study=postgresql://me@127.0.0.1:1/d")
    assert not holds_study(folder), "another address can still be given"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": 1, "database": "postgresql://me@h/d"}'])
def test_a_damaged_note_of_the_database_is_refused(folder: Path, content: str) -> None:
    (folder / DATABASE).write_text(content, encoding="utf-8")
    with pytest.raises(StudyError, match=r"study\.json: cannot be read"):
        opened(folder)


def test_a_later_note_of_the_database_is_refused(folder: Path) -> None:
    (folder / DATABASE).write_text('{"schema": 9}', encoding="utf-8")
    with pytest.raises(StudyError, match=r"study\.json: schema must be 1, got 9"):
        opened(folder)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("sqlite:///x.db", "must read postgresql://USER@HOST/DATABASE"),
        ("postgresql://host", "must read postgresql://USER@HOST/DATABASE"),
        ("postgresql://me:secret@h/d", "holds a password"),
    ],
)
def test_what_is_no_such_database_is_refused(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        run_of(f"storage.study={url}")
    assert "secret" not in str(caught.value)


def test_optuna_reads_both(folder: Path) -> None:
    """Anybody who knows Optuna can open the study."""
    study = opened(folder)
    evaluate(study)
    study.close()
    backend = optuna.storages.journal.JournalFileBackend(str(folder / JOURNAL))
    read = optuna.load_study(storage=optuna.storages.JournalStorage(backend), study_name="autocompress")
    assert sum(trial.state.is_finished() for trial in read.trials) >= 6
