"""The agent collects its context and keeps in-distribution, high-return episodes (IDAQ).

Wang et al., NeurIPS 2023, with its return-based quantification: as ``online-prior``, but only in-distribution episodes
are context. After the exploration, the best ``kept_share`` of its episodes by return are kept; a later episode enters
if it returns at least what the worst kept one did.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from omrl.envs.simulate import Episodes
from omrl.evaluation.protocols.base import Run
from omrl.evaluation.protocols.online_prior import OnlineConfig, run_online


class IdaqConfig(OnlineConfig):
    """The keys of ``online-prior``, and how much is kept.

    Attributes:
        kept_share: share of the exploration's episodes, the best by return, that stay in the context.
    """

    kept_share: Annotated[float, Field(gt=0, le=1)] = 0.2


def run(run: Run) -> Episodes:
    """Run the protocol on all tasks at once; return the last episode."""
    return run_online(run, run.config.kept_share)


CONFIG = IdaqConfig
