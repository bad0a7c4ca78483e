"""A range of seeds as the list that DVC needs: its matrix makes a cell of each entry, and YAML has no ranges."""

from __future__ import annotations

import textwrap
from pathlib import Path

import yaml

from omrl.core.errors import UserError
from omrl.core.files import write_text
from omrl.core.yamlfile import read as read_yaml
from omrl.experiment import HIGHEST_SEED, MOST_CELLS

_WIDTH = 110


def write_seeds(path: Path, first: int, last: int) -> None:
    """Write ``seeds`` as the list from ``first`` to ``last``, both included; the rest of the file stays as it is.

    Raises:
        UserError: no such range, no such file, or the file has no key ``seeds``.
    """
    if not 0 <= first <= last <= HIGHEST_SEED or last - first >= MOST_CELLS:
        raise UserError(
            f"seeds {first} to {last}: expected 0 <= first <= last <= {HIGHEST_SEED}, and at most {MOST_CELLS} of them"
        )
    read_yaml(path)  # tells what is wrong with it
    text = path.read_text(encoding="utf-8")
    top = yaml.compose(text, Loader=yaml.SafeLoader)
    for key, value in top.value if isinstance(top, yaml.MappingNode) else ():
        if key.value == "seeds":
            line = textwrap.fill(
                f"seeds: {list(range(first, last + 1))}", _WIDTH, subsequent_indent="  ", break_on_hyphens=False
            )
            write_text(path, text[: key.start_mark.index] + line + text[_end(value) :])
            return
    raise UserError(f"{path}: seeds: missing; expected a params.yaml with that key")


def _end(node: yaml.Node) -> int:
    """Return where a node ends; the parser counts the comments after a block to it."""
    last = node
    while isinstance(last, yaml.CollectionNode) and not last.flow_style and last.value:
        last = last.value[-1][1] if isinstance(last, yaml.MappingNode) else last.value[-1]
    return int(last.end_mark.index)
