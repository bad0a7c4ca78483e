"""Verify: every output against dvc.lock, the cache objects behind it, the manifests, and dvc.lock itself.

The lock is compared with the cells that the plan asks for, with what its own stages say of one another, and, where
it differs from the last commit's, with params.yaml.

DVC itself trusts its cache: a damaged read-only object is called up to date by ``status`` and ``repro``, and
``checkout`` restores it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from omrl.core.errors import UserError
from omrl.core.files import MANIFEST, input_hash, read_manifest, sha256
from omrl.core.progress import Progress
from omrl.core.yamlfile import Loader
from omrl.provenance.lockfile import LOCK, Output, Pipeline, listing, md5_of_listing, md5_or_reason


def _problem(found: str, expected: str) -> str:
    return found if found.startswith("unreadable") else f"modified, {expected}"


@dataclass(frozen=True)
class Damage:
    """Something that is not what it should be.

    Attributes:
        path: the damaged file or cache object.
        problem: what is wrong.
        repair: what to do.
    """

    path: str
    problem: str
    repair: str

    def __str__(self) -> str:
        path = Path(self.path)
        here = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
        return f"{here}: {self.problem}; {self.repair}"


def verify(pipeline: Pipeline) -> tuple[int, list[Damage]]:
    """Check a pipeline.

    Returns:
        How many files and cache objects were looked at, and the damage found.
    """
    outputs = list(pipeline.outputs())
    checked, damage = 1, _check_lock(pipeline)
    with Progress(len(outputs), f"verify {pipeline.folder}", "outputs") as progress:
        for output in outputs:
            count, found = _check_output(pipeline, output)
            checked += count
            damage += found
            progress.advance()
    current = set(outputs)
    for output in (out for stage in pipeline.stages.values() for out in stage.outs if out not in current):
        names = {output.path: output.md5, **(pipeline.recorded(output) or {})}  # of earlier choices: kept to swap back
        for name, md5 in names.items():
            checked += 1
            damage += _check_object(pipeline, md5, name, output, needed=False)
    return checked, list(dict.fromkeys(damage))


def _check_lock(pipeline: Pipeline) -> list[Damage]:
    """Compare dvc.lock with the plan, with itself and with the last commit's."""
    lock, again = str(pipeline.folder / LOCK), f"run 'git checkout' of it, or 'dvc repro' in {pipeline.folder}"
    damage = []
    if pipeline.wanted is None:
        damage.append(
            Damage(
                str(pipeline.folder / "data/plan/cells.json"),
                "missing or damaged: which cells belong to the results is not known",
                f"run 'dvc repro' in {pipeline.folder}",
            )
        )
    fixed = {path for path in pipeline.declared if "${" not in path}
    recorded = {output.path for output in pipeline.outputs()}
    damage += [
        Damage(lock, f"does not record {path}, which dvc.yaml and params.yaml ask for", again)
        for path in sorted(fixed.union(pipeline.wanted or ()) - recorded)
    ]
    for name, stage in pipeline.stages.items():
        if not any(pipeline.current(out) for out in stage.outs):
            continue
        outdated = [*pipeline.outdated(stage), *_other_code(pipeline, name)]
        damage += [
            Damage(lock, f"{name} was made from another {path} than the one recorded or there now", again)
            for path in outdated
        ]
        damage += [
            Damage(lock, f"{name}: another size of {path} than the one there now", again)
            for path, sizes in stage.sizes.items()
            if path not in outdated
            and pipeline.found(path) == stage.deps[path]
            and _counts(pipeline.folder / path) != sizes
        ]
        family, _, key = name.partition("@")
        program, arguments = stage.command.split()[:3], stage.command.split()[3:]
        if program != ["python", "-m", f"stages.{family}"] or "-".join(arguments) != key:
            damage.append(Damage(lock, f"{name} has the command '{stage.command}'", again))
        damage += [Damage(lock, f"{name}: {problem}", again) for problem in _differing_params(pipeline, name)]
    return damage


def _other_code(pipeline: Pipeline, name: str) -> list[str]:
    """Return the inputs from outside the pipeline's outputs that are neither as committed nor as there now."""
    committed = (pipeline.committed or {}).get(name)
    return [
        path
        for path, md5 in pipeline.stages[name].deps.items()
        if not pipeline.under(path)
        and (committed is None or committed.deps.get(path) != md5)
        and pipeline.found(path) != md5
    ]


def _counts(path: Path) -> tuple[int, int | None]:
    """Return the bytes of a file or folder and the number of files in a folder, as DVC counts them."""
    if not path.is_dir():
        return path.stat().st_size, None
    files = [path / entry["relpath"] for entry in listing(path, lambda file: "")]
    return sum(file.stat().st_size for file in files), len(files)


def _differing_params(pipeline: Pipeline, name: str) -> list[str]:
    """Return parameters that are neither as committed nor as in params.yaml: nobody has run with those."""
    committed = (pipeline.committed or {}).get(name)
    try:
        now = yaml.load((pipeline.folder / "params.yaml").read_text(encoding="utf-8"), Loader=Loader)
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return []
    problems = []
    for key, value in pipeline.stages[name].params.items():
        if committed is not None and committed.params.get(key) == value:
            continue
        there = now
        for part in key.split("."):
            there = there.get(part) if isinstance(there, dict) else None
        if there != value:
            was = "" if committed is None else f", the last commit {committed.params.get(key)!r}"
            problems.append(f"{key} = {value!r}, params.yaml has {there!r}{was}")
    return problems


def _check_output(pipeline: Pipeline, output: Output) -> tuple[int, list[Damage]]:
    path = pipeline.folder / output.path
    cached = output.path not in pipeline.kept_by_git
    restore = (
        f"delete it and run 'dvc checkout {output.stage}' in {pipeline.folder}"
        if cached
        else f"run 'git checkout' of it, or 'dvc repro --force --single-item {output.stage}'"
    )
    if output.md5.endswith(".dir"):
        count, damage, expected = _check_directory(pipeline, output, path, restore, cached)
    else:
        count, damage, expected = 1, [], {output.path: output.md5}
        if not path.is_file():
            damage.append(Damage(str(path), "missing, dvc.lock records it", restore))
        elif (now := md5_or_reason(path)) != output.md5:
            damage.append(Damage(str(path), _problem(now, f"dvc.lock records MD5 {output.md5}"), restore))
    if not damage:
        damage += _check_counts(pipeline, output, path)
    if not cached and output.md5.endswith(".dir"):
        count += 1
        damage += _check_object(pipeline, output.md5, output.path, output, needed=False)
        expected = pipeline.recorded(output) or {}
    for name, md5 in expected.items():
        count += 1
        damage += _check_object(pipeline, md5, name, output, needed=cached)
    if cached:
        damage += _check_manifest(pipeline, path, {entry.path for entry in damage}, restore)
    return count, damage


def _check_counts(pipeline: Pipeline, output: Output, path: Path) -> list[Damage]:
    """Compare the size, and the number of files, that dvc.lock tells of a sound output."""
    size, files = _counts(path)
    if (size, files) == (output.size, output.files):
        return []
    told = f"{output.size} bytes in {output.files or 1} files of {output.path}, there are {size} in {files or 1}"
    again = f"run 'git checkout' of it, or 'dvc repro' in {pipeline.folder}"
    return [Damage(str(pipeline.folder / LOCK), f"{output.stage}: {told}", again)]


def _check_directory(
    pipeline: Pipeline, output: Output, path: Path, restore: str, cached: bool
) -> tuple[int, list[Damage], dict[str, str]]:
    """Compare a folder with its listing in the cache (or, where git keeps it, with the hash alone)."""
    found = listing(path, md5_or_reason) if path.is_dir() else []
    present = {f"{output.path}/{entry['relpath']}": entry["md5"] for entry in found}
    if not cached:
        if not path.is_dir():
            return 1, [Damage(str(path), "missing, dvc.lock records it", restore)], {}
        if md5_of_listing(found) != output.md5:
            return len(found), [Damage(str(path), f"modified, dvc.lock records {output.md5}", restore)], {}
        return len(found), [], {}
    place = pipeline.object_path(output.md5)
    expected = pipeline.recorded(output)
    damage = []
    if expected is None:
        # what it says of the files is not to be believed; the hash in dvc.lock still is
        sound = path.is_dir() and md5_of_listing(found) == output.md5
        redo = f"'dvc commit --force {output.stage}'" if sound else f"'dvc repro --force --single-item {output.stage}'"
        if place.is_file():
            size = place.stat().st_size
            what, how = f"damaged cache object ({size} bytes), it lists {output.path}", "delete it, then "
        else:
            what, how = f"missing from the cache, it lists {output.path}", ""
        damage.append(Damage(str(place), what, f"{how}{redo} in {pipeline.folder}"))
        if not sound:
            problem = "modified" if path.is_dir() else "missing"
            damage.append(
                Damage(str(path), f"{problem}, dvc.lock records {output.md5}", f"{redo} in {pipeline.folder}")
            )
            return len(found) + 1, damage, {}
        return len(found) + 1, damage, present
    if not path.is_dir():
        return 1, [Damage(str(path), "missing, dvc.lock records it", restore)], expected
    for name in sorted(expected.keys() | present.keys()):
        file = pipeline.folder / name
        if name not in present:
            damage.append(Damage(str(file), f"missing, expected MD5 {expected[name]}", restore))
        elif name not in expected:
            damage.append(Damage(str(file), "not part of the recorded output", f"delete it, or {restore}"))
        elif present[name] != expected[name]:
            damage.append(Damage(str(file), _problem(present[name], f"expected MD5 {expected[name]}"), restore))
    return len(found) + 1, damage, expected


def _check_object(pipeline: Pipeline, md5: str, name: str, output: Output, needed: bool = True) -> list[Damage]:
    """Compare a cache object with its name; one that is not ``needed`` may be missing."""
    place = pipeline.object_path(md5)
    file = pipeline.folder / name
    there = place.is_file()
    found = md5_or_reason(place) + (".dir" if md5.endswith(".dir") else "") if there else ""
    if found == md5 or not (there or needed):
        return []
    sound = file.is_file() and md5_or_reason(file) == md5
    redo = f"'dvc commit --force {output.stage}'" if sound else f"'dvc repro --force --single-item {output.stage}'"
    repair = f"{redo} in {pipeline.folder}"
    if not there:
        return [Damage(str(place), f"missing from the cache, it held {name}", repair)]
    size = place.stat().st_size
    return [
        Damage(
            str(place),
            f"damaged cache object ({size} bytes, MD5 is not its name), it holds {name}",
            f"delete it, then {repair}",
        )
    ]


def _check_manifest(pipeline: Pipeline, folder: Path, told: set[str], restore: str) -> list[Damage]:
    """Compare a folder's files, but for those told already, and its inputs with its manifest, if it has one."""
    if not (folder / MANIFEST).is_file() or str(folder / MANIFEST) in told:
        return []
    try:
        manifest = read_manifest(folder)
        expected = {name: entry["sha256"] for name, entry in manifest["files"].items()}
        damage = [
            Damage(str(folder / name), f"its SHA-256 is not the one in {MANIFEST}", restore)
            for name, digest in expected.items()
            if str(folder / name) not in told and (folder / name).is_file() and sha256(folder / name) != digest
        ]
        for path, digest in manifest["inputs"].items():
            place = pipeline.folder / path
            if place.exists() and input_hash(place) != digest:
                damage.append(
                    Damage(str(folder), f"made from another {path} than the one there now", "run 'dvc repro' of it")
                )
    except OSError as error:
        return [Damage(str(folder / MANIFEST), f"cannot be compared: {error.filename}: {error.strerror}", restore)]
    except (UserError, AttributeError, KeyError, TypeError):
        return [Damage(str(folder / MANIFEST), "damaged manifest", restore)]
    return damage
