"""YAML as DVC reads and writes it: version 1.2, where PyYAML's own is 1.1.

To version 1.1 ``1e-5`` is text, ``on`` and ``yes`` are true and ``12:30`` is 750. DVC writes the number and the
words like that, without quotes, into dvc.lock and, with ``dvc exp run -S``, into params.yaml.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_SCALARS = {f"tag:yaml.org,2002:{name}" for name in ("bool", "float", "int", "timestamp")}
_BOOL = r"^(?:true|True|TRUE|false|False|FALSE)$"
_INT = r"^(?:[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+)$"
_FLOAT = (
    r"^(?:[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)[eE][-+]?[0-9]+"
    r"|[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)


def version_1_2(loader: Any) -> Any:
    """Class decorator: let a PyYAML loader tell numbers, truth and text apart as version 1.2 does."""
    loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in entries if tag not in _SCALARS]
        for first, entries in loader.yaml_implicit_resolvers.items()
    }
    loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(_BOOL), list("tTfF"))
    loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(_INT), list("-+0123456789"))
    loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+.0123456789"))
    return loader


@version_1_2
class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The safe loader, in C where PyYAML has it."""
