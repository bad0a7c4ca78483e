"""YAML 1.2, as DVC reads and writes it: strictly what a person wrote, and fast what DVC wrote.

To PyYAML's own version 1.1 ``1e-5`` is text, ``on`` and ``yes`` are true and ``12:30`` is 750. DVC writes the number
and the words like that, without quotes, into dvc.lock and, with ``dvc exp run -S``, into params.yaml.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
)
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.resolver import implicit_resolvers

from omrl.core.errors import UserError, shown

_BYTES = 1_000_000
_DEPTH = 20  # brackets in brackets
_NODES = 100_000  # with every alias written out
_CHARACTERS = 1000  # of one key or value
_TIMESTAMP = "tag:yaml.org,2002:timestamp"


class _Problem(Exception):
    """What is wrong in the text, and the line, counted from 0."""

    def __init__(self, text: str, event: Any) -> None:
        super().__init__(text)
        self.line: int = event.start_mark.line


class _Constructor(SafeConstructor):
    """A date is text."""


_Constructor.add_constructor(_TIMESTAMP, SafeConstructor.construct_yaml_str)


@dataclass
class _Open:
    """A collection whose end is still to come."""

    anchor: str | None
    before: int  # nodes before it
    keys: set[str] | None  # of a mapping, so far
    expects_key: bool = True

    def take(self, event: Any) -> None:
        """Check the node as this collection's next member."""
        if self.keys is None:
            return
        if self.expects_key:
            if not isinstance(event, ScalarEvent):
                raise _Problem("a key that is neither text nor a number", event)
            if event.value in self.keys:
                raise _Problem(f"key {shown(event.value)} stands there twice", event)
            self.keys.add(event.value)
        self.expects_key = not self.expects_key


def _check(text: str) -> None:
    """Go over the parser's events, before anything is built, and refuse what could hurt or mislead."""
    sizes: dict[str, int] = {}  # of what is anchored, in nodes
    around: list[_Open] = []
    nodes = 0
    for event in YAML(typ="safe", pure=True).parse(text):
        if isinstance(event, DocumentStartEvent) and (event.version or event.tags):
            raise _Problem("a directive (%) has no place here", event)
        if isinstance(event, CollectionEndEvent):
            closed = around.pop()
            if closed.anchor:
                sizes[closed.anchor] = nodes - closed.before
        if not isinstance(event, NodeEvent):
            continue
        if around:
            around[-1].take(event)
        if isinstance(event, AliasEvent):
            if event.anchor not in sizes:
                raise _Problem(f"alias {shown('*' + event.anchor)} stands for nothing above it", event)
            nodes += sizes[event.anchor]
        else:
            nodes += 1
            tag = getattr(event, "tag", None)
            if tag is not None:
                short = shown(tag.replace("tag:yaml.org,2002:", "!!"))
                raise _Problem(f"tag {short}: write the value without a tag", event)
        if nodes > _NODES:
            raise _Problem(f"more than {_NODES} values, aliases written out", event)
        if isinstance(event, ScalarEvent):
            _check_text(event)
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, CollectionStartEvent):
            around.append(_Open(event.anchor, nodes - 1, set() if isinstance(event, MappingStartEvent) else None))
            if len(around) > _DEPTH:
                raise _Problem(f"nested deeper than {_DEPTH} levels", event)


def _check_text(event: Any) -> None:
    if len(event.value) > _CHARACTERS:
        raise _Problem(f"{len(event.value)} characters in one value: expected at most {_CHARACTERS}", event)
    if not event.value.isprintable():
        bad = next(c for c in event.value if not c.isprintable())
        raise _Problem(f"character U+{ord(bad):04X} in {shown(event.value)}: expected printable text", event)


def read(path: str | Path) -> Any:
    """Read a YAML file that a person wrote.

    Raises:
        UserError: no such file, not YAML, a key written twice, a tag, a directive, control characters, or more of
            something than a person writes; one line with file and line.
    """
    try:
        with open(path, "rb") as stream:
            content = stream.read(_BYTES + 1)
        text = content.decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: missing; run this in a folder with params.yaml and dvc.yaml") from None
    except (UnicodeDecodeError, OSError):
        raise UserError(f"{path}: expected a YAML text file in UTF-8 that can be read") from None
    if len(content) > _BYTES:
        raise UserError(f"{path}: longer than {_BYTES} bytes: expected a YAML file that a person wrote")
    try:
        _check(text)
        reader = YAML(typ="safe", pure=True)
        reader.Constructor = _Constructor
        return reader.load(text)
    except _Problem as error:
        line, problem = error.line, str(error)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, problem = mark.line if mark else 0, str(error.problem or error.context)
    except ReaderError as error:
        line, problem = text.count("\n", 0, error.position), f"character U+{error.character:04X} is not allowed"
    except (YAMLError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not valid YAML: {shown(error, 200, quote=False)}") from None
    raise UserError(f"{path}:{line + 1}: not valid YAML: {shown(problem, 200, quote=False)}")


class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """PyYAML's safe loader, in C where it has it, for dvc.lock: ten times as fast as ruamel.yaml (0.04 s for 180 kB).

    It tells numbers, truth and text apart by ruamel.yaml's table for version 1.2.
    """

    yaml_implicit_resolvers: dict[str, list[Any]] = {}


for _versions, _tag, _pattern, _first in implicit_resolvers:
    if (1, 2) in _versions and _tag != _TIMESTAMP:
        Loader.add_implicit_resolver(_tag, _pattern, _first)
