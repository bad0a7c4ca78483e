"""The command line: ``omrl check``, ``list``, ``data``, ``lineage``, ``verify``, ``init``, ``video``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from omrl import __version__
from omrl.core import registry
from omrl.core.errors import UserError, run

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="OMRL: offline meta-reinforcement learning, from tasks to tables. Results are built by 'dvc repro'.",
)


def _version(value: bool) -> None:
    if value:
        print(f"omrl {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Common options."""


@app.command()
def check(file: Annotated[Path, typer.Argument(help="a params.yaml")] = Path("params.yaml")) -> None:
    """Check everything in a params.yaml and count the cells it asks for."""
    from omrl.experiment import check as check_params

    cells = check_params(file)
    print(f"{file}: ok, {len(cells)} cells")


@app.command(name="list")
def list_() -> None:
    """List environments, algorithms and evaluation protocols."""
    for title, package in (("environments", "omrl.envs"), ("algorithms", "omrl.algorithms")):
        print(f"{title}:")
        for name in registry.names(package):
            try:
                text = registry.load(package, name).__doc__ or ""
            except UserError as error:  # a plug-in's trouble is no reason to show nothing
                text = str(error)
            print(f"  {name:<22}{(text.strip() or '-').splitlines()[0]}")
    from omrl.evaluation.protocols.base import protocols

    print("evaluation protocols:")
    for name, summary in protocols().items():
        print(f"  {name:<22}{summary}")


@app.command()
def data(path: Annotated[Path, typer.Argument(help="a dataset folder or a Parquet file")]) -> None:
    """Show a dataset's card: rows, returns by checkpoint, ranges."""
    from omrl.data.cards import describe

    print(describe(path))


@app.command()
def lineage(
    target: Annotated[
        str,
        typer.Argument(
            help="focal/expert/expert, reports/metrics.json:focal.expert.expert.mean, a folder or file under data/, "
            "or one row: data/datasets/expert/task=003.parquet:17"
        ),
    ],
    row: Annotated[int | None, typer.Option(help="row of a Parquet file")] = None,
    pipeline: Annotated[Path | None, typer.Option(help="folder of the pipeline; else told by the target")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
) -> None:
    """Show what is behind a number, a model, a dataset, a file or one of its rows.

    Ends with code 1 if something on disk is not what dvc.lock records.
    """
    from omrl.provenance.lineage import trace, tree
    from omrl.provenance.lockfile import Pipeline, find_pipeline

    name, colon, rest = target.partition(":")
    folder = pipeline if pipeline is not None else find_pipeline(Path(name))
    full, top = Path(name).resolve(), folder.resolve()
    inside = full.is_relative_to(top)
    # "data/..." is meant from the pipeline's folder even where the shell is elsewhere
    if Path(name).exists() and not (folder / name).exists() and not inside:
        raise UserError(f"{name}: not in the pipeline {folder}")
    if inside and (Path(name).exists() or {"data", "reports"} & set(Path(name).parts)):
        name = full.relative_to(top).as_posix()
    result = trace(Pipeline(folder), f"{name}{colon}{rest}", row)
    print(json.dumps(result, indent=1, sort_keys=True) if as_json else tree(result))
    if result["problems"]:
        raise typer.Exit(1)


@app.command()
def verify(
    pipeline: Annotated[Path | None, typer.Option(help="one pipeline; else all that have a dvc.lock")] = None,
) -> None:
    """Check every output against dvc.lock, the cache objects behind it, and the manifests."""
    from omrl.provenance.lockfile import Pipeline, all_pipelines
    from omrl.provenance.verify import verify as verify_pipeline

    folders = [pipeline] if pipeline is not None else all_pipelines()
    if not folders:
        raise UserError("no dvc.lock here or in pipelines/*; run 'dvc repro' first, or name a folder with --pipeline")
    total = 0
    for folder in folders:
        built = Pipeline(folder)
        if pipeline is None and not (folder / "data").is_dir():
            print(f"{folder}: not built here (no data/), skipped")
            continue
        checked, damage = verify_pipeline(built)
        for entry in damage:
            print(f"DAMAGED {entry}")
        total += len(damage)
        print(f"{folder}: {checked} files and cache objects checked, {len(damage)} damaged")
    if total:
        raise typer.Exit(1)


@app.command()
def init(
    name: Annotated[Path, typer.Argument(help="the new folder")],
    source: Annotated[str, typer.Option("--from", help="pipeline to begin as: a name, or a folder")] = "default",
    plugin: Annotated[bool, typer.Option("--plugin", help="with a method of one's own and its test")] = False,
) -> None:
    """Write the folder of a new experiment, which runs at once."""
    from omrl.scaffold.init import init as write

    for path in write(name, source, plugin):
        print(path)
    print(f"next: cd {name} && git init && dvc repro")


@app.command()
def video(
    model: Annotated[Path, typer.Argument(help="a folder data/models/<algorithm>/<dataset>/<seed>")],
    task: Annotated[int | None, typer.Option(help="index of the task; else the first test task")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="the GIF to write")] = Path("video.gif"),
) -> None:
    """Draw an adapted policy beside the unadapted one, as a GIF."""
    from omrl.video import write

    print(write(model, task, output))


def entry() -> None:
    """Run the command line with OMRL's way of telling errors."""
    run(lambda: app(prog_name="omrl", standalone_mode=True))


if __name__ == "__main__":
    entry()
    sys.exit(0)
