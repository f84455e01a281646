"""Let transformers know our classes as soon as it is imported, without importing it for who does not need it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_AUTO = "transformers.models.auto"
_OURS = {
    f"{_AUTO}.configuration_auto": "autocompress.hf.config",
    f"{_AUTO}.modeling_auto": "autocompress.hf.modeling",
}
"""Modules of transformers that look names of models up, and ours that register a class there when imported."""


class _Then(Loader):
    """Runs another loader, and imports a module of ours after it."""

    def __init__(self, loader: Loader, ours: str) -> None:
        self._loader, self._ours = loader, ours

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        importlib.import_module(self._ours)


class _Finder(MetaPathFinder):
    def __init__(self, wanted: dict[str, str]) -> None:
        self._wanted = dict(wanted)

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        ours = self._wanted.pop(name, None)  # once; and the search below must not stop here again
        if ours is None:
            return None
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, ours)
        return spec


def install() -> None:
    """Register now what transformers has imported already, and the rest when it comes to it."""
    for name, ours in _OURS.items():
        if name in sys.modules:
            importlib.import_module(ours)
    later = {name: ours for name, ours in _OURS.items() if name not in sys.modules}
    if later and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(later))
