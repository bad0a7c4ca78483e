"""The command line: ``omrl check``, ``repro``, ``results``, ``compare``, ``list``, ``data``, ``lineage``, ..."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from omrl import __version__
from omrl.core import registry
from omrl.core.errors import UserError, for_terminal, run

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="OMRL: offline meta-reinforcement learning, from tasks to tables. 'omrl repro' builds results.",
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
def check(
    file: Annotated[Path, typer.Argument(help="a params.yaml, or a pipeline's folder or name")] = Path("params.yaml"),
) -> None:
    """Check everything in a params.yaml and count the cells it asks for."""
    from omrl.experiment import check as check_params
    from omrl.running.schedule import find_folder

    if file.is_dir() or not (file.suffix or file.exists()):
        file = find_folder(str(file)) / "params.yaml"
    cells = check_params(file)
    print(f"{file}: ok, {len(cells)} cells")


@app.command()
def repro(
    pipeline: Annotated[str | None, typer.Argument(help="a folder, or a name in pipelines/; else the one here")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="cores to use; else OMRL_WORKERS, else all")] = None,
    scheduler: Annotated[str | None, typer.Option(help="address of a Dask scheduler, such as tcp://host:8786")] = None,
    dry: Annotated[bool, typer.Option("--dry", help="only say which cells would run, and why")] = False,
) -> None:
    """Bring a pipeline up to date as 'dvc repro' does, cells that are ready in parallel.

    Ends with code 1 if a cell failed; the others that do not need it are run all the same.
    """
    from omrl.running import schedule

    folder = schedule.find_folder(pipeline)
    if dry:
        print("\n".join(schedule.explain(folder)))
        return
    try:
        failed = schedule.repro(folder, jobs, scheduler)
    except (KeyboardInterrupt, schedule.Terminated) as stop:
        word, code = ("terminated", 143) if isinstance(stop, schedule.Terminated) else ("interrupted", 130)
        print(f"{word}; finished work is kept, run again to resume", file=sys.stderr)
        raise typer.Exit(code) from None
    if failed:
        raise typer.Exit(1)


@app.command(name="list")
def list_(
    name: Annotated[str | None, typer.Argument(help="a section of params.yaml, or what the list has; else all")] = None,
    markdown: Annotated[Path | None, typer.Option(help="write every key of params.yaml to this page")] = None,
) -> None:
    """List environments, algorithms and evaluation protocols; or show one, or a section, with its keys."""
    if name is not None or markdown is not None:
        from omrl import settings
        from omrl.core.files import write_text

        if name is not None:
            print(for_terminal(settings.as_text(settings.entry(name))))
        if markdown is not None:
            write_text(markdown, settings.as_page())
        return
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
def data(path: Annotated[Path, typer.Argument(help="a folder under data/, a Parquet or a JSON file")]) -> None:
    """Show what is in a folder: a dataset's card with returns by checkpoint, else what it was made from."""
    from omrl.report.folders import describe

    print(for_terminal(describe(path)))


@app.command()
def results(
    pipeline: Annotated[str | None, typer.Argument(help="a folder, or a name in pipelines/; else the one here")] = None,
    everything: Annotated[bool, typer.Option("--all", help="the root's and those of all pipelines")] = False,
    markdown: Annotated[Path | None, typer.Option(help="write one Markdown table to this file")] = None,
) -> None:
    """Show results, ours beside published, with interval, protocol and source."""
    from omrl.core.files import write_text
    from omrl.report import collect
    from omrl.running.schedule import find_folder

    if everything:
        here = find_folder(None)
        top = here.resolve().parents[1] if here.resolve().parent.name == "pipelines" else here
        found = collect.all_results([top, *sorted(p for p in (top / "pipelines").glob("*") if p.is_dir())])
    else:
        found = [collect.Result(find_folder(pipeline))]
    if not found:
        raise UserError("no reports/results.csv here or in pipelines/*; run 'omrl repro' first")
    if markdown is not None:
        write_text(markdown, collect.as_page(found))
        print(f"{markdown}: {sum(len(result.cells) for result in found)} rows of {len(found)} pipelines")
    else:
        print(collect.as_text(found))


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="a pipeline's folder or name, or a git revision")],
    second: Annotated[str | None, typer.Argument(help="the same; else the files that are here")] = None,
    pipeline: Annotated[str | None, typer.Option(help="which pipeline revisions are of; else the one here")] = None,
) -> None:
    """Compare the results of two pipelines, or of two revisions of one, row by row."""
    from omrl.report.collect import Result
    from omrl.report.comparison import as_text
    from omrl.running.schedule import find_folder, is_revision

    def load(name: str | None) -> Result:
        folder = find_folder(pipeline) if name is None or is_revision(name) else find_folder(name)
        return Result(folder, name if name is not None and is_revision(name) else None)

    print(as_text(load(first), load(second)))


@app.command()
def experiments(
    pipeline: Annotated[str | None, typer.Argument(help="a folder, or a name in pipelines/; else the one here")] = None,
    commits: Annotated[int, typer.Option("-n", "--num", min=1, help="so many of the last commits, too")] = 1,
) -> None:
    """Show DVC's experiments beside each other: params that differ, then every result."""
    from omrl.report.experiments import experiments as table
    from omrl.running.schedule import find_folder

    print(table(find_folder(pipeline), commits))


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
    print(json.dumps(result, indent=1, sort_keys=True) if as_json else for_terminal(tree(result)))
    if result["problems"]:
        raise typer.Exit(1)


@app.command()
def video(
    model: Annotated[Path, typer.Argument(help="a model's folder, such as data/models/focal/expert/0")],
    task: Annotated[int | None, typer.Option(help="index of the task; else the first unseen one")] = None,
    dataset: Annotated[str | None, typer.Option(help="where the context is from; else the training dataset")] = None,
    transitions: Annotated[int, typer.Option(min=1, help="of context")] = 400,
    output: Annotated[Path, typer.Option("-o", "--output", help="GIF to write")] = Path("video.gif"),
) -> None:
    """Film a model on a task, before and after it has seen some context; in the pipeline's folder."""
    from omrl.report.video import video as film

    print(film(model, task, dataset, transitions, output))


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
        if pipeline is None and not (folder / "data").is_dir():
            print(f"{folder}: not built here (no data/), skipped")
            continue
        built = Pipeline(folder)
        checked, damage = verify_pipeline(built)
        for entry in damage:
            print(f"DAMAGED {for_terminal(str(entry))}")
        total += len(damage)
        print(f"{folder}: {checked} files and cache objects checked, {len(damage)} damaged")
    if total:
        raise typer.Exit(1)


@app.command()
def seeds(
    first: Annotated[int, typer.Argument(help="the first seed")],
    last: Annotated[int, typer.Argument(help="the last one, included")],
    file: Annotated[Path, typer.Option(help="a params.yaml")] = Path("params.yaml"),
) -> None:
    """Write a range of seeds into a params.yaml, as the list that DVC needs."""
    from omrl.scaffold.seeds import write_seeds

    write_seeds(file, first, last)
    print(f"{file}: {last - first + 1} seeds")


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
    print(f"next: cd {name} && omrl repro")


def entry() -> None:
    """Run the command line with OMRL's way of telling errors."""
    run(lambda: app(prog_name="omrl", standalone_mode=True))


if __name__ == "__main__":
    entry()
    sys.exit(0)
