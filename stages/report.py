"""Put the report together."""

from __future__ import annotations

from omrl.experiment import load
from omrl.report.build import build_report
from stages import run


def main() -> None:
    """Write reports/."""
    params = load("env", "env_config", "report")
    build_report(env=params.env, family=params.family, config=params.report)


if __name__ == "__main__":
    run(main)
