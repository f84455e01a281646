"""Put an exported folder on a hub of models: the files of this export, and nothing else that lies beside them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from autocompress.errors import ConfigError, ExportError, first_line
from autocompress.origins import DEMO_MODEL
from autocompress.parcel import MEASUREMENT, listed

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_DEMO_ON_HUB = "sentence-transformers/all-MiniLM-L6-v2"


@dataclass(frozen=True)
class Repository:
    """Where an export goes.

    Args:
        name: ``OWNER/NAME``, or a name alone for one of whom the token belongs to.
        private: whether it is made private; one that is there already stays as it is.

    Raises:
        ConfigError: if it can be no name.
    """

    name: str
    private: bool = False

    def __post_init__(self) -> None:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

        try:
            validate_repo_id(self.name)
        except HFValidationError as error:
            raise ConfigError(f"export: --push-to-hub: {first_line(error)}") from None


def published_name(model_id: str) -> str | None:
    """Return what the hub calls a run file's model, or None for a local folder."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    if model_id == DEMO_MODEL:
        return _DEMO_ON_HUB
    try:
        validate_repo_id(model_id)
    except HFValidationError:
        return None
    return None if Path(model_id).expanduser().exists() else model_id


def check(repository: Repository) -> None:
    """Ask the hub who we are, so that what it would refuse is refused before any work.

    Raises:
        ExportError: if it cannot be reached, knows no token of ours, or none that may write there, or if what is to be
            private is there and public.
    """
    from huggingface_hub import HfApi

    with _in_our_words(repository):
        found = HfApi().whoami()
    role = ((found.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise ExportError(f"export: {repository.name}: the token for the hub may only read; give one that may write")
    owner = repository.name.rpartition("/")[0]
    ours = [found.get("name"), *(each.get("name") for each in found.get("orgs", ()))]
    # What a token of finer grain may do is for the hub to say.
    if role == "write" and owner and owner not in ours:
        raise ExportError(f"export: {repository.name}: the token for the hub is of {', '.join(map(str, ours))}")
    if repository.private:
        _require_not_public(repository, repository.name if owner else f"{found['name']}/{repository.name}")


def _require_not_public(repository: Repository, name: str) -> None:
    """Raise `ExportError` if a repository that is to be private is there, and everybody may read it."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    with _in_our_words(repository):
        try:
            private = HfApi().model_info(name).private
        except RepositoryNotFoundError:
            return
    if not private:
        raise ExportError(
            f"export: {name}: is there and public, which --private does not change; make it private on the hub, or "
            "give another name"
        )


def push(folder: Path, repository: Repository, message: str) -> str:
    """Put every file of ``folder`` into a repository, which is made where it is missing; returns its address.

    What an earlier export put there goes: it may be of another format and be read in place of this one.

    Raises:
        ExportError: if the hub does not take them.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _in_our_words(repository):
        made = api.create_repo(repository.name, private=repository.private, exist_ok=True)
        old = _listed_in(api, made.repo_id)
        api.upload_folder(
            repo_id=made.repo_id, folder_path=folder, commit_message=message, delete_patterns=[*old, *_below(old)]
        )
    return str(made)


def _listed_in(api: HfApi, repository: str) -> list[str]:
    """Return what an export consists of that is in a repository already."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RevisionNotFoundError

    with tempfile.TemporaryDirectory(prefix="autocompress-hub-") as scratch:
        try:
            found = listed(Path(api.hf_hub_download(repository, MEASUREMENT, local_dir=scratch)))
        except LocalEntryNotFoundError:  # the hub did not say
            raise
        except (EntryNotFoundError, RevisionNotFoundError):  # none, or nothing at all
            return []
    return [name for name in found if not set(name) & set("*?[")]  # which would stand for others, too


def _below(names: list[str]) -> list[str]:
    return [f"{name}/*" for name in names]


@contextmanager
def _in_our_words(repository: Repository) -> Iterator[None]:
    from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError  # type: ignore[attr-defined]

    try:
        yield
    except LocalTokenNotFoundError:
        raise ExportError(
            f"export: {repository.name}: there is no token for the hub; set HF_TOKEN, or run: hf auth login"
        ) from None
    # What the transfer of large files raises is a RuntimeError.
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        said = first_line(error)
        raise ExportError(f"export: {repository.name}: the hub refused or did not answer ({said})") from None
