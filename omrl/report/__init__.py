"""The report: tables, pictures, metrics and lineage of every number."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from omrl.core.config import Config
from omrl.core.errors import suggest
from omrl.report.published import TABLES, Published


class ReportConfig(Config):
    """Section ``report``.

    Attributes:
        title: heading of the page and of results.md; the environment's name if it is empty.
        bootstrap_samples: replicates behind each interval.
        confidence: level of the intervals.
        embedding: projection of the task embeddings to the plane.
        published: names of published tables to stand beside ours, or one name; ``omrl list report`` shows them.
    """

    title: Annotated[str, Field(max_length=100, pattern=r"^[^\n\r]*$")] = ""
    bootstrap_samples: Annotated[int, Field(ge=10, le=1_000_000)] = 2000
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    embedding: Literal["pca", "tsne"] = "pca"
    published: list[str] = []

    @field_validator("published", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        return [] if value is None else [value] if isinstance(value, str) else value

    @field_validator("published")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        for name in value:
            if name not in TABLES:
                raise ValueError(f"no such published table; {suggest(name, TABLES)}")
        if len(set(value)) < len(value):
            raise ValueError("expected each table once")
        return value

    @property
    def tables(self) -> list[Published]:
        """The published tables, in the order of ``published``."""
        return [TABLES[name] for name in self.published]
