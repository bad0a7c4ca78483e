"""Dataset pairs: transitions from one dataset, contexts from another, as one thing to train on.

MACAW adapts on one part of the data and learns from another; FOCAL++ reads contexts off a relabelled set. A pair is a
folder with nothing but a manifest that holds both datasets' hashes, so that a training cell depends on one path.
"""

from __future__ import annotations

from pathlib import Path

from omrl.core import layout
from omrl.core.config import Config
from omrl.core.errors import UserError
from omrl.core.files import atomic_dir, input_hash, input_hashes, read_manifest, write_manifest

KIND = "pair"


class PairConfig(Config):
    """An entry of section ``pairs``.

    Attributes:
        transitions: dataset that actor and critic learn from.
        context: dataset that inference sees in training.
    """

    transitions: str
    context: str


def build_pair(name: str, config: PairConfig, code: list[Path], target: Path) -> None:
    """Publish a pair.

    Args:
        name: of the pair.
        config: its two datasets.
        code: fingerprint files this depends on.
        target: ``data/datasets/<name>``.

    Raises:
        UserError: one of the datasets is missing.
    """
    members = {"transitions": config.transitions, "context": config.context}
    inputs = input_hashes(*(layout.datasets(x) for x in dict.fromkeys(members.values())), *code)
    with atomic_dir(target) as folder:
        parameters = {"name": name, "pair": config.resolved()}
        write_manifest(folder, kind=KIND, inputs=inputs, parameters=parameters, files={})


def sources(folder: Path) -> dict[str, str]:
    """Return ``transitions`` and ``context`` -> name of a dataset, for a pair; ``transitions`` alone for a dataset.

    Raises:
        UserError: the folder has no manifest, or a member is another than the one that the pair was made of.
    """
    manifest = read_manifest(folder)
    if manifest["kind"] != KIND:
        return {"transitions": folder.name}
    pair = manifest["parameters"]["pair"]
    for name in pair.values():
        path = layout.datasets(name)
        if input_hash(path) != manifest["inputs"].get(path.as_posix()):
            raise UserError(f"{path}: not the dataset that {folder} was made of; run 'dvc repro'")
    return {"transitions": pair["transitions"], "context": pair["context"]}
