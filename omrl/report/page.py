"""The HTML page: one file that needs nothing else."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, StrictUndefined

from omrl.report.template import PAGE


@dataclass(frozen=True)
class Picture:
    """A picture with its caption.

    Attributes:
        name: file name in reports/figures without suffix.
        title: heading.
        caption: what to see in it.
        png: its bytes.
    """

    name: str
    title: str
    caption: str
    png: bytes

    @property
    def uri(self) -> str:
        """The picture as a data URI."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


def render(**values: Any) -> str:
    """Return index.html; ``values`` are what the template names."""
    # -0.00 is a rounding of nothing
    values["signed"] = lambda x: f"{x:.2f}".replace("-0.00", "0.00")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(PAGE).render(**values)
