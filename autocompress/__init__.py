"""Search for compressed versions of a pretrained Transformer, scored on what is shipped.

The names below are loaded when first used: importing the package loads neither torch nor ray nor plotly.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from autocompress.hf import hook

__version__ = "0.1.0"

if TYPE_CHECKING:
    from autocompress.api import export, finetune, measure, open_study, recover, search
    from autocompress.config import RunConfig
    from autocompress.errors import AutocompressError
    from autocompress.front import Front
    from autocompress.plan import CompressionPlan
    from autocompress.records import Candidate, Measurement
    from autocompress.space import SearchSpace

_HOMES = {
    "AutocompressError": "errors",
    "Candidate": "records",
    "CompressionPlan": "plan",
    "Front": "front",
    "Measurement": "records",
    "RunConfig": "config",
    "SearchSpace": "space",
    "export": "api",
    "finetune": "api",
    "measure": "api",
    "open_study": "api",
    "recover": "api",
    "search": "api",
}

# Folders of format hf are read by transformers' Auto classes once this package is imported.
hook.install()

__all__ = [
    "AutocompressError",
    "Candidate",
    "CompressionPlan",
    "Front",
    "Measurement",
    "RunConfig",
    "SearchSpace",
    "__version__",
    "export",
    "finetune",
    "measure",
    "open_study",
    "recover",
    "search",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'autocompress' has no attribute {name!r}")
    return getattr(importlib.import_module(f"autocompress.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
