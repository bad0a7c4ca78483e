"""The report: tables, pictures, metrics and lineage of every number."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from omrl.core.config import Config
from omrl.core.errors import suggest
from omrl.report.published import TABLES


class ReportConfig(Config):
    """Section ``report``.

    Attributes:
        bootstrap_samples: replicates behind each interval.
        confidence: of the intervals.
        embedding: projection of the task embeddings to the plane.
        published: name of a published table to stand beside ours, see ``omrl.report.published``.
    """

    bootstrap_samples: Annotated[int, Field(ge=10, le=1_000_000)] = 2000
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    embedding: Literal["pca", "tsne"] = "pca"
    published: str | None = None

    @field_validator("published")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None and value not in TABLES:
            raise ValueError(f"no such published table; {suggest(value, TABLES)}")
        return value
