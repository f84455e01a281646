"""The journal file: a torn end is cut off with a backup, and what is sound stays as it is."""

from __future__ import annotations

import gc
import json
from pathlib import Path

from autocompress.journal import open_journal, repair_tail, without_collection


def test_what_is_missing_empty_or_whole_is_not_repaired(tmp_path: Path) -> None:
    journal = tmp_path / "study.journal"
    assert repair_tail(journal) is None
    journal.touch()
    assert repair_tail(journal) is None
    journal.write_bytes(b"{}\n{}\n")
    assert repair_tail(journal) is None
    assert journal.read_bytes() == b"{}\n{}\n"
    assert list(tmp_path.iterdir()) == [journal]


def test_repairs_do_not_overwrite_each_others_backups(tmp_path: Path) -> None:
    journal = tmp_path / "study.journal"
    found = []
    for stump in (b'{"a"', b'{"bb"', b'{"ccc"'):
        journal.write_bytes(b"{}\n" + stump)
        found.append((repair_tail(journal), stump))
        assert journal.read_bytes() == b"{}\n"
    for backup, stump in found:
        assert backup is not None
        assert backup.read_bytes() == b"{}\n" + stump


def test_what_is_written_is_whole_lines_and_is_read_again(tmp_path: Path) -> None:
    journal = tmp_path / "study.journal"
    written = open_journal(journal).create_new_study([], "one")
    for line in journal.read_text(encoding="utf-8").splitlines():
        json.loads(line)
    assert open_journal(journal).get_study_id_from_name("one") == written


def test_the_collector_is_back_after_an_error() -> None:
    assert gc.isenabled()
    try:
        with without_collection():
            assert not gc.isenabled()
            raise ValueError
    except ValueError:
        assert gc.isenabled()
