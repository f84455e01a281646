"""An export as files: what it consists of, and how it comes to stand where it is wanted, whole or not at all."""

from __future__ import annotations

import json
import shutil
import tempfile
import uuid
from pathlib import Path

from autocompress.errors import ExportError
from autocompress.plan import CompressionPlan

MEASUREMENT = "measurement.json"
"""What every export holds: its scores, what is needed to run it, and the names of all else that it holds."""


def require_place(out: Path, *, force: bool) -> None:
    """Refuse what `put` could not fill, before any work.

    Raises:
        ExportError: if ``out`` is no folder, cannot be written, or is not empty and not to be filled by force.
    """
    try:
        if out.exists() and not out.is_dir():
            raise ExportError(f"export: {out} is no folder; give another")
        if out.exists() and not force and any(out.iterdir()):
            raise ExportError(f"export: {out} is not empty; give another folder or --force")
        there = next(place for place in (out.resolve(), *out.resolve().parents) if place.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except (OSError, RuntimeError) as error:
        raise _cannot(out, error) from None


def _cannot(out: Path, error: Exception) -> ExportError:
    return ExportError(f"export: {out}: cannot be written ({getattr(error, 'strerror', None) or error})")


def put(made: Path, out: Path, *, in_place_of: Path | None = None) -> None:
    """Bring what is in ``made`` to ``out``, which may be on another disk: all of it, or an error and nothing.

    An earlier export that stands in ``in_place_of`` goes once it is there.
    """
    out = out.resolve()
    # Aside and in place are then on one disk: a folder that is there may be one by itself.
    aside = (out if out.is_dir() else out.parent) / f".{out.name}.{uuid.uuid4().hex}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(made, aside)
        if in_place_of is not None:
            clear(in_place_of)
        if not out.exists():
            aside.replace(out)
            return
        # What else was in the folder stays there: it was asked for by force.
        clear(out)
        # What says that it is whole comes last.
        for entry in sorted(aside.iterdir(), key=lambda entry: entry.name == MEASUREMENT):
            _remove(out / entry.name)
            entry.replace(out / entry.name)
    except OSError as error:
        raise _cannot(out, error) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def seal(made: Path, plan: CompressionPlan) -> None:
    """Write into an export its plan, and what it consists of: the last that is written of it."""
    (made / "plan.json").write_text(json.dumps(json.loads(plan.to_json()), indent=1), encoding="utf-8")
    about = json.loads((made / MEASUREMENT).read_text(encoding="utf-8"))
    about["files"] = sorted(entry.name for entry in made.iterdir())
    (made / MEASUREMENT).write_text(json.dumps(about, indent=1), encoding="utf-8")


def clear(out: Path) -> None:
    """Delete what an earlier export put into a folder, which may be of another format and be read in place of ours."""
    # Last what tells them, so that what was interrupted can be gone on with.
    for name in sorted(listed(out / MEASUREMENT), key=lambda name: name == MEASUREMENT):
        _remove(out / name)


def _remove(there: Path) -> None:
    if there.is_dir() and not there.is_symlink():
        shutil.rmtree(there)
    else:
        there.unlink(missing_ok=True)


def listed(measurement: Path) -> list[str]:
    """Return what an export consists of, by its file of measurements: names of files and folders beside that.

    Empty if it cannot be read, is not of an export, or of a version that did not list them.
    """
    try:
        about = json.loads(measurement.read_text(encoding="utf-8"))
        found = [str(name) for name in about["files"]]
        if not (isinstance(about["schema"], int) and about["plan_id"]):
            return []
    except (OSError, ValueError, KeyError, TypeError):
        return []
    # Nothing that leads elsewhere: these are to be deleted.
    return [name for name in found if name == Path(name).name and name not in ("", ".", "..")]
