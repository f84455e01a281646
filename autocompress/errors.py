"""Every error that autocompress raises on purpose, as one tree.

A message is one line that names the place, the allowed range, what was received and the next step. The command
line prints it without a traceback and ends with the class's ``exit_code``.
"""

import shlex


class AutocompressError(Exception):
    """Base class of all errors of this package."""

    exit_code = 1


class ConfigError(AutocompressError):
    """A run file, search space or override that cannot be read or does not validate."""

    exit_code = 2


class PlanError(AutocompressError):
    """A decision that does not fit the site, the model or the runtime it was made for."""


class ModelError(AutocompressError):
    """A model that cannot be found, read safely, or whose anatomy is not understood."""


class DataError(AutocompressError):
    """Task data that is missing, malformed, or does not fit the model."""


class RuntimeBuildError(AutocompressError):
    """A runtime that is not installed, or that cannot build or run an artefact."""


class MeasurementError(AutocompressError):
    """A score that is not a finite number in its range, so that it must not reach the front."""


class StudyError(AutocompressError):
    """A study that cannot be opened, continued or written."""


class DeviceError(AutocompressError):
    """A device that latency is measured on and that cannot be reached."""


class DepotError(AutocompressError):
    """Shared storage that cannot be read or written."""


ENDS = (StudyError, DeviceError, DepotError)
"""Errors that the next candidate would meet, too."""


class NoFeasiblePointError(AutocompressError):
    """No point of the front satisfies the request; the message names the nearest."""


class ExportError(AutocompressError):
    """An export that was refused or that does not reproduce its score."""


def quoted(path: object) -> str:
    """Return a path as a shell takes it, for commands that can be copied."""
    return shlex.quote(str(path))


def first_line(error: BaseException) -> str:
    """Return what can be quoted of an error that is not ours."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= 200 else f"{line[:199]}…"
