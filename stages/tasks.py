"""Sample the tasks: parameters, oracle and random floor of each, and the split."""

from __future__ import annotations

from omrl.core import layout
from omrl.core.files import atomic_dir, input_hashes, write_json, write_manifest
from omrl.envs.contract import check_contract
from omrl.experiment import load
from stages import run


def main() -> None:
    """Write data/tasks/all.json and one data/tasks/<shard>.json for each shard.

    A shard's file holds nothing but its own tasks, so that adding training tasks leaves those before as they were.
    """
    params = load("env", "env_config", "tasks", "shards")
    family = params.family
    head = {"env": params.env, "spec": family.spec(), "seed": params.tasks.seed}
    tasks = family.tasks(params.tasks.train, params.tasks.test, params.tasks.seed)
    check_contract(family, tasks)
    with atomic_dir(layout.TASKS.parent) as folder:
        rows = [
            {
                "index": index,
                "split": "train" if index < params.tasks.train else "test",
                "parameters": task,
                "oracle_return": family.oracle_return(task),
                "random_return": family.random_return(task),
            }
            for index, task in enumerate(tasks)
        ]
        split = {part: [row["index"] for row in rows if row["split"] == part] for part in ("train", "test")}
        write_json(folder / layout.TASKS.name, {**head, **split, "tasks": rows})
        for shard, (first, last) in params.shards.items():
            members = [{"index": i, "parameters": tasks[i]} for i in range(first, last + 1)]
            write_json(folder / layout.tasks(shard).name, {**head, "tasks": members})
        write_manifest(
            folder,
            kind="tasks",
            inputs=input_hashes(layout.code("stages", "tasks"), layout.code("envs", params.env)),
            parameters={"env": params.env, "env_config": params.env_config, "tasks": params.tasks.resolved()},
            files={path.name: None for path in (layout.TASKS, *map(layout.tasks, params.shards))},
            packages=("numpy",),
        )


if __name__ == "__main__":
    run(main)
