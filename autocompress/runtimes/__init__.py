"""Runtimes by name. Each is imported when it is asked for, so that only the target's packages are needed."""

from __future__ import annotations

import importlib
import importlib.util

from autocompress.errors import RuntimeBuildError
from autocompress.runtimes.base import Artifact, Runtime, Session, Template

__all__ = ["RUNTIMES", "Artifact", "Runtime", "Session", "Template", "get_runtime"]

RUNTIMES = {
    "openvino": ("autocompress.runtimes.openvino", "OpenVINORuntime", ("openvino",), "autocompress"),
    "onnxruntime": ("autocompress.runtimes.onnxruntime", "ONNXRuntime", ("onnxruntime", "onnx"), "autocompress[onnx]"),
}
"""Runtime name to module, class, the packages it needs, that which runs models first, and what to install for them."""


def get_runtime(name: str) -> Runtime:
    """Return the runtime called ``name``.

    Raises:
        RuntimeBuildError: if it is unknown, or its package is not installed.
    """
    if name not in RUNTIMES:
        raise RuntimeBuildError(f"target.runtime: must be one of {', '.join(RUNTIMES)}, got {name!r}")
    module, cls, packages, extra = RUNTIMES[name]
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise RuntimeBuildError(f'target.runtime: {package} is not installed; run: pip install "{extra}"')
    found: Runtime = getattr(importlib.import_module(module), cls)()
    return found
