"""A seeded fault campaign on clones of the smoke pipeline: ``make campaign``.

Every case draws what goes wrong from its own seed, so that one can be run again alone (``--only damage:17``). It ends
in one of three ways. *Survived*: what was damaged was refused or named, what was interrupted ended with the bytes of an
undisturbed run. *Lost*: damage that nobody named, other bytes, a process that outlived its parent, a run that hangs or
does not go on. *Traceback*: a defect of ours was shown instead of one line. The exit code is 1 if there was any of the
last two.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from conftest import SMOKE, Project, clone, commit
from test_faults import running
from test_hostile_params import VALUES

from omrl import experiment
from omrl.algorithms.base import load_model
from omrl.behavior.checkpoints import load_actor
from omrl.core.errors import LONGEST, UserError, explain
from omrl.provenance.lineage import trace, tree
from omrl.provenance.lockfile import LOCK, Pipeline, Stage, parse_lock
from omrl.provenance.verify import Damage, verify
from omrl.report.folders import describe

PATIENCE_S = 300
SOON_S = 5.0


class Lost(Exception):
    """The promise was broken; the text says how."""


class Traced(Exception):
    """A traceback, or raw text, was shown."""


class Ground:
    """A built clone that cases work on; a case that breaks its promise gets the next one a fresh copy."""

    def __init__(self, base: Path, folder: Path) -> None:
        self.base, self.folder = Project(base), folder
        self.project = self.base.copy(folder / "0")
        self.lock = self.project.lock
        self.copies = 1

    def renew(self) -> None:
        """Throw the copy away, processes and all."""
        for number in running(self.project.folder, ""):
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        shutil.rmtree(self.project.folder, ignore_errors=True)
        self.project = self.base.copy(self.folder / str(self.copies))
        self.copies += 1

    @property
    def smoke(self) -> Path:
        return self.project.smoke

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start a command in the pipeline's folder, as a group of its own."""
        return subprocess.Popen(
            command, cwd=self.smoke, env=self.project.environment, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def damage(self) -> list[Damage]:
        """Return what ``omrl verify`` finds."""
        with contextlib.redirect_stderr(io.StringIO()):
            return verify(Pipeline(self.smoke))[1]

    def whole(self) -> None:
        """Demand that a plain run brings back the bytes of the undisturbed one."""
        text = ended(self.start("dvc", "repro"))
        if self.project.lock != self.lock:
            raise Lost(f"after 'dvc repro' dvc.lock is another: {text[-300:]}")
        if found := self.damage():
            raise Lost(f"after 'dvc repro' verify finds {found[0]}")


def ended(process: subprocess.Popen[str]) -> str:
    """Wait for a program; return what it said."""
    try:
        text, _ = process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise Lost("it hangs") from None
    if "Traceback (most recent" in text:
        raise Traced(text[-1500:])
    return text


def line_of(work: Callable[[], object]) -> str | None:
    """Return None for work that succeeds, else its one line; anything else is a traceback."""
    start = time.monotonic()
    try:
        work()
        line = None
    except Exception as error:
        line = explain(error)
        if line is None:
            raise Traced(f"{type(error).__name__}: {str(error)[:300]}") from error
        if not line.isprintable() or len(line) > LONGEST:
            raise Traced(f"raw or long: {line[:400]!r}") from error
    if time.monotonic() - start > PATIENCE_S / 10:
        raise Lost("it takes too long")
    return line


def mutated(content: bytes, draw: random.Random) -> tuple[str, bytes]:
    """Return what was done to a file's bytes, and the bytes."""
    place, size = draw.randrange(max(1, len(content))), len(content)
    kinds = {
        "flip": lambda: content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :],
        "cut": lambda: content[:place],
        "zeros": lambda: content[:place] + bytes(min(4096, size - place)) + content[place + 4096 :],
        "noise": lambda: content[:place] + draw.randbytes(64) + content[place + 64 :],
        "append": lambda: content + draw.randbytes(draw.randrange(1, 100)),
        "empty": lambda: b"",
        "twice": lambda: content + content,
    }
    name = draw.choice(["flip", "flip", *kinds]) if size else "append"
    return name, kinds[name]()


def overwrite(path: Path, content: bytes) -> None:
    """Write behind everybody's back: the times and the mode stay."""
    facts = path.stat()
    path.chmod(0o644)
    path.write_bytes(content)
    path.chmod(facts.st_mode)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


# --- cases: each returns what it did; it raises Lost or Traced ------------------------------------------------


def kill(ground: Ground, draw: random.Random) -> str:
    """One cell is forced to run and killed, or asked to stop, at any moment; then a plain run."""
    cell = draw.choice([name for name in Pipeline(ground.smoke).stages if name != "code"])
    way = draw.choice(["kill dvc", "kill all", "kill the stage", "SIGTERM to all", "SIGINT to all", "SIGHUP to all"])
    delay = draw.uniform(0, 10)
    what = f"{way} {delay:.1f} s into {cell}"
    process = ground.start("dvc", "repro", "--single-item", "--force", cell)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(delay)
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            if way == "kill dvc":
                process.kill()
            elif way == "kill the stage":
                for number in running(ground.project.folder, "stages."):
                    os.kill(number, signal.SIGKILL)
            else:
                number = signal.SIGKILL if way == "kill all" else signal.Signals[way.split()[0]]
                os.killpg(process.pid, number)
    try:
        text, _ = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        raise Lost(f"{what}: it goes on") from None
    if "Traceback (most recent" in text and "stages." in text:  # DVC shows its own on SIGINT
        raise Traced(f"{what}: {text[-1500:]}")
    deadline = time.monotonic() + 30
    while running(ground.project.folder, "stages."):
        if time.monotonic() > deadline:
            raise Lost(f"{what}: the stage outlives dvc")
        time.sleep(0.05)
    ground.whole()
    return what


def damage(ground: Ground, draw: random.Random) -> str:
    """One file of any output, of the cache, or dvc.lock is damaged: verify names it, who reads it refuses it."""
    pipeline = Pipeline(ground.smoke)
    stages = pipeline.stages
    files: dict[str, list[Path]] = {}
    for output in pipeline.outputs():
        path = ground.smoke / output.path
        found = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        files.setdefault(output.stage.partition("@")[0], []).extend(found)
        if output.path not in pipeline.kept_by_git:
            names = [output.md5, *(pipeline.recorded(output) or {}).values()]
            files.setdefault("cache", []).extend(pipeline.object_path(md5) for md5 in names)
    files["lock"] = [ground.smoke / LOCK]
    path = draw.choice(files[draw.choice(sorted(files))])
    before = path.read_bytes()
    facts = path.stat()
    way, content = ("delete", b"") if draw.random() < 0.1 else mutated(before, draw)
    what = f"{way} {path.relative_to(ground.project.folder)}"
    if way != "delete" and content == before:
        return f"{what}: no change"
    try:
        if way == "delete":
            path.unlink()
        else:
            overwrite(path, content)
        line = line_of(lambda: _named(ground, path, content, stages, what))
        if line is not None and path.name not in line:
            raise Lost(f"{what}: verify stops with '{line}'")
        readers = [s for s in stages.values() if path.is_relative_to(ground.smoke) and _reads(s, ground.smoke, path)]
        if readers and draw.random() < 0.5:
            what += f", then {_refused(ground, draw.choice(readers), path, what)}"
    finally:
        path.unlink(missing_ok=True)
        path.write_bytes(before)
        path.chmod(facts.st_mode)
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    if found := ground.damage():
        raise Lost(f"{what}: mended, verify still finds {found[0]}")
    return what


def _named(ground: Ground, path: Path, content: bytes, stages: dict[str, Stage], what: str) -> None:
    found = [Path(entry.path).resolve() for entry in ground.damage()]
    if path.resolve() in found or any(path.resolve().is_relative_to(place) for place in found):
        return
    if path.name == LOCK and parse_lock(content) == stages:
        return  # a comment, a space
    raise Lost(f"{what}: verify does not name it, but {[str(place) for place in found[:3]]}")


def _reads(stage: Stage, folder: Path, path: Path) -> bool:
    return any(path.is_relative_to(folder / dep) for dep in stage.deps)


def _refused(ground: Ground, stage: Stage, path: Path, what: str) -> str:
    """Demand that a cell that reads a damaged file refuses it by name, or writes the recorded bytes all the same."""
    process = ground.start(*shlex.split(stage.command))
    try:
        text = ended(process)
    except Lost as error:
        raise Lost(f"{what}, {stage.name}: {error}") from None
    now = Pipeline.__new__(Pipeline)
    now.folder, now._hashes = ground.smoke, {}
    states = {out.path: now.state(out) for out in stage.outs}
    if set(states.values()) != {"ok"}:
        raise Lost(f"{what}, {stage.name}: exit code {process.returncode}, {states}")
    if process.returncode == 0:
        return f"{stage.name} does not need it"
    if process.returncode != 2 or "error: " not in text or path.parent.name not in text:
        raise Lost(f"{what}, {stage.name}: exit code {process.returncode}, {text[-300:]}")
    return f"{stage.name} refuses it"


def params(ground: Ground, draw: random.Random) -> str:
    """Anything in params.yaml: its cells, or one line."""
    file = ground.smoke / "params.yaml"
    before = file.read_bytes()
    if draw.random() < 0.6:
        lines = before.decode().splitlines()
        places = [i for i, line in enumerate(lines) if ":" in line and not line.lstrip().startswith("#")]
        for place in draw.sample(places, draw.randrange(1, 4)):
            lines[place] = f"{lines[place].partition(':')[0]}: {draw.choice(VALUES)}"
        content, what = "\n".join(lines).encode(errors="surrogatepass"), "values"
    else:
        what, content = mutated(before, draw)
        for _ in range(draw.randrange(3)):
            content = mutated(content, draw)[1]
    here = Path.cwd()
    start = time.monotonic()
    try:
        file.write_bytes(content)
        os.chdir(ground.smoke)
        line = line_of(experiment.check)
    finally:
        os.chdir(here)
        file.write_bytes(before)
    if time.monotonic() - start > SOON_S:
        raise Lost(f"{what}: {time.monotonic() - start:.0f} s")
    return f"{what}: {line or 'sound'}"


def hostile(ground: Ground, draw: random.Random) -> str:
    """A file that is not what its name says, shown and loaded without the check that stages make first."""
    kinds: dict[str, Callable[[Path], object]] = {
        "data/rollouts/*/*.parquet": describe,
        "data/datasets/*/*.parquet": describe,
        "data/datasets/*/card.json": lambda path: describe(path.parent),
        "data/**/manifest.json": lambda path: describe(path.parent),
        "data/tasks/*.json": describe,
        "data/behavior/*/*/*.zip": load_actor,
        "data/models/*/*/*/config.json": lambda path: load_model(path.parent),
        "data/models/*/*/*/model.safetensors": lambda path: load_model(path.parent),
        "reports/metrics.json": lambda _: _walk(ground.smoke),
        "data/evaluations/*/*/*/*/manifest.json": lambda _: _walk(ground.smoke),
        LOCK: lambda _: _walk(ground.smoke),
    }
    pattern = draw.choice(sorted(kinds))
    path = draw.choice(sorted(ground.smoke.glob(pattern)))
    before, facts = path.read_bytes(), path.stat()
    way, content = mutated(before, draw)
    if draw.random() < 0.2:  # another kind of file altogether
        other = draw.choice(sorted(p for p in (ground.smoke / "data").rglob("*") if p.is_file()))
        way, content = f"as {other.name}", other.read_bytes()
    try:
        overwrite(path, content)
        line = line_of(lambda: kinds[pattern](path))
    except (Lost, Traced) as error:
        raise type(error)(f"{way} {path.relative_to(ground.smoke)}: {error}") from error
    finally:
        overwrite(path, before)
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    return f"{way} {path.relative_to(ground.smoke)}: {line or 'read'}"


def _walk(folder: Path) -> None:
    tree(trace(Pipeline(folder), "focal/expert/expert"))


def concurrency(ground: Ground, draw: random.Random) -> str:
    """Two runs at once in one pipeline; then a plain one."""
    cells = sorted(Pipeline(ground.smoke).stages)
    commands = [
        ["dvc", "repro", "--single-item", "--force", draw.choice(cells)],
        draw.choice(
            [
                ["dvc", "repro", "--single-item", "--force", draw.choice(cells)],
                ["dvc", "repro"],
                [sys.executable, "-m", "omrl.cli", "repro", "--jobs", "2"],
                [sys.executable, "-m", "omrl.cli", "verify", "--pipeline", "."],
            ]
        ),
    ]
    what = " beside ".join(" ".join(command[-3:]) for command in commands)
    first = ground.start(*commands[0])
    time.sleep(draw.uniform(0, 6))
    second = ground.start(*commands[1])
    for process in (first, second):
        try:
            ended(process)
        except Exception as error:
            raise type(error)(f"{what}: {error}") from error
    ground.whole()
    return what


def resources(ground: Ground, draw: random.Random) -> str:
    """A stage with too little memory, room for files, or open files: the recorded bytes or one line."""
    pipeline = Pipeline(ground.smoke)
    stage = pipeline.stages[draw.choice(sorted(name for name in pipeline.stages if name not in ("plan", "code")))]
    name, limit = draw.choice(
        [
            ("RLIMIT_AS", draw.randrange(100, 3000) << 20),
            ("RLIMIT_FSIZE", draw.randrange(1, 200_000)),
            ("RLIMIT_NOFILE", draw.randrange(8, 60)),
        ]
    )
    what = f"{stage.name} with {name} = {limit:,}"
    code = f"import resource, os, sys; resource.setrlimit(resource.{name}, ({limit}, {limit})); " \
           "os.execvp(sys.executable, [sys.executable, *sys.argv[1:]])"  # fmt: skip
    process = ground.start(sys.executable, "-c", code, *shlex.split(stage.command)[1:])
    try:
        text = ended(process)
    except (Lost, Traced) as error:
        raise type(error)(f"{what}: {error}") from error
    states = {out.path: pipeline.state(out) for out in stage.outs}
    if set(states.values()) != {"ok"}:
        raise Lost(f"{what}: exit code {process.returncode}, {states}")
    return f"{what}: {'done' if process.returncode == 0 else (text.splitlines() or ['killed'])[-1]}"


# kind -> of 100 cases, how many
CASES: dict[Callable[[Ground, random.Random], str], int] = {
    params: 32, hostile: 30, damage: 24, kill: 6, resources: 4, concurrency: 4
}  # fmt: skip


def one(ground: Ground, case: Callable[[Ground, random.Random], str], seed: int, number: int) -> tuple[str, str]:
    """Run a case; return how it ended and what it did."""
    try:
        return "survived", case(ground, random.Random(f"{seed}/{case.__name__}/{number}"))
    except Lost as error:
        return "lost", str(error)
    except Traced as error:
        return "traceback", str(error)
    except UserError as error:  # of the campaign's own look at the pipeline
        return "lost", f"the pipeline cannot be read: {error}"


def main() -> int:
    """Run the campaign; print every broken promise and the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", type=Path, help="folder of the built clone; built there if it is not")
    parser.add_argument("--only", help="one kind, such as damage, or one case, such as damage:17")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no further case after these")
    chosen = parser.parse_args()
    kinds = {case.__name__: case for case in CASES}
    tried: Counter[tuple[str, str]] = Counter()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="omrl-campaign-") as temporary:
        base = chosen.base or Path(temporary) / "base"
        if not (base / SMOKE / LOCK).is_file():
            project = clone(base)
            project.repro()
            commit(project, "results")
        ground = Ground(base.resolve(), Path(temporary).resolve())
        kind, _, number = (chosen.only or "").partition(":")
        order = [(case, i) for case, share in CASES.items() for i in range(max(1, chosen.cases * share // 100))]
        if number:
            order = [(kinds[kind], int(number))]
        elif kind:
            order = [(kinds[kind], i) for i in range(chosen.cases)]
        random.Random(chosen.seed).shuffle(order)
        for case, i in order:
            if time.monotonic() - start > 60 * chosen.minutes:
                break
            ending, text = one(ground, case, chosen.seed, i)
            tried[case.__name__, ending] += 1
            if ending != "survived":
                print(f"{ending}: {case.__name__}:{i}: {text}", flush=True)
                ground.renew()
            elif number:
                print(text)
    print(f"{'':<12} {'tried':>9} {'survived':>9} {'lost':>9} {'traceback':>9}")
    for name in [*kinds, "all"]:
        counts = [sum(n for (k, e), n in tried.items() if name in (k, "all") and e == ending)
                  for ending in ("survived", "lost", "traceback")]  # fmt: skip
        print(f"{name:<12} {sum(counts):>9} {counts[0]:>9} {counts[1]:>9} {counts[2]:>9}")
    print(f"{(time.monotonic() - start) / 60:.1f} minutes, seed {chosen.seed}")
    return int(any(ending != "survived" for _, ending in tried))


if __name__ == "__main__":
    sys.exit(main())
