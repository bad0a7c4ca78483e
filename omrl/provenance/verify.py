"""Verify: every output against dvc.lock, the cache objects behind it, and the manifests.

DVC itself trusts its cache: a damaged read-only object is called up to date by ``status`` and ``repro``, and
``checkout`` restores it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from omrl.core.errors import UserError
from omrl.core.files import MANIFEST, read_manifest, sha256
from omrl.core.progress import Progress
from omrl.provenance.lockfile import Output, Pipeline, listing, md5_of_file, md5_of_listing


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
    checked, damage = 0, []
    with Progress(len(outputs), f"verify {pipeline.folder}", "outputs") as progress:
        for output in outputs:
            count, found = _check_output(pipeline, output)
            checked += count
            damage += found
            progress.advance()
    return checked, damage


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
        elif md5_of_file(path) != output.md5:
            damage.append(Damage(str(path), f"modified, dvc.lock records MD5 {output.md5}", restore))
    if cached:
        for name, md5 in expected.items():
            count += 1
            damage += _check_object(pipeline, md5, name, output)
        damage += _check_manifest(path, {entry.path for entry in damage}, restore)
    return count, damage


def _check_directory(
    pipeline: Pipeline, output: Output, path: Path, restore: str, cached: bool
) -> tuple[int, list[Damage], dict[str, str]]:
    """Compare a folder with its listing in the cache (or, where git keeps it, with the hash alone)."""
    found = listing(path) if path.is_dir() else []
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
        if place.exists():
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
            damage.append(Damage(str(file), f"modified, expected MD5 {expected[name]}", restore))
    return len(found) + 1, damage, expected


def _check_object(pipeline: Pipeline, md5: str, name: str, output: Output) -> list[Damage]:
    place = pipeline.object_path(md5)
    file = pipeline.folder / name
    if not place.is_file() or md5_of_file(place) != md5:
        sound = file.is_file() and md5_of_file(file) == md5
        redo = f"'dvc commit --force {output.stage}'" if sound else f"'dvc repro --force --single-item {output.stage}'"
        repair = f"{redo} in {pipeline.folder}"
    if not place.is_file():
        return [Damage(str(place), f"missing from the cache, it held {name}", repair)]
    if md5_of_file(place) != md5:
        size = place.stat().st_size
        return [
            Damage(
                str(place),
                f"damaged cache object ({size} bytes, MD5 is not its name), it holds {name}",
                f"delete it, then {repair}",
            )
        ]
    return []


def _check_manifest(folder: Path, told: set[str], restore: str) -> list[Damage]:
    """Compare the files of a folder, but for those told already, with its manifest's SHA-256, if it has one."""
    if not (folder / MANIFEST).is_file() or str(folder / MANIFEST) in told:
        return []
    try:
        expected = {name: entry["sha256"] for name, entry in read_manifest(folder)["files"].items()}
    except (UserError, AttributeError, KeyError, TypeError):
        return [Damage(str(folder / MANIFEST), "damaged manifest", restore)]
    return [
        Damage(str(folder / name), f"its SHA-256 is not the one in {MANIFEST}", restore)
        for name, digest in expected.items()
        if str(folder / name) not in told and (folder / name).is_file() and sha256(folder / name) != digest
    ]
