"""Folders at a URL that fsspec reads and writes: what machines without a common folder hand each other.

A folder is one object, a tar, which is written aside and moved: whoever reads finds all of it or nothing.
"""

from __future__ import annotations

import errno
import shutil
import tarfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

import fsspec

from autocompress.errors import ConfigError, DepotError, first_line


class Depot:
    """Folders by name.

    Args:
        url: such as ``s3://bucket/folder``; credentials are found where fsspec's implementation looks for them.

    Raises:
        ConfigError: if fsspec has no such protocol, or the package for it is missing.
        DepotError: if it cannot be reached.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        protocol = url.partition("://")[0]
        try:
            fsspec.get_filesystem_class(protocol)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"storage.shared: {protocol}: {error}") from None
        with self._reached("cannot be reached"):
            self._files, self._root = fsspec.url_to_fs(self.url)

    def within(self, name: str) -> Depot:
        """Return the depot of what has names that begin with this one."""
        return Depot(f"{self.url}/{name}")

    def put(self, name: str, folder: Path) -> None:
        """Store a folder's files, in place of what has that name.

        Raises:
            DepotError: if that cannot be done.
        """
        final, aside = self._path(name), f"{self._root}/aside/{uuid.uuid4().hex}"
        with self._reached("cannot be written to"):
            for path in (final, aside):
                self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
            with self._files.open(aside, "wb") as stream, tarfile.open(fileobj=stream, mode="w|") as tar:
                for file in sorted(file for file in folder.rglob("*") if file.is_file()):
                    # Nothing of its owner or of the time: what is the same in two folders is the same here.
                    about = tarfile.TarInfo(file.relative_to(folder).as_posix())
                    about.size = file.stat().st_size
                    with file.open("rb") as content:
                        tar.addfile(about, content)
            self._files.mv(aside, final)

    def get(self, name: str, folder: Path) -> bool:
        """Copy what has a name into a folder that is there; returns whether there is anything.

        Raises:
            DepotError: if it cannot be read.
        """
        try:
            with self._reached("cannot be read"), self._opened(name) as tar:
                for about in tar:
                    inside = PurePosixPath(about.name)
                    if not about.isfile() or inside.is_absolute() or ".." in inside.parts:
                        raise DepotError(f"storage.shared: {self._path(name)}: holds {about.name}, which is no file")
                    file = folder / inside
                    file.parent.mkdir(parents=True, exist_ok=True)
                    content = tar.extractfile(about)
                    assert content is not None, "a file has content"
                    with file.open("wb") as copy:
                        shutil.copyfileobj(content, copy)
        except FileNotFoundError:
            return False
        return True

    def has(self, name: str) -> bool:
        """Return whether there is anything of that name.

        Raises:
            DepotError: if that cannot be found out.
        """
        self._files.invalidate_cache()
        with self._reached("cannot be read"):
            return bool(self._files.exists(self._path(name)))

    def remove(self, name: str) -> None:
        """Delete what has a name, if there is anything."""
        if self.has(name):  # what is raised if not is not the same everywhere
            with self._reached("cannot be written to"), suppress(FileNotFoundError):
                self._files.rm_file(self._path(name))

    def clear(self) -> None:
        """Delete everything."""
        self._files.invalidate_cache()
        with self._reached("cannot be written to"), suppress(FileNotFoundError):
            if self._files.exists(self._root):
                self._files.rm(self._root, recursive=True)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}.tar"

    @contextmanager
    def _opened(self, name: str) -> Iterator[tarfile.TarFile]:
        self._files.invalidate_cache()  # others write, too
        with self._files.open(self._path(name), "rb") as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            yield tar

    @contextmanager
    def _reached(self, what: str) -> Iterator[None]:
        """Say in our words what fsspec's many implementations raise in theirs."""
        try:
            yield
        except (FileNotFoundError, DepotError):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise  # here, most likely
            said = first_line(error)
            raise DepotError(f"storage.shared: {self.url}: {what} ({said})") from None
