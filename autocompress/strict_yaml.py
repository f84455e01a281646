"""YAML as this project accepts it: plain data, no repeated keys, no aliases, bounded size.

PyYAML's safe loader silently keeps the last of two equal keys, expands aliases without limit and reads ``1e-3`` as
text. A run file in which any of these happens says something else than its author meant, so all are handled here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from autocompress.errors import ConfigError

MAX_BYTES = 1_000_000


class _Dumper(yaml.SafeDumper):
    """Quotes texts that the loader would read as something else."""


class _StrictLoader(yaml.SafeLoader):
    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.constructor.ConstructorError(None, None, "aliases are not accepted; write the value out", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


# YAML 1.2 reads 1e-3 as a number; PyYAML's 1.1 pattern wants a dot and a sign.
for _class in (_StrictLoader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
        list("-+.0123456789"),
    )


def dump(data: Any) -> str:
    """Return plain data as YAML that `parse` reads back as it is."""
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False))


def parse(text: str, source: str) -> Any:
    """Parse YAML text; ``source`` names it in messages.

    Raises:
        ConfigError: on syntax errors, tags that construct objects, aliases, duplicate keys or more than 1 MB.
    """
    if len(text.encode()) > MAX_BYTES:
        raise ConfigError(f"{source}: larger than {MAX_BYTES:,} bytes, not a run file or search space")
    try:
        # The loader derives from SafeLoader.
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506  # nosec B506
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise ConfigError(f"{source}: {where}{error.problem}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{source}: not readable as YAML ({str(error).splitlines()[0]})") from None


def read(path: Path) -> Any:
    """Parse the YAML file at ``path``; errors name the file.

    Raises:
        ConfigError: as `parse`, or if the file cannot be read as UTF-8 text.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path.name}: larger than {MAX_BYTES:,} bytes, not a run file or search space")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text ({error})") from None
    return parse(text, path.name)
