"""A content-addressed store of what is expensive to make: fine-tuned models, scores, students.

An entry's key is the hash of everything that it was made from. It is written aside and renamed, so that a reader sees
a whole entry or none, and two processes that make the same one do no harm to each other.

A bank with a limit is bounded in size: the least recently used entries go first, what is cheap to remake before what
took training. The time of last use is the modification time of the entry's folder, so several processes on one machine
share the order without a file of their own to agree on. An entry goes as it came, by a rename aside: files that a
reader has open or mapped stay readable, and a reader that comes too late finds nothing, which `Bank.load` repairs.

Banks of machines without a common folder share a depot: what one of them made the others fetch.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from autocompress import machine, slot
from autocompress.errors import DepotError

if TYPE_CHECKING:
    from autocompress.depot import Depot

T = TypeVar("T")

BANK_VERSION = 1
"""Part of every key: raised when what an entry holds changes its meaning."""

TRAINED = ("finetuned", "distilled")
"""Kinds whose entries took training: minutes to hours each, where the others take seconds."""

LAST = (*TRAINED, "copies")
"""Kinds whose entries go last: they took training, or stand where whoever begins later on a cluster was told."""

_IN_PIECES = (
    *TRAINED,
    "channels",
    "drop-order",
    "importance",
    "moments",
    "orders",
    "reconstructed",
    "sensitivity",
    "sums",
    "teacher-logits",
)
"""Kinds that are not made in one piece: whoever wants to time would wait in vain for what takes minutes, and what takes
seconds says for itself when it works."""

RECENT_S = 60.0
"""Entries used within this time stay: whoever was just given the path still has to open its files."""

STALE_S = 3600.0
"""Age from which a folder in the making that nobody holds is a left-over; younger ones may help to find a fault."""

TRIMS_PER_LIMIT = 20
"""A process looks over the bank each time it has written this part of the limit: a look costs a walk over all files."""

LOAD_ATTEMPTS = 3
"""Being evicted between `Bank.get` and reading is rare; more than this often in a row is another fault."""

_LOCK = ".lock"
"""Ends the name of the file that the maker of a folder holds beside it."""

_IN_DEPOT = "depot:"
"""Begins the name of a copy that is fetched from the depot."""

# Only what has such a name is ever deleted: a user may have pointed the bank at a folder that holds other things.
_ENTRY = re.compile(r"[0-9a-f]{24}")
_ASIDE = re.compile(r"\.[0-9a-f]{24}\.[0-9a-f]{32}")


def default_bank() -> Path:
    """Return the bank in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "autocompress" / "bank"


@dataclass(frozen=True)
class Usage:
    """What the entries of one kind take.

    Attributes:
        entries: Their number.
        bytes: The sum of their files' sizes.
    """

    entries: int
    bytes: int


class Bank:
    """Folders by kind and key under one root.

    Args:
        root: The bank's folder; made with the first entry.
        limit_bytes: Size that `trim` keeps to; without one nothing but left-overs is deleted.
        depot: Where entries are looked for before they are made, and put once they are.
    """

    def __init__(self, root: Path, *, limit_bytes: int | None = None, depot: Depot | None = None) -> None:
        self.root = root
        self.limit_bytes = limit_bytes
        self.depot = depot
        self.made_seconds: dict[str, float] = {}
        """What this process spent on making entries, by kind; an entry made for another counts for its own."""
        self._written_bytes = 0  # by this process since its last trim
        self._in_depot: set[Path] = set()

    def path(self, kind: str, made_from: Mapping[str, Any]) -> Path:
        """Return where the entry made from these things stands or would stand."""
        text = json.dumps({"version": BANK_VERSION, **made_from}, sort_keys=True)
        return self.root / kind / hashlib.sha256(text.encode()).hexdigest()[:24]

    def get(self, kind: str, made_from: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
        """Return the entry's folder; ``make`` fills a fresh folder if there is none yet.

        The entry counts as used now and is safe from `trim` for `RECENT_S`. Who opens its files later than that uses
        `load`. Now and then, after a process has written a part of the limit, this trims the bank; a process that
        writes less never does, so a run calls `trim` once itself.

        Args:
            kind: Name of the folder of such entries.
            made_from: Everything that the entry depends on, as JSON data.
            make: Fills the empty folder that it is given.

        Raises:
            OSError: The entry cannot be written, as on a full disk; nothing of it is left.
            DepotError: The depot cannot be read or written.
        """
        final = self.path(kind, made_from)
        if not _use(final):

            def fill(aside: Path) -> None:
                if not self._fetched(final, aside):
                    make(aside)
                    text = json.dumps(made_from, sort_keys=True, indent=1)
                    (aside / "made_from.json").write_text(text, encoding="utf-8")

            self._placed(kind, final, fill)
        self._share(final)
        return final

    def _fetched(self, entry: Path, aside: Path) -> bool:
        """Fill a folder with an entry that the depot has; returns whether it has it."""
        if self.depot is None or not self.depot.get(_name(entry), aside):
            return False
        self._in_depot.add(entry)
        return True

    def _share(self, entry: Path) -> None:
        """Let the depot have an entry, also one that was made before there was a depot, or that it has no more."""
        if self.depot is None or entry in self._in_depot:
            return
        if not self.depot.has(_name(entry)):
            self.depot.put(_name(entry), entry)
        self._in_depot.add(entry)

    def _placed(self, kind: str, final: Path, fill: Callable[[Path], None]) -> Path:
        """Fill a folder aside and let it be the entry."""
        aside = _aside(final)
        aside.mkdir(parents=True)
        started, before = time.perf_counter(), sum(self.made_seconds.values())
        try:
            with _locked(aside), nullcontext() if kind in _IN_PIECES else slot.working():
                self._filled(aside, fill)
                size_bytes = _size_bytes(aside)
                placed = _place(aside, final)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        within = sum(self.made_seconds.values()) - before
        self.made_seconds[kind] = self.made_seconds.get(kind, 0.0) + time.perf_counter() - started - within
        if placed and self.limit_bytes is not None:
            self._written_bytes += size_bytes
            if self._written_bytes * TRIMS_PER_LIMIT >= self.limit_bytes:
                self.trim()
        return final

    @staticmethod
    def _filled(aside: Path, fill: Callable[[Path], None]) -> None:
        """Fill a folder; a full disk is an `OSError`, whatever a library that writes says."""
        try:
            fill(aside)
        except OSError:
            raise
        except Exception as error:
            if (full := machine.without_room([aside])) is None:
                raise
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(full)) from error

    def load(
        self, kind: str, made_from: Mapping[str, Any], make: Callable[[Path], None], read: Callable[[Path], T]
    ) -> T:
        """Return what ``read`` makes of the entry's folder; an entry evicted before it was read is made again.

        Args:
            kind: As in `get`.
            made_from: As in `get`.
            make: As in `get`; what it raises is not tried again.
            read: Reads the folder; may be called up to `LOAD_ATTEMPTS` times.

        Raises:
            Exception: What ``read`` raised while the entry was there, or at the last attempt.
        """
        for _ in range(LOAD_ATTEMPTS - 1):
            folder = self.get(kind, made_from, make)
            try:
                return read(folder)
            except Exception as error:
                # Libraries have errors of their own for a missing file. And the folder may be back already, made by
                # another process.
                if folder.is_dir() and not isinstance(error, FileNotFoundError):
                    raise
        return read(self.get(kind, made_from, make))

    def lent(self, original: Path) -> str:
        """Return how `borrowed` finds a copy of a file or a folder, where the original is not seen.

        Without a depot it is for readers who see the bank, and its path.
        """
        files = [original] if original.is_file() else sorted(f for f in original.rglob("*") if f.is_file())
        content = {str(file.relative_to(original.parent)): _digest(file) for file in files}

        def make(folder: Path) -> None:
            for name in content:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(original.parent / name, folder / name)

        entry = self.get("copies", content, make)
        if self.depot is None:
            return str((entry / original.name).absolute())
        return f"{_IN_DEPOT}{entry.parent.name}/{entry.name}/{original.name}"

    def borrowed(self, lent: str) -> str:
        """Return the path of what another bank of the same depot has lent; what it has not lent is left as it is.

        Raises:
            DepotError: It is not there any more, or the depot cannot be read.
        """
        if not lent.startswith(_IN_DEPOT):
            return lent
        kind, key, name = lent.removeprefix(_IN_DEPOT).split("/", 2)
        final = self.root / kind / key

        def fetch(aside: Path) -> None:
            if not self._fetched(final, aside):
                raise DepotError(f"storage.shared: {_name(final)} is gone; run the same command again")

        if not _use(final):
            self._placed(kind, final, fetch)
        return str((final / name).absolute())

    def usage(self) -> dict[str, Usage]:
        """Return what each kind takes, sorted by name; entries in the making and kinds without entries are left out."""
        found: dict[str, Usage] = {}
        for entry in self._entries():
            before = found.get(entry.kind, Usage(0, 0))
            found[entry.kind] = Usage(before.entries + 1, before.bytes + entry.size_bytes)
        return found

    def trim(self) -> int:
        """Delete left-overs of killed processes and, above the limit, the least recently used entries.

        Entries of the kinds in `LAST` go only when all others that may go are gone. Entries used within the last
        `RECENT_S` are never removed: for that long the bank may exceed its limit, by as much as is in use. What
        cannot be removed, as in a bank that may only be read, stays without an error.

        Returns:
            The bytes freed by this call.
        """
        self._written_bytes = 0
        freed_bytes = self._remove_left_overs()
        if self.limit_bytes is None:
            return freed_bytes
        entries = sorted(self._entries(), key=lambda entry: (entry.kind in LAST, entry.used_s))
        excess_bytes = sum(entry.size_bytes for entry in entries) - self.limit_bytes
        for entry in entries:
            if excess_bytes <= 0:
                break
            aside = _aside(entry.folder)
            try:
                # Asked anew: it may have been used since it was listed.
                if time.time() - entry.folder.stat().st_mtime < RECENT_S:
                    continue
                entry.folder.rename(aside)
            except FileNotFoundError:
                # Another process trims too. Not counting this one would remove more than the limit asks for.
                excess_bytes -= entry.size_bytes
                continue
            except OSError:
                continue
            shutil.rmtree(aside, ignore_errors=True)
            excess_bytes -= entry.size_bytes
            freed_bytes += entry.size_bytes
        return freed_bytes

    def _remove_left_overs(self) -> int:
        """Delete old folders in the making that no living process holds; return the bytes freed."""
        freed_bytes = 0
        for _, folder in self._folders(_ASIDE):
            with suppress(OSError):
                if time.time() - folder.stat().st_mtime < STALE_S:
                    continue
                with _locked(folder) as held:
                    if held:
                        size_bytes = _size_bytes(folder)
                        shutil.rmtree(folder)
                        freed_bytes += size_bytes
        for file in self.root.glob(f"*/.*{_LOCK}"):
            folder = file.with_name(file.name.removesuffix(_LOCK))
            if _ASIDE.fullmatch(folder.name) and not folder.exists():  # which was made before its file
                with suppress(OSError):
                    file.unlink()
        return freed_bytes

    def _entries(self) -> Iterator[_Entry]:
        """List the entries, kind by kind; one that vanishes meanwhile is left out."""
        for kind, folder in self._folders(_ENTRY):
            size_bytes = _size_bytes(folder)
            try:
                used_s = folder.stat().st_mtime
            except OSError:
                continue
            yield _Entry(kind, folder, size_bytes, used_s)

    def _folders(self, pattern: re.Pattern[str]) -> Iterator[tuple[str, Path]]:
        """List kinds, sorted, and the folders in them whose names match."""
        for kind in sorted(_names(self.root)):
            for name in _names(self.root / kind):
                if pattern.fullmatch(name):
                    yield kind, self.root / kind / name


class _Entry(NamedTuple):
    kind: str
    folder: Path
    size_bytes: int
    used_s: float


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _name(entry: Path) -> str:
    """Return an entry's name in a depot."""
    return f"bank/{entry.parent.name}/{entry.name}"


def _aside(final: Path) -> Path:
    """Return a fresh name next to an entry, on its way in or out."""
    return final.with_name(f".{final.name}.{uuid.uuid4().hex}")


def _use(folder: Path) -> bool:
    """Mark an entry as used now; return whether it is there.

    In this order, so that an entry that is found is already marked when a trim looks at it.
    """
    with suppress(OSError):  # A bank that may only be read has no order to keep.
        os.utime(folder)
    return folder.is_dir()


def _place(aside: Path, final: Path) -> bool:
    """Rename a made folder to its entry; return false if another process's stands there already.

    Raises:
        OSError: It cannot be renamed, and there is no such entry.
    """
    while True:
        try:
            aside.rename(final)
        except OSError as error:
            # Another process finished the same entry first; its content is the same.
            if _use(final):
                return False
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            # The other one was evicted again before it could be marked: the place is free.
        else:
            return True


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Hold a folder's lock if it can be had; yields whether it is held.

    The lock ends with its process, however that ends. It tells a training of many hours, which may write nothing until
    its end, from a left-over. Where a file system has no locks, entries are made without, and left-overs stay.
    """
    # Of a file beside it: over NFS a folder's lock is one machine's own.
    file = folder.with_name(folder.name + _LOCK)
    descriptor, held = os.open(file, os.O_CREAT | os.O_RDWR, 0o644), False
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        yield held
    finally:
        if held:
            file.unlink(missing_ok=True)
        os.close(descriptor)


def _size_bytes(folder: Path) -> int:
    """Return the sum of the sizes of a folder's files; what vanishes meanwhile counts nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += Path(parent, name).lstat().st_size
    return total


def _names(folder: Path) -> list[str]:
    """Return the names of the folders in a folder; none if it is not there or may not be read."""
    return next(os.walk(folder), ("", [], []))[1]
