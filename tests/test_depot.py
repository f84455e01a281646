"""Folders at a URL: whole or not at all, confined to where they are copied, and with reasons where nobody answers."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ftp_server import PROGRAM, served
from ray_nodes import free_port

from autocompress.depot import Depot
from autocompress.errors import ConfigError, DepotError

FILES = {"weights.bin": b"\0" * 70_000, "deeper/config.json": b"{}", "deeper/empty": b""}


@pytest.fixture(params=["file", pytest.param("ftp", marks=pytest.mark.skipif(PROGRAM is None, reason="no vsftpd"))])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "file":
        yield f"file://{tmp_path / 'shared'}"
    else:
        with served(tmp_path / "shared") as found:
            yield found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(content)
    return tmp_path / "folder"


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def fresh(tmp_path: Path) -> Path:
    found = tmp_path / f"copy-{len(list(tmp_path.iterdir()))}"
    found.mkdir()
    return found


def test_what_is_put_is_found_by_others_until_it_is_removed(url: str, folder: Path, tmp_path: Path) -> None:
    ours, theirs = Depot(url), Depot(f"{url}/")
    assert not theirs.get("kind/one", fresh(tmp_path))
    ours.put("kind/one", folder)
    ours.put("kind/two", folder)
    assert theirs.get("kind/one", there := fresh(tmp_path))
    assert files_in(there) == FILES
    (folder / "weights.bin").write_bytes(b"others")
    ours.put("kind/one", folder)
    assert theirs.within("kind").get("one", there := fresh(tmp_path))
    assert files_in(there) == {**FILES, "weights.bin": b"others"}
    theirs.remove("kind/one")
    theirs.remove("kind/one")  # which another may have done
    assert not ours.get("kind/one", fresh(tmp_path))
    assert ours.get("kind/two", fresh(tmp_path))
    theirs.within("kind").clear()
    theirs.within("kind").clear()
    assert not ours.get("kind/two", fresh(tmp_path))


def test_what_is_half_written_is_not_there(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    depot = Depot(f"file://{tmp_path / 'shared'}")
    depot.put("one", folder)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    (folder / "weights.bin").write_bytes(b"others")
    monkeypatch.setattr(depot._files, "mv", killed)
    with pytest.raises(KeyboardInterrupt):
        depot.put("one", folder)
    assert depot.get("one", there := fresh(tmp_path))
    assert files_in(there) == FILES


@pytest.mark.parametrize("name", ["../outside", "/outside", "inside/../../outside", "link"])
def test_nothing_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    with tarfile.open(shared / "one.tar", "w") as tar:
        about = tarfile.TarInfo(name)
        if name == "link":
            about.type, about.linkname = tarfile.SYMTYPE, "/etc"
            tar.addfile(about)
        else:
            about.size = 3
            tar.addfile(about, io.BytesIO(b"bad"))
    there = fresh(tmp_path)
    with pytest.raises(DepotError, match=r"storage\.shared: .*one\.tar: holds .*, which is no file"):
        Depot(f"file://{shared}").get("one", there)
    assert not list(there.iterdir())
    assert not (tmp_path / "outside").exists()


def test_what_is_no_tar_is_said(tmp_path: Path) -> None:
    (tmp_path / "one.tar").write_bytes(b"no" * 1000)
    with pytest.raises(DepotError, match=r"^storage\.shared: file://.*: cannot be read \("):
        Depot(f"file://{tmp_path}").get("one", fresh(tmp_path))


def test_a_protocol_that_nobody_has(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^storage\.shared: carrier-pigeon: "):
        Depot("carrier-pigeon://house/roof")


def test_where_nobody_answers() -> None:
    with pytest.raises(DepotError, match=r"^storage\.shared: ftp://127\.0\.0\.1:\d+/x: cannot be reached \(.*refused"):
        Depot(f"ftp://127.0.0.1:{free_port()}/x")


@pytest.mark.skipif(PROGRAM is None, reason="vsftpd is not installed")
def test_a_server_that_goes(folder: Path, tmp_path: Path) -> None:
    with served(tmp_path / "shared") as url:
        depot = Depot(url)
        depot.put("one", folder)
    with pytest.raises(DepotError, match="cannot be read"):
        depot.get("one", fresh(tmp_path))
    with pytest.raises(DepotError, match="cannot be written to"):
        depot.put("two", folder)
