"""Loading a dataset into training arrays: ours, with every checksum verified, against pandas.read_parquet."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from _bench import best

from omrl.core.files import write_manifest
from omrl.data.parquet import write_transitions
from omrl.data.schema import TYPES, VECTORS
from omrl.data.taskdata import TaskData

TASKS, ROWS, WIDTH = 20, 10_000, 20


def main() -> None:
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for task in range(TASKS):
            columns = {}
            for key, kind in TYPES.items():
                shape = (ROWS, WIDTH) if key in VECTORS else (ROWS,)
                columns[key] = rng.normal(size=shape).astype(kind)
            write_transitions(folder / f"task={task:03d}.parquet", columns, {})
        files = {f"task={task:03d}.parquet": ROWS for task in range(TASKS)}
        write_manifest(folder, kind="dataset", inputs={}, parameters={}, files=files)
        stored = sum((folder / file).stat().st_size for file in files) / 1e6

        def peer() -> None:
            for key in ("observation", "action", "next_observation"):
                frames = [pd.read_parquet(folder / file, columns=[key, "reward", "sparse_reward"]) for file in files]
                np.stack([np.stack(frame[key].to_list()) for frame in frames])

        loaded = TaskData.load(folder, list(range(TASKS)))
        fields = ("observation", "action", "next_observation", "reward", "sparse_reward", "terminal")
        size = sum(getattr(loaded, field).nbytes for field in fields) / 1e6
        theirs, ours = best(peer, 2), best(lambda: TaskData.load(folder, list(range(TASKS))))
        print(f"{TASKS} tasks x {ROWS} rows x {WIDTH} numbers: {stored:.0f} MB stored, {size:.0f} MB of arrays")
        print(f"{'pandas.read_parquet, stacked':<46}{size / theirs:>14,.0f} MB/s")
        print(f"{'TaskData.load, all checksums verified':<46}{size / ours:>14,.0f} MB/s")
        print(f"{'ratio':<46}{theirs / ours:>14.1f} x")


if __name__ == "__main__":
    main()
