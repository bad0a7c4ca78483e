"""SAC engines on the same work: environment steps per second, and learning curves over seeds.

``python benchmarks/engines.py speed [SECONDS]`` gives task-steps, with one gradient step each, per second of processor
time on one core and thread: of SB3, of SBX (SB3 in JAX, if ``make bench-sbx`` has made its environment) and of the
batched engine, with both kinds of kernels. ``of peak`` is the share of what one large matrix product of the same run
reaches. ``python benchmarks/engines.py parity [picture.png]`` trains one task of each family with several seeds and
prints the mean return of the deterministic policy by step, with 95 % intervals of the mean over seeds (Student), and
draws the curves.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _bench import ROOT
from scipy import stats

from omrl.behavior import batched, sb3
from omrl.behavior.base import PROGRESS, BehaviorConfig, Run
from omrl.envs.base import load_family

ENGINES = {"sb3": sb3.train, "batched": batched.train}
SBX = ROOT / ".venv-sbx/bin/python"
CHEETAH = {"gamma": 0.99, "learning_starts": 100}
SPEED: dict[str, tuple[str, int, dict[str, Any]]] = {  # family, tasks of the batched engine, settings
    "point robots, 64 x 64, batch 128": ("sparse-point-robot", 20, {"batch_size": 128, "net_arch": [64, 64]}),
    "half-cheetah, 128 x 128, batch 128": ("half-cheetah-vel", 10, CHEETAH | {"net_arch": [128, 128]}),
    "half-cheetah, 256 x 256, batch 256": (
        "half-cheetah-vel",
        10,
        CHEETAH | {"net_arch": [256, 256], "batch_size": 256},
    ),
}
MUJOCO = {"gamma": 0.99, "learning_starts": 1000, "net_arch": [64, 64], "ent_coef": "auto_0.2"}
PARITY: dict[str, tuple[int, dict[str, Any]]] = {  # steps, settings
    "sparse-point-robot": (2000, {}),
    "half-cheetah-vel": (20000, MUJOCO),
    "hopper-rand-params": (20000, MUJOCO),
}
SEEDS = 5


def train(engine: str, env: str, runs: list[Run], folder: Path, **values: Any) -> float:
    """Train ``runs`` and return the seconds it took."""
    extra = values.pop("extra", {})
    config = BehaviorConfig.model_validate({"engine": engine, **values, **extra})
    start = time.perf_counter()
    ENGINES[engine](env, {}, runs, config, folder / "work", f"{engine}, {env}", 0)
    return time.perf_counter() - start


def runs_of(env: str, count: int, folder: Path, same_task: bool) -> list[Run]:
    """Return ``count`` runs: seeds of one task, or tasks."""
    folder.mkdir(parents=True)
    family = load_family(env)
    return [Run(i, family.sample(0 if same_task else i, 1337), i, str(folder / str(i))) for i in range(count)]


def measured(who: str, settings: dict[str, Any]) -> dict[str, float]:
    """Return what ``_peer.py`` measured in a process of its own."""
    python = str(SBX) if who == "sbx" else sys.executable
    one_thread = {
        "OMP_NUM_THREADS": "1",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
        "PYTHONPATH": str(ROOT),
    }
    command = [python, str(ROOT / "benchmarks/_peer.py"), who, json.dumps(settings)]
    run = subprocess.run(command, env=os.environ | one_thread, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return found


def speed(seconds: float) -> None:
    """Print task-steps per second of processor time, one gradient step each, as a table."""
    if not SBX.exists():
        print(f"no {SBX.relative_to(ROOT)}: without SBX ('make bench-sbx' makes its environment)")
    print("| work | SB3 | SBX | float32 | of peak | fast | of peak | fast to SB3 | fast to SBX |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name, (env, tasks, sac) in SPEED.items():
        config = BehaviorConfig.model_validate({"sac": sac})
        settings = {
            "core": max(os.sched_getaffinity(0)),
            "env": env,
            "horizon": config.horizon,
            "sac": config.resolved()["sac"],
            "seconds": seconds,
            "tasks": tasks,
        }
        cells, ours = [], {}
        peers = {who: measured(who, settings)["steps"] for who in ("sb3", "sbx") if who == "sb3" or SBX.exists()}
        for kind in ("float32", "fast"):
            found = measured("batched", settings | {"matmul": kind})
            ours[kind] = found["steps"]
            cells += [f"{found['steps']:,.0f}", f"{found['steps'] * found['operations'] / found['peak']:.0%}"]
        rates = [f"{peers[who]:,.0f}" if who in peers else "" for who in ("sb3", "sbx")]
        ratios = [f"{ours['fast'] / peers[who]:.1f}" if who in peers else "" for who in ("sb3", "sbx")]
        print("| " + " | ".join([f"{name}, {tasks} tasks", *rates, *cells, *ratios]) + " |", flush=True)


def parity(picture: str | None) -> None:
    """Print and draw learning curves of both engines."""
    curves: dict[str, dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]] = {}
    for env, (steps, sac) in PARITY.items():
        curves[env] = {}
        for engine in ENGINES:
            with tempfile.TemporaryDirectory() as where:
                folder = Path(where)
                runs = runs_of(env, SEEDS, folder / engine, True)
                train(engine, env, runs, folder, total_steps=steps, checkpoint_every=steps // 8, sac=sac)
                tables = [list(csv.DictReader((Path(run.folder) / PROGRESS).open())) for run in runs]
            at = np.array([int(row["step"]) for row in tables[0]])
            curves[env][engine] = at, np.array([[float(row["return"]) for row in rows] for rows in tables])
        print(f"\n{env}, {SEEDS} seeds of one task\n| step | sb3 | batched |\n|---:|---:|---:|")
        at = curves[env]["sb3"][0]
        for place, step in enumerate(at):
            cells = []
            for engine in ("sb3", "batched"):
                values = curves[env][engine][1][:, place]
                cells.append(f"{values.mean():.2f} ± {half_width(values[:, None])[0]:.2f}")
            print(f"| {step} | {cells[0]} | {cells[1]} |", flush=True)
        difference = curves[env]["batched"][1].mean(1), curves[env]["sb3"][1].mean(1)
        test = stats.ttest_ind(*difference, equal_var=False)
        print(f"mean over the curve: difference {np.subtract(*map(np.mean, difference)):.2f}, p = {test.pvalue:.2f}")
    if picture:
        draw(curves, picture)


def half_width(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return half the 95 % interval of the mean over rows."""
    rows = len(values)
    return stats.t.ppf(0.975, rows - 1) * values.std(0, ddof=1) / np.sqrt(rows)


def draw(curves: dict[str, dict[str, tuple[Any, Any]]], picture: str) -> None:
    """Draw the curves with their intervals."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(4.2 * len(curves), 3.2), layout="constrained")
    for ax, (env, engines) in zip(np.atleast_1d(axes), curves.items(), strict=True):
        for color, (engine, (at, values)) in zip(("#888888", "#0b6e99"), engines.items(), strict=True):
            mean, half = values.mean(0), half_width(values)
            ax.plot(at, mean, color=color, label=engine)
            ax.fill_between(at, mean - half, mean + half, color=color, alpha=0.25, lw=0)
        ax.set(title=env, xlabel="environment steps", ylabel="return")
    np.atleast_1d(axes)[0].legend(frameon=False)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    what = sys.argv[1] if len(sys.argv) > 1 else "speed"
    if what == "parity":
        parity(sys.argv[2] if len(sys.argv) > 2 else None)
    else:
        speed(float(sys.argv[2]) if len(sys.argv) > 2 else 4.0)
