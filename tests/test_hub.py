"""Pushing an exported folder: everything in it arrives, and what the hub would refuse is refused before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers_hub import Hub

from autocompress import hub
from autocompress.errors import ConfigError, ExportError
from autocompress.hub import Repository


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    folder = tmp_path / "export"
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlibrary_name: autocompress\n---\n", encoding="utf-8")
    (folder / "model.bin").write_bytes(bytes(range(256)) * 100)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}", encoding="utf-8")
    return folder


def test_every_file_arrives(hub_on_loopback: Hub, exported: Path) -> None:
    address = hub.push(exported, Repository("me/small"), "Trial 3")
    assert address == f"{hub_on_loopback.address}/me/small"
    written = {str(f.relative_to(exported)): f.read_bytes() for f in exported.rglob("*") if f.is_file()}
    assert hub_on_loopback.files == {"me/small": written}
    assert hub_on_loopback.messages == ["Trial 3"]
    assert hub_on_loopback.large, "large files go another way"


def test_what_an_earlier_export_put_there_goes_and_nothing_else(hub_on_loopback: Hub, tmp_path: Path) -> None:
    def export(name: str, *files: str) -> Path:
        for file in (*files, "measurement.json"):
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text("{}", encoding="utf-8")
        listed = sorted(file.name for file in (tmp_path / name).iterdir())
        about = {"schema": 1, "plan_id": "any", "files": [*listed, "*"]}
        (tmp_path / name / "measurement.json").write_text(json.dumps(about), encoding="utf-8")
        return tmp_path / name

    first = export("hf", "config.json", "tokenizer/tokenizer.json", "README.md")
    hub.push(first, Repository("me/small"), "first")
    hub_on_loopback.files["me/small"]["NOTES.md"] = b"by hand"
    hub.push(export("openvino", "model.xml", "README.md"), Repository("me/small"), "second")
    assert set(hub_on_loopback.files["me/small"]) == {"model.xml", "README.md", "measurement.json", "NOTES.md"}


def test_what_is_there_must_be_told_before_anything_is_put_beside_it(hub_on_loopback: Hub, exported: Path) -> None:
    hub.push(exported, Repository("me/small"), "first")
    before = dict(hub_on_loopback.files["me/small"])
    hub_on_loopback.silent = True
    (exported / "new.bin").write_bytes(b"new")
    with pytest.raises(ExportError, match="me/small: the hub refused or did not answer"):
        hub.push(exported, Repository("me/small"), "second")
    assert hub_on_loopback.files["me/small"] == before


@pytest.mark.parametrize("private", [False, True])
def test_a_new_repository_is_private_if_asked(hub_on_loopback: Hub, exported: Path, private: bool) -> None:
    hub.push(exported, Repository("me/small", private), "first")
    hub.push(exported, Repository("me/small"), "second")
    assert hub_on_loopback.repositories == {"me/small": private}


@pytest.mark.parametrize("name", ["small", "me/small"])
def test_what_is_to_be_private_is_not_put_where_everybody_reads(
    hub_on_loopback: Hub, exported: Path, name: str
) -> None:
    hub.check(Repository(name, private=True))
    hub.push(exported, Repository(name), "first")
    hub.check(Repository(name))
    with pytest.raises(ExportError, match="me/small: is there and public, which --private does not change"):
        hub.check(Repository(name, private=True))
    hub_on_loopback.repositories["me/small"] = True
    hub.check(Repository(name, private=True))


def test_a_name_alone_is_one_of_ours(hub_on_loopback: Hub, exported: Path) -> None:
    assert hub.push(exported, Repository("small"), "first").endswith("/me/small")


def test_the_token_is_checked_first(hub_on_loopback: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.check(Repository("me/small"))
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody")
    with pytest.raises(ExportError, match=r"export: me/small: the hub refused or did not answer \(.*"):
        hub.check(Repository("me/small"))
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ExportError, match=r"me/small: there is no token .* run: hf auth login"):
        hub.check(Repository("me/small"))
    assert set(hub_on_loopback.asked) == {"GET /api/whoami-v2"}


def test_what_a_token_may_not_do_is_refused_before_any_work(hub_on_loopback: Hub) -> None:
    for name in ("small", "me/small", "ours/small"):
        hub.check(Repository(name))
    with pytest.raises(ExportError, match="others/small: the token for the hub is of me, ours"):
        hub.check(Repository("others/small"))
    hub_on_loopback.role = "fineGrained"  # which may be let in by others
    hub.check(Repository("others/small"))
    hub_on_loopback.role = "read"
    with pytest.raises(ExportError, match="me/small: the token for the hub may only read"):
        hub.check(Repository("me/small"))


def test_what_the_hub_forbids_is_said(hub_on_loopback: Hub, exported: Path) -> None:
    with pytest.raises(ExportError, match="others/small: the hub refused"):
        hub.push(exported, Repository("others/small"), "mine")
    assert not hub_on_loopback.files


def test_a_hub_that_is_not_there_is_said(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_any")
    with pytest.raises(ExportError, match="the hub refused or did not answer"):
        hub.check(Repository("me/small"))


@pytest.mark.parametrize("name", ["", "a/b/c", "../up", "me/..", "me/x y", "me/-", "-/me", "me/a--b"])
def test_what_can_be_no_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="--push-to-hub"):
        Repository(name)
