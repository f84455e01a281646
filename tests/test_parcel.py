"""An export as files: in its place all of it, or an error and nothing; nothing else is touched."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from autocompress import parcel
from autocompress.errors import ExportError
from autocompress.plan import CompressionPlan


class TestPuttingInPlace:
    @pytest.fixture
    def made(self, tmp_path: Path) -> Path:
        folder = tmp_path / "made"
        (folder / "tokenizer").mkdir(parents=True)
        (folder / "model.bin").write_bytes(b"new")
        (folder / "tokenizer" / "vocab.txt").write_text("new", encoding="utf-8")
        return folder

    @pytest.mark.parametrize("there", ["nothing", "an empty folder"])
    def test_it_is_all_there(self, made: Path, tmp_path: Path, there: str) -> None:
        out = tmp_path / "deep" / "out"
        if there != "nothing":
            out.mkdir(parents=True)
        parcel.put(made, out)
        assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == {
            "model.bin",
            "tokenizer/vocab.txt",
        }
        assert list(out.parent.iterdir()) == [out]

    def test_what_says_that_it_is_whole_comes_last(
        self, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (made / parcel.MEASUREMENT).write_text("{}", encoding="utf-8")
        (out := tmp_path / "out").mkdir()
        came, replace = list[str](), Path.replace

        def coming(entry: Path, target: Path) -> Path:
            came.append(entry.name)
            return replace(entry, target)

        monkeypatch.setattr(Path, "replace", coming)
        parcel.put(made, out)
        assert sorted(came) == ["measurement.json", "model.bin", "tokenizer"]
        assert came[-1] == "measurement.json"

    def test_what_else_is_in_a_folder_stays(self, made: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        (out / "tokenizer").mkdir(parents=True)
        for name in ("model.bin", "tokenizer/added.txt", "notes.txt"):
            (out / name).write_text("old", encoding="utf-8")
        link = tmp_path / "link"
        link.symlink_to(out)
        parcel.put(made, link)
        assert link.is_symlink()
        assert (out / "model.bin").read_bytes() == b"new"
        assert [path.name for path in (out / "tokenizer").iterdir()] == ["vocab.txt"], "a tokenizer is one thing"
        assert (out / "notes.txt").read_text(encoding="utf-8") == "old"

    def test_nothing_is_left_of_an_export_of_another_format(self, made: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        (out / "reference").mkdir(parents=True)
        for name in ("config.json", "model.safetensors", "tokenizer.json", "measurement.json", "reference/model.onnx"):
            (out / name).write_text('{"schema": 1, "plan_id": "any"}', encoding="utf-8")
        parcel.seal(out, CompressionPlan())
        for name in ("notes.json", "other.safetensors"):
            (out / name).write_text("mine", encoding="utf-8")
        parcel.put(made, out)
        assert {path.name for path in out.iterdir()} == {"model.bin", "tokenizer", "notes.json", "other.safetensors"}

    @pytest.mark.parametrize("listed", [["../kept"], ["/etc/kept", "..", ".", ""], "measurement.json", None])
    def test_nothing_elsewhere_is_deleted_whatever_is_listed(self, made: Path, tmp_path: Path, listed: object) -> None:
        out = tmp_path / "out"
        out.mkdir()
        (tmp_path / "kept").write_text("mine", encoding="utf-8")
        (out / "mine.txt").write_text("mine", encoding="utf-8")
        about = {"schema": 1, "plan_id": "any", "files": listed}
        (out / "measurement.json").write_text(json.dumps(about), encoding="utf-8")
        parcel.put(made, out)
        assert (tmp_path / "kept").exists()
        assert (out / "mine.txt").exists()

    def test_a_folder_that_is_there_may_be_a_disk_by_itself(
        self, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "out"
        (out / "model.bin").parent.mkdir()
        places = []
        copy = shutil.copytree

        def copied(source: Path, there: Path, *more: Any) -> None:
            if not more:  # as those of the folders within
                places.append(there.parent)
            copy(source, there, *more)

        monkeypatch.setattr(shutil, "copytree", copied)
        parcel.put(made, out)
        assert places == [out], "nothing is moved from disk to disk"
        assert {path.name for path in out.iterdir()} == {"model.bin", "tokenizer"}

    def test_an_earlier_export_goes_once_there_is_another(
        self, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "out"
        out.mkdir()
        for name in ("model.xml", "measurement.json"):
            (out / name).write_text('{"schema": 1, "plan_id": "any"}', encoding="utf-8")
        parcel.seal(out, CompressionPlan())
        with monkeypatch.context() as context:

            def full(*_: object) -> None:
                raise OSError(errno.ENOSPC, "No space left on device")

            context.setattr(shutil, "copytree", full)
            with pytest.raises(ExportError, match="No space left"):
                parcel.put(made, out / "onnx", in_place_of=out)
        assert {path.name for path in out.iterdir()} == {"model.xml", "measurement.json", "plan.json"}
        parcel.put(made, out / "onnx", in_place_of=out)
        assert {path.name for path in out.iterdir()} == {"onnx"}

    def test_what_cannot_be_filled_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine", encoding="utf-8")
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "mine.txt").write_text("mine", encoding="utf-8")
        (tmp_path / "link").symlink_to(tmp_path / "link")
        for force in (False, True):
            parcel.require_place(tmp_path / "new" / "out", force=force)
            with pytest.raises(ExportError, match="file is no folder"):
                parcel.require_place(tmp_path / "file", force=force)
            with pytest.raises(ExportError, match="out: cannot be written"):
                parcel.require_place(tmp_path / "file" / "out", force=force)
            with pytest.raises(ExportError, match="link: cannot be written"):
                parcel.require_place(tmp_path / "link", force=force)
        with pytest.raises(ExportError, match="full is not empty; give another folder or --force"):
            parcel.require_place(tmp_path / "full", force=False)
        parcel.require_place(tmp_path / "full", force=True)
        assert {path.name for path in tmp_path.iterdir()} == {"file", "full", "link"}

    def test_a_folder_that_is_there_stays_the_same_one(self, made: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        out.mkdir(mode=0o750)
        before = out.stat()
        parcel.put(made, out)
        assert (out.stat().st_ino, out.stat().st_mode) == (before.st_ino, before.st_mode)
        assert (out / "model.bin").exists()

    def test_files_of_those_names_stay_where_no_export_was(self, made: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        out.mkdir()
        (out / "config.json").write_text("mine", encoding="utf-8")
        parcel.put(made, out)
        assert (out / "config.json").read_text(encoding="utf-8") == "mine"

    def test_a_full_disk_leaves_what_was_there(
        self, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "out"
        out.mkdir()
        (out / "model.bin").write_bytes(b"old")

        def copied(_: Path, there: Path) -> None:
            there.mkdir()
            (there / "model.bin").write_bytes(b"ne")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(shutil, "copytree", copied)
        with pytest.raises(ExportError, match=r"out: cannot be written \(No space left on device\)"):
            parcel.put(made, out)
        assert (out / "model.bin").read_bytes() == b"old"
        assert {path.name for path in tmp_path.iterdir()} == {"made", "out"}
