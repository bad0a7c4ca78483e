"""Put the report together: read what the plan names, write ``reports/``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from omrl import __version__
from omrl.behavior.base import PROGRESS, SCRIPT, task_folder
from omrl.core import layout
from omrl.core.errors import UserError
from omrl.core.files import (
    MANIFEST,
    atomic_dir,
    input_hash,
    read_input,
    read_json,
    read_manifest,
    verified,
    write_json,
    write_text,
)
from omrl.envs.base import Family
from omrl.report import ReportConfig, figures, page, scene, tables

_WITH_NUMBERS = (
    "curves", "online", "shift", "results", "profiles", "improvement", "embeddings", "context", "training", "behavior",
)  # fmt: skip
_KEPT = ("online", "shift", "curves", "trajectories", "results", "embeddings")  # the first two that are, go into git


def chain_of(folder: str | Path) -> dict[str, Any]:
    """Return the lineage of an output folder, read from the manifests: what it is, and the same of its inputs."""
    manifest = read_manifest(folder)
    inputs: dict[str, Any] = {}
    for path, digest in manifest["inputs"].items():
        found = input_hash(path)
        if found != digest:
            raise UserError(
                f"{path}: not what {Path(folder) / MANIFEST} was made from (SHA-256 {found[:12]}, expected "
                f"{digest[:12]}); run 'dvc repro'"
            )
        inputs[path] = digest
    return {
        "kind": manifest["kind"],
        "manifest": input_hash(folder),
        "inputs": inputs,
        "parameters": manifest["parameters"],
        "packages": manifest["packages"],
    }


def lineage(evaluations: list[tables.Evaluation]) -> dict[str, Any]:
    """Return lineage.json: every reported number's folders, and every folder's inputs by hash, down to the tasks."""
    numbers: dict[str, Any] = {}
    folders: dict[str, Any] = {}
    todo: list[str] = []
    for evaluation in evaluations:
        name = evaluation.folder.as_posix()
        numbers.setdefault("/".join(evaluation.cell), {})[str(evaluation.seed)] = name
        todo.append(name)
    while todo:
        folder = todo.pop()
        if folder not in folders:
            folders[folder] = chain_of(folder)
            todo += [path for path in folders[folder]["inputs"] if (Path(path) / MANIFEST).is_file()]
    return {"numbers": numbers, "folders": folders}


def _progress(shards: dict[str, list[int]]) -> dict[int, pd.DataFrame]:
    return {
        task: pd.read_csv(*verified(layout.behavior(shard), [f"{task_folder(task)}/{PROGRESS}"]))
        for shard, (first, last) in shards.items()
        for task in range(first, last + 1)
    }


def _color_values(tasks: list[dict[str, Any]]) -> tuple[dict[int, float], str]:
    """Return a number per task that pictures can color by, and what it means: an angle or number that varies."""
    for key in ("goal", "wind"):
        values = [t["parameters"].get(key) for t in tasks]
        if all(v is not None and len(v) == 2 for v in values) and len({tuple(v) for v in values}) > 1:
            angles = np.degrees(np.arctan2([v[1] for v in values], [v[0] for v in values]))
            angles = np.round(angles, 6) % 360  # the end of a half circle is 180, not -180 by a rounding
            return {t["index"]: float(a) for t, a in zip(tasks, angles, strict=True)}, f"angle of the {key} (degrees)"
    for key in tasks[0]["parameters"]:
        numbers = [t["parameters"].get(key) for t in tasks]
        if all(isinstance(v, int | float) for v in numbers) and len(set(numbers)) > 1:
            return {t["index"]: float(v) for t, v in zip(tasks, numbers, strict=True)}, key
    return {t["index"]: float(t["index"]) for t in tasks}, "task index"


def _lead(rows: list[tables.Row], references: dict[str, float], facts: dict[str, Any]) -> str:
    best = max(rows, key=lambda row: row.summary.mean)
    algorithm, train, test = best.cell
    text = (
        f"{algorithm} trained on {train} data and given {test} context reaches {best.summary.mean:.2f} "
        f"[{best.summary.low:.2f}, {best.summary.high:.2f}] on {facts['test_tasks']} unseen tasks, where "
        + (f"an oracle has {references['oracle']:.2f} and " if "oracle" in references else "")
        + f"random actions have {references['random']:.2f}."
    )
    text += page.verdict(rows)
    compared = [(row.summary.mean, quoted) for row in rows if (quoted := row.quoted("return"))]
    if compared:
        above = sum(mean >= max(quote.value for quote in quoted) for mean, quoted in compared)
        text += f" Of {len(compared)} published cells, {above} are reached or exceeded."
    return f"{text} {tables.unlearned(rows)}".strip()


# name -> title and caption of a picture, in the order of the page
_CAPTIONS = {
    "curves": (
        "Learning curves",
        "Return on unseen tasks against gradient steps: the mean of the seeds, and their range. Dotted lines: the "
        "oracle, where it is known, and random actions.",
    ),
    "online": (
        "Return over environment steps",
        "Return on unseen tasks against the steps that every task took in the environment while the method learned "
        "on. It starts at what offline training alone reaches; shaded: {confidence} interval over tasks and whole "
        "seeds. Evaluation episodes are not counted as steps.",
    ),
    "shift": (
        "Contexts of one's own",
        "Embeddings ({method}) of contexts that the agent collected itself and of offline contexts of the same size. "
        "Where crosses lie off the dots of their color, the policy is told something that it has not seen in the "
        "data. The number is the distance for unseen tasks, where 1 is how far tasks are apart. Models that learned "
        "on in the environment are on the plane of the model that they were.",
    ),
    "environment": (
        "The environment",
        "{environment}",
    ),
    "results": (
        "Results with intervals",
        "Dashed lines: controllers that need no learning. Bars may overlap although two algorithms differ, because"
        " both saw the same easy and hard tasks: the paired differences in the table decide.",
    ),
    "profiles": (
        "Performance profiles",
        "Share of runs (one seed on one unseen task) above a normalized return: 0 is random, 1 the oracle. A curve"
        " above another everywhere belongs to the better algorithm; one that falls early misses tasks altogether.",
    ),
    "improvement": (
        "Probability of improvement",
        "Chance, in percent, that a run of the row's algorithm does better than a run of the column's on the same "
        "unseen task; ties count half. 50 is a coin toss.",
    ),
    "trajectories": (
        "Unseen tasks on the plane",
        "Last episodes of a few test tasks. Stars are the hidden goals, discs where the sparse reward is given.",
    ),
    "embeddings": (
        "Task embeddings",
        "Embeddings of resampled contexts ({method}); dots are training tasks, triangles unseen ones. Good "
        "embeddings are tight per task and ordered by what the tasks differ in.",
    ),
    "attention": (
        "Attention of the context encoder",
        "Weights of single transitions, by whether they carry a reward; AUC is the chance that a rewarded one "
        "outweighs an unrewarded one (FOCAL++ Fig. 5c).",
    ),
    "sparsity": (
        "Embedding variance against sparsity",
        "Variance of a task's embedding over contexts by their share of unrewarded transitions (FOCAL++ Fig. 6); "
        "ticks at the bottom: Eq. 34's threshold, above which batch-wise attention is to lower it.",
    ),
    "context": (
        "Return against the size of the context",
        "How much offline context of an unseen task the method needs; the last point is the counted one.",
    ),
    "training": (
        "Meta-training",
        "Scalars of every model against gradient steps, one line per seed.",
    ),
    "behavior": (
        "Behavior policies",
        "Deterministic return of each task's SAC policy at its checkpoints.",
    ),
    "datasets": (
        "What the datasets hold",
        "Returns of the behavior episodes in each dataset, over the steps of a test episode.",
    ),
}


def _pictures(
    rows: list[tables.Row],
    evaluations: list[tables.Evaluation],
    references: dict[str, float],
    cards: dict[str, Any],
    progress: dict[int, pd.DataFrame],
    family: Family,
    tasks: list[dict[str, Any]],
    config: ReportConfig,
    environment: tuple[str, bytes | None],
) -> list[page.Picture]:
    colors, meaning = _color_values(tasks)
    method = "principal components" if config.embedding == "pca" else "t-SNE"
    best = max(rows, key=lambda row: row.summary.mean).cell
    path = next(e for e in evaluations if e.cell == best)
    normalized = tables.cell_scores(evaluations, "normalized")
    scores = tables.cell_scores(evaluations, "return")
    drawn: dict[str, bytes | None] = {
        "curves": figures.learning_curves(evaluations, references, family.returns),
        "environment": environment[1] and figures.scene(environment[1]),
        "results": figures.results(rows, references, family.returns),
        "profiles": figures.profiles(normalized),
        "improvement": figures.improvements(scores),
        "online": figures.online_curves(
            figures.online_frame(evaluations, config.bootstrap_samples, config.confidence), references, family.returns
        ),
        "shift": figures.shifts(evaluations, rows, config.embedding, colors, meaning),
        "trajectories": figures.trajectories(path, family, {t["index"]: t for t in tasks}),
        "embeddings": figures.embeddings(evaluations, config.embedding, colors, meaning),
        "attention": figures.attention(evaluations),
        "sparsity": figures.sparsity(evaluations),
        "context": figures.context_curves(evaluations, family.returns),
        "training": figures.training_curves(evaluations),
        "behavior": figures.behavior_curves(progress, references, family.returns) if progress else None,
        "datasets": figures.dataset_returns(cards, family.returns),
    }
    texts = {"method": method, "environment": environment[0], "confidence": f"{config.confidence:.0%}"}
    return [
        page.Picture(name, title, caption.format(**texts), png, name if name in _WITH_NUMBERS else "")
        for name, (title, caption) in _CAPTIONS.items()
        if (png := drawn[name]) is not None
    ]


def _facts(
    env: str,
    family: Family,
    everything: dict[str, Any],
    cards: dict[str, Any],
    evaluations: list[tables.Evaluation],
    title: str,
) -> dict[str, Any]:
    return {
        "title": title or env,
        "env": env,
        "returns": family.returns,
        "horizon": family.horizon,
        "train_tasks": len(everything["train"]),
        "test_tasks": len(everything["test"]),
        "transitions": f"{next(iter(cards.values()))['rows_per_task']:,}",
        "seeds": len({e.seed for e in evaluations}),
        "protocol": evaluations[0].episodes["protocol"].iloc[0],
        "version": __version__,
        "other_form": "" if (other := family.restated()) is None else other.reward_form,
    }


def _links(
    rows: list[tables.Row], evaluations: list[tables.Evaluation], folders: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return every number with the hashes of the evaluation, the model and the data behind it."""
    return [
        {
            "algorithm": e.algorithm,
            "train": e.train,
            "test": e.test,
            "seed": e.seed,
            "mean": next(r for r in rows if r.cell == e.cell).seed_means[e.seed],
            "evaluation": folders[e.folder.as_posix()]["manifest"],
            "model": _model_hash(folders[e.folder.as_posix()]["inputs"]),
            "data": folders.get(layout.datasets(e.train).as_posix(), {}).get("manifest", ""),
        }
        for e in evaluations
    ]


def build_report(*, env: str, family: Family, config: ReportConfig, target: str | Path = "reports") -> None:
    """Write reports/.

    Small files that git keeps: results.csv, results.md, metrics.json, metrics/, diagnostics.json and two pictures in
    figures/. The rest is for DVC's cache: index.html, lineage.json, all other pictures/ and plots/.

    Raises:
        UserError: something the plan names is missing or damaged.
    """
    target = Path(target)
    plan, everything = read_input(layout.CELLS), read_input(layout.TASKS)
    tasks = everything["tasks"]
    evaluations = tables.load_evaluations(plan["evaluations"])
    cards = {name: read_json(*verified(layout.datasets(name), ["card.json"])) for name in plan["datasets"]}
    progress = _progress(plan["shards"])
    shard, (first, _) = next(iter(plan["shards"].items()))
    scripted = (layout.behavior(shard) / task_folder(first) / SCRIPT).is_file()
    rows = tables.table_rows(evaluations, config)
    references = tables.reference_rows(family, tasks, progress, "script" if scripted else "single-task SAC")
    behavior = tables.behavior_rows(cards)
    facts = _facts(env, family, everything, cards, evaluations, config.title)
    environment = scene.picture(family, tasks[0]["parameters"])
    curves = {} if scripted else progress  # nothing was learned
    pictures = _pictures(rows, evaluations, references, cards, curves, family, tasks, config, environment)
    chain = lineage(evaluations)
    results = tables.results_frame(evaluations)
    target.mkdir(parents=True, exist_ok=True)
    write_text(target / "results.csv", results.to_csv(index=False, lineterminator="\n"))
    write_json(target / "metrics.json", tables.metrics(rows, references))
    write_json(target / "diagnostics.json", tables.diagnostics(rows))
    with atomic_dir(target / "metrics") as folder:
        for name, value in tables.metric_files(rows, references).items():
            write_json(folder / f"{name}.json", value)
    write_text(target / "results.md", tables.markdown(rows, references, behavior, config, facts))
    write_json(target / "lineage.json", chain)
    kept = [name for name in _KEPT if name in {picture.name for picture in pictures}][:2]
    with atomic_dir(target / "figures") as figures_folder, atomic_dir(target / "pictures") as folder:
        for picture in pictures:
            place = figures_folder if picture.name in kept else folder
            (place / f"{picture.name}.png").write_bytes(picture.png)
    with atomic_dir(target / "plots") as folder:
        _plots(folder, rows, evaluations, progress, config)
    main, more = page.results_tables(
        rows, references, behavior, f"{config.confidence:.0%}", tables.quantities(config), facts
    )
    html = page.render(
        facts=facts,
        lead=_lead(rows, references, facts),
        main=main,
        more=more,
        published=config.tables,
        pictures=pictures,
        remark=environment[0] if environment[1] is None else "",
        datasets=page.datasets_table(cards, {name: _definition(card) for name, card in cards.items()}, behavior),
        commands=page.commands(rows[0].cell),
        chain=page.chain_table(_links(rows, evaluations, chain["folders"])),
    )
    write_text(target / "index.html", html)


def _model_hash(inputs: dict[str, str]) -> str:
    """Return the hash of the model among an evaluation's inputs."""
    roots = (f"{layout.MODELS.as_posix()}/", f"{layout.ONLINE.as_posix()}/")
    return next(digest for path, digest in inputs.items() if path.startswith(roots))


def _definition(card: dict[str, Any]) -> str:
    chosen = {k: v for k, v in card["definition"].items() if v is not None and v is not False and v != {}}
    if (own := card.get("normalized_return")) is not None:
        chosen["normalized return"] = f"{own:.2f}"
    return ", ".join(f"{key} {value}" for key, value in chosen.items())


def _plots(
    folder: Path,
    rows: list[tables.Row],
    evaluations: list[tables.Evaluation],
    progress: dict[int, pd.DataFrame],
    config: ReportConfig,
) -> None:
    """Write the CSV files behind ``dvc plots``."""

    def write(name: str, frame: pd.DataFrame) -> None:
        frame.to_csv(folder / f"{name}.csv", index=False, lineterminator="\n", float_format="%.9g")

    models: dict[tuple[str, str, int], pd.DataFrame] = {}
    for e in evaluations:
        models.setdefault((e.algorithm, e.train, e.seed), e.curve)
    write("training", pd.concat([c.assign(model=f"{a}/{d}/{s}") for (a, d, s), c in models.items()]))
    curves = pd.concat([c.assign(task=t) for t, c in progress.items()])
    mean = curves.groupby("step")["return"].agg(["mean", "min", "max"]).reset_index()
    write("behavior", mean.rename(columns={"mean": "return"}))
    cells = list(dict.fromkeys(e.cell for e in evaluations))
    members = {cell: [e for e in evaluations if e.cell == cell] for cell in cells}
    write("context", pd.concat([figures.context_frame(m).assign(cell="/".join(c)) for c, m in members.items()]))
    write(
        "embeddings",
        pd.concat(
            [figures.embedding_frame(m[0], config.embedding).assign(cell="/".join(c)) for c, m in members.items()]
        ),
    )
    write("curves", figures.learning_frame(evaluations))
    write("online", figures.online_frame(evaluations, config.bootstrap_samples, config.confidence))
    write("shift", figures.shift_frame(evaluations, config.embedding))
    write("profiles", figures.profile_frame(tables.cell_scores(evaluations, "normalized")))
    write("improvement", figures.improvement_frame(tables.cell_scores(evaluations, "return")))
    write(
        "results",
        pd.DataFrame(
            {
                "cell": ["/".join(row.cell) for row in rows],
                "return": [row.summary.mean for row in rows],
                "low": [row.summary.low for row in rows],
                "high": [row.summary.high for row in rows],
            }
        ),
    )
