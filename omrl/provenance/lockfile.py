"""A pipeline as DVC left it: dvc.lock, the files on disk, the cache behind them. Reads; never changes."""

from __future__ import annotations

import configparser
import hashlib
import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from omrl.core.errors import UserError
from omrl.core.yamlfile import Loader

LOCK = "dvc.lock"
_SECTIONS = {"relabel": "relabel", "pair": "pairs"}  # stage -> section
_IGNORED = ("__pycache__", ".scratch", ".gitignore")


@dataclass(frozen=True)
class Output:
    """An output as dvc.lock records it.

    Attributes:
        path: relative to the pipeline's folder.
        md5: of the file, or of the folder's listing, ending in ``.dir``.
        size: bytes.
        stage: the cell that wrote it.
        files: how many in a folder; None for a file.
    """

    path: str
    md5: str
    size: int
    stage: str
    files: int | None = None


@dataclass(frozen=True)
class Stage:
    """A cell as dvc.lock records it."""

    name: str
    command: str
    deps: dict[str, str]  # path -> md5
    params: dict[str, Any]
    outs: list[Output] = field(default_factory=list)
    sizes: dict[str, tuple[int, int | None]] = field(default_factory=dict)  # dep -> bytes, files of a folder


def parse_lock(content: bytes) -> dict[str, Stage]:
    """Return the cells of a dvc.lock, by name.

    Raises:
        ValueError: it is none, or damaged.
    """
    stages: dict[str, Stage] = {}
    try:
        raw = yaml.load(content.decode(), Loader=Loader)
        if raw["schema"] != "2.0":
            raise ValueError("schema")
        for name, entry in raw["stages"].items():
            if any(item.get("hash", "md5") != "md5" for item in [*entry.get("deps", []), *entry.get("outs", [])]):
                raise ValueError("hash")
            outs = [
                Output(_text(o["path"]), _text(o["md5"]), int(o.get("size", 0)), name, o.get("nfiles"))
                for o in entry.get("outs", [])
            ]
            deps = {_text(d["path"]): _text(d["md5"]) for d in entry.get("deps", [])}
            params = {key: value for part in entry.get("params", {}).values() for key, value in part.items()}
            sizes = {d["path"]: (int(d.get("size", 0)), d.get("nfiles")) for d in entry.get("deps", [])}
            stages[_text(name)] = Stage(name, _text(entry["cmd"]), deps, params, outs, sizes)
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(str(error)) from None
    return stages


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r}: expected text")
    return value


def md5_of_file(path: Path) -> str:
    """Return the MD5 of a file's bytes, as DVC names it."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "md5").hexdigest()


def md5_or_reason(path: Path) -> str:
    """Return the MD5 of a file, or, where it cannot be read, what the system says: no file has that as its MD5."""
    try:
        return md5_of_file(path)
    except OSError as error:
        return f"unreadable ({(error.strerror or 'error').lower()})"


def listing(folder: Path, md5: Callable[[Path], str] = md5_of_file) -> list[dict[str, str]]:
    """Return DVC's listing of a folder: MD5 and relative path of every file, by path."""
    entries = []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        hidden = any(part in _IGNORED or part.endswith(".partial") for part in relative.parts)
        if path.is_file() and not hidden:
            entries.append({"md5": md5(path), "relpath": relative.as_posix()})
    return sorted(entries, key=lambda entry: entry["relpath"])


def md5_of_listing(entries: list[dict[str, str]]) -> str:
    """Return the MD5 by which DVC names a folder with this listing."""
    return hashlib.md5(json.dumps(entries, sort_keys=True).encode()).hexdigest() + ".dir"


def md5_of(path: Path, md5: Callable[[Path], str] = md5_of_file) -> str | None:
    """Return what DVC would record for ``path``; None if nothing is there."""
    if path.is_dir():
        return md5_of_listing(listing(path, md5))
    return md5(path) if path.is_file() else None


class Pipeline:
    """One folder with params.yaml, dvc.yaml and dvc.lock.

    Args:
        folder: the pipeline's folder.

    Raises:
        UserError: it has no dvc.lock, or the lock is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / LOCK
        self.stages: dict[str, Stage] = {}
        self._hashes: dict[Path, str] = {}
        try:
            self.stages = parse_lock(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{path}: missing; run 'dvc repro' in {self.folder} first") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); restore it with 'git checkout'") from None
        except ValueError:
            raise UserError(f"{path}: damaged, expected DVC's lock file; restore it with 'git checkout'") from None

    @cached_property
    def wanted(self) -> set[str] | None:
        """The outputs of cells that params.yaml asks for now (data/plan/cells.json); None if there is no plan."""
        try:
            plan = json.loads((self.folder / "data/plan/cells.json").read_text())
            paths = {f"data/{kind}/{shard}" for kind in ("behavior", "rollouts") for shard in plan["shards"]}
            paths |= {f"data/datasets/{name}" for name in [*plan["datasets"], *plan.get("pairs", [])]}
            online = plan.get("online", [])
            paths |= {f"data/{kind}/{name}" for kind in ("online", "evaluations") for name in online}
            paths |= {f"data/models/{m['algorithm']}/{m['train']}/{m['seed']}" for m in plan["models"]}
            return paths | {
                f"data/evaluations/{e['algorithm']}/{e['train']}/{e['test']}/{e['seed']}" for e in plan["evaluations"]
            }
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            RecursionError,
        ):  # damaged: told where the output itself is looked at
            return None

    @cached_property
    def declared(self) -> dict[str, bool]:
        """The output paths of dvc.yaml, templates as written -> does DVC's cache keep them?"""
        try:
            stages = yaml.load((self.folder / "dvc.yaml").read_text(encoding="utf-8"), Loader=Loader)["stages"]
            entries = [
                entry if isinstance(entry, dict) else {entry: {}}
                for stage in stages.values()
                for kind in ("outs", "plots", "metrics")
                for entry in stage.get("do", stage).get(kind, [])
            ]
            return {path: options.get("cache", True) for entry in entries for path, options in entry.items()}
        except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{self.folder / 'dvc.yaml'}: missing or damaged; restore it with 'git checkout'") from None

    @cached_property
    def kept_by_git(self) -> frozenset[str]:
        """The outputs that dvc.yaml keeps out of the cache."""
        return frozenset(path for path, cached in self.declared.items() if not cached)

    def current(self, output: Output) -> bool:
        """Does params.yaml still ask for this output? (dvc.lock keeps cells of earlier choices.)"""
        kinds = ("behavior", "rollouts", "datasets", "models", "online", "evaluations")
        cells = tuple(f"data/{kind}/" for kind in kinds)
        if self.wanted is None or not output.path.startswith(cells):
            return True
        if output.path.startswith("data/datasets/") and "plan" in self.stages:
            # a name can have been a level and be a relabelled set now, or the other way round: same path, two stages
            params, name = self.stages["plan"].params, output.path.removeprefix("data/datasets/")
            kind = next((k for k in ("relabel", "pair") if name in (params.get(_SECTIONS[k]) or {})), "dataset")
            return output.path in self.wanted and output.stage.partition("@")[0] == kind
        return output.path in self.wanted

    def outputs(self) -> Iterator[Output]:
        """Yield the outputs that the present params ask for."""
        for stage in self.stages.values():
            yield from (out for out in stage.outs if self.current(out))

    def output_of(self, path: str) -> Output:
        """Return the output that ``path`` (relative to the pipeline) is, or lies in.

        Raises:
            UserError: no stage in dvc.lock writes it.
        """
        earlier = [out for stage in self.stages.values() for out in stage.outs if not self.current(out)]
        for out in [*self.outputs(), *earlier]:
            if path == out.path or path.startswith(out.path + "/"):
                return out
        raise UserError(f"{self.folder / path}: no stage in {self.folder / LOCK} writes it")

    def under(self, path: str) -> list[Output]:
        """Return the outputs that a dependency on ``path`` reads: the one it lies in, or all below it."""
        return [
            out
            for out in self.outputs()
            if path == out.path or path.startswith(out.path + "/") or out.path.startswith(path + "/")
        ]

    def _md5(self, path: Path) -> str:
        if path not in self._hashes:
            self._hashes[path] = md5_or_reason(path)
        return self._hashes[path]

    def found(self, path: str) -> str | None:
        """Return what DVC would record for ``path`` now, None if nothing is there; a file is read only once."""
        return md5_of(self.folder / path, self._md5)

    def state(self, output: Output) -> str:
        """Return ``ok``, ``missing`` or ``modified``: the file on disk against dvc.lock."""
        found = self.found(output.path)
        return "missing" if found is None else "ok" if found == output.md5 else "modified"

    def recorded(self, output: Output) -> dict[str, str] | None:
        """Return path -> MD5 of the files in an output folder; None if the cache has no sound listing of it."""
        try:
            entries = json.loads(self.object_path(output.md5).read_bytes())
            if md5_of_listing(sorted(entries, key=lambda entry: entry["relpath"])) != output.md5:
                return None
            return {f"{output.path}/{entry['relpath']}": entry["md5"] for entry in entries}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def differing(self, output: Output) -> list[str]:
        """Return the files of an output folder that are not as recorded; empty where that cannot be told."""
        expected = self.recorded(output) if output.md5.endswith(".dir") else None
        if expected is None:
            return []
        folder = self.folder / output.path
        present = {f"{output.path}/{e['relpath']}": e["md5"] for e in listing(folder, self._md5)}
        return sorted(p for p in expected.keys() | present.keys() if expected.get(p) != present.get(p))

    def outdated(self, stage: Stage) -> list[str]:
        """Return the inputs of which ``stage`` read another version than the one recorded, or on disk, now."""
        paths = []
        for path, md5 in stage.deps.items():
            sources = self.under(path)
            if [out.path for out in sources] == [path]:
                now: str | None = sources[0].md5
            elif sources and all(self.state(out) == "ok" for out in sources):
                now = self.found(path)
            else:
                continue  # not an output, or damaged itself, which is told elsewhere
            if now != md5:
                paths.append(path)
        return paths

    @cached_property
    def repository(self) -> Path:
        """The DVC project: the folder with .dvc at, or above, the pipeline's.

        Raises:
            UserError: there is none.
        """
        for folder in [self.folder.resolve(), *self.folder.resolve().parents]:
            if (folder / ".dvc").is_dir():
                return folder
        raise UserError(f"{self.folder}: not inside a DVC repository (no .dvc here or above)")

    @cached_property
    def cache(self) -> Path:
        """The folder of cache objects, honouring ``cache.dir`` of .dvc/config and .dvc/config.local."""
        base = self.repository / ".dvc"
        chosen = base / "cache"
        for name in ("config", "config.local"):
            parser = configparser.ConfigParser(interpolation=None, inline_comment_prefixes=("#",), strict=False)
            try:
                parser.read(base / name, encoding="utf-8")
            except (configparser.Error, UnicodeDecodeError):
                raise UserError(f"{base / name}: damaged, expected DVC's settings") from None
            if parser.has_option("cache", "dir"):
                chosen = (base / parser.get("cache", "dir").strip("\"'")).resolve()
        return chosen / "files" / "md5"

    def object_path(self, md5: str) -> Path:
        """Return where the cache keeps the object ``md5``."""
        return self.cache / md5[:2] / md5[2:]

    def git(self, *arguments: str) -> str | None:
        """Return what git says, None where it fails (not installed, no repository, no such revision)."""
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=self.folder, capture_output=True, text=True, errors="replace",
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except OSError:
            return None
        return done.stdout if done.returncode == 0 else None

    @cached_property
    def committed(self) -> dict[str, Stage] | None:
        """The cells of the last commit's dvc.lock; None where git has none, or a damaged one."""
        text = self.git("show", f"HEAD:./{LOCK}")
        try:
            return None if text is None else parse_lock(text.encode())
        except ValueError:
            return None

    @cached_property
    def under_git(self) -> bool:
        """Does git answer here? It does not outside a repository, or in one it calls somebody else's."""
        return self.git("rev-parse", "--git-dir") is not None

    def commit_of(self, md5: str) -> dict[str, str] | None:
        """Return the first commit whose dvc.lock has ``md5``; None if only the working tree has it."""
        found = self.git("log", "--format=%H%x09%cs%x09%s", f"-S{md5}", "--", LOCK)
        lines = (found or "").splitlines()
        if not lines:
            return None
        commit, date, subject = lines[-1].split("\t", 2)
        return {"commit": commit, "date": date, "subject": subject}

    def uncommitted(self) -> list[str]:
        """Return the paths that differ from the last commit, of those that results depend on."""
        own = ("params.yaml", "dvc.yaml", LOCK, "reports")
        found = self.git("status", "--porcelain", "--", *own, ":(top)omrl", ":(top)stages") or ""
        return [line[3:] for line in found.splitlines()]


def find_pipeline(path: str | Path) -> Path:
    """Return the nearest folder with a dvc.yaml, at or above ``path``.

    Raises:
        UserError: there is none.
    """
    path = Path(path)
    # relative ones first: they read better in messages
    for folder in [path, *path.parents, *path.absolute().parents]:
        if (folder / "dvc.yaml").is_file():
            return folder
    raise UserError(f"{path}: not inside a pipeline (no dvc.yaml here or above); name one with --pipeline")


def all_pipelines(root: str | Path = ".") -> list[Path]:
    """Return the pipelines below ``root`` that have a dvc.lock: its own and those in pipelines/."""
    root = Path(root)
    folders = [root, *sorted(p for p in (root / "pipelines").glob("*") if p.is_dir())]
    return [folder for folder in folders if (folder / LOCK).is_file()]
