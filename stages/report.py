"""Put the report together."""

from __future__ import annotations

from pathlib import Path

from omrl.experiment import load
from omrl.report.build import build_report
from stages import run


def main() -> None:
    """Write reports/ and show the table."""
    params = load("env", "env_config", "report")
    build_report(env=params.env, family=params.family, config=params.report)
    print(Path("reports/results.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    run(main)
