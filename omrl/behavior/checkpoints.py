"""Our own reading of SB3 checkpoints: weights only, never unpickling.

``SAC.load`` unpickles, and a crafted zip makes it run any command. Here only ``policy.pth`` is read, by an unpickler
that knows tensors and ordered mappings and nothing else, into a network whose shapes come from the weights
themselves. Whatever a file claims of its sizes is compared with the file's own before memory is taken for it: trained
weights do not compress, and a tensor is never larger than the bytes that are there for it.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import zipfile
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from omrl.core.errors import UserError

LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0  # as in stable_baselines3.sac.policies
_EXPANSION = 8  # times its size that a checkpoint may unpack to; SB3 stores it as it is
_SMALL = 1 << 20  # bytes that are always believed, of a pickle the most


class Actor:
    """The tanh-Gaussian policy of an SB3 SAC checkpoint, for actions in [-1, 1]."""

    def __init__(
        self, hidden: list[tuple[Tensor, Tensor]], mean: tuple[Tensor, Tensor], log_std: tuple[Tensor, Tensor]
    ):
        self._hidden, self._mean, self._log_std = hidden, mean, log_std

    @property
    def observation_size(self) -> int:
        """Width of an observation."""
        return self._hidden[0][0].shape[1]

    def _features(self, observation: NDArray[np.float32]) -> Tensor:
        x = torch.from_numpy(np.ascontiguousarray(observation, dtype=np.float32))
        for weight, bias in self._hidden:
            x = torch.relu(functional.linear(x, weight, bias))
        return x

    @torch.no_grad()
    def mean_action(self, observation: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the mean action, float32 [N, action], for observations [N, observation]."""
        return torch.tanh(functional.linear(self._features(observation), *self._mean)).numpy()

    @torch.no_grad()
    def sample(self, observation: NDArray[np.float32], noise: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return sampled actions; ``noise`` is standard normal, [N, action]."""
        x = self._features(observation)
        log_std = functional.linear(x, *self._log_std).clamp(LOG_STD_MIN, LOG_STD_MAX)
        raw = functional.linear(x, *self._mean) + log_std.exp() * torch.from_numpy(noise)
        return torch.tanh(raw).numpy()


def load_actor(path: str | Path) -> Actor:
    """Read the actor of an SB3 SAC checkpoint.

    Raises:
        UserError: the file is missing, damaged, not a SAC checkpoint, or holds more than plain weights.
    """
    hint = "restore it with 'dvc checkout', or rebuild it with 'dvc repro'"
    try:
        with zipfile.ZipFile(path) as archive:
            size = Path(path).stat().st_size
            claimed = sum(entry.file_size for entry in archive.infolist())
            if claimed > max(_SMALL, _EXPANSION * size):
                raise UserError(
                    f"{path}: claims {claimed} bytes in a file of {size}; refused, expected a policy's weights"
                )
            damaged = archive.testzip()
            if damaged is not None:
                raise UserError(f"{path}: damaged checkpoint, entry '{damaged}' fails its checksum; {hint}")
            weights = _tensors(archive.read("policy.pth"))
            settings = json.loads(archive.read("data"))
    except FileNotFoundError:
        raise UserError(f"{path}: checkpoint is missing; {hint}") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path}: policy.pth holds more than plain weights; refused, nothing of it was run") from None
    except UserError:
        raise
    except Exception as error:  # whatever zipfile, zlib, json and pickle stumble over in a damaged file
        raise UserError(f"{path}: damaged, expected an SB3 checkpoint ({type(error).__name__}); {hint}") from None
    if not isinstance(weights, dict) or "actor.mu.weight" not in weights:
        raise UserError(f"{path}: no SAC actor in policy.pth, expected a stable_baselines3.SAC checkpoint")
    if isinstance(settings, dict) and "activation_fn" in json.dumps(settings.get("policy_kwargs")):
        raise UserError(f"{path}: the policy has an activation of its own; expected SB3's default, ReLU")
    hidden, index = [], 0
    while f"actor.latent_pi.{index}.weight" in weights:  # a linear layer and its ReLU take a number each
        hidden.append(_linear(weights, f"actor.latent_pi.{index}", path))
        index += 2
    mean, log_std = (_linear(weights, f"actor.{name}", path) for name in ("mu", "log_std"))
    chain = [*(weight.shape for weight, _ in hidden), mean[0].shape]
    fits = all(after[1] == before[0] for before, after in pairwise(chain))
    if not hidden or not fits or log_std[0].shape != mean[0].shape:
        raise UserError(f"{path}: the layers of the actor do not fit together, shapes {[list(s) for s in chain]}")
    return Actor(hidden, mean, log_std)


def _tensors(content: bytes) -> Any:
    """Return what ``torch.save`` wrote, float32 tensors and mappings only, as views of ``content``'s own bytes.

    Raises:
        pickle.UnpicklingError: it holds, or asks for, anything else.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = archive.infolist()
        claimed = sum(entry.file_size for entry in entries)
        (table,) = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
        if claimed > len(content) or table.file_size > _SMALL:
            raise pickle.UnpicklingError(f"{claimed} bytes in {len(content)}")
        root = table.filename.removesuffix("data.pkl")
        if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
            raise pickle.UnpicklingError("numbers are not little-endian")
        return _Tables(archive, root, archive.read(table)).load()


class _Tables(pickle._Unpickler):
    """Python's own unpickler (the one in C takes memory for any number of memos), of tensors and nothing else."""

    def __init__(self, archive: zipfile.ZipFile, root: str, content: bytes) -> None:
        super().__init__(io.BytesIO(content))
        self._archive, self._root = archive, root
        self._storages: dict[str, NDArray[np.float32]] = {}

    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "FloatStorage"): "float32",
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return known[module, name]

    def persistent_load(self, pid: Any) -> NDArray[np.float32]:
        kind, dtype, key, _, count = pid
        if (kind, dtype) != ("storage", "float32"):
            raise pickle.UnpicklingError(f"storage of {dtype}")
        if key not in self._storages:
            self._storages[key] = np.frombuffer(bytearray(self._archive.read(f"{self._root}data/{key}")), "<f4")
        if len(self._storages[key]) != count:
            raise pickle.UnpicklingError(f"storage {key} holds {len(self._storages[key])} numbers, not {count}")
        return self._storages[key]


def _tensor(storage: Any, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *rest: Any) -> Tensor:
    """Return a tensor that lies in ``storage`` as a whole, row after row."""
    count = math.prod(shape)
    expected = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    if not isinstance(storage, np.ndarray) or min((*shape, offset)) < 0 or offset + count > len(storage):
        raise pickle.UnpicklingError(f"a tensor of shape {shape} in other bytes than its own")
    if list(stride) != expected:
        raise pickle.UnpicklingError(f"a tensor of shape {shape} with strides {stride}")
    return torch.from_numpy(storage[offset : offset + count].reshape(shape))


def _linear(weights: dict[str, Tensor], name: str, path: str | Path) -> tuple[Tensor, Tensor]:
    """Return weight [out, in] and bias [out] of a layer, float32 and finite."""
    weight, bias = weights.get(f"{name}.weight"), weights.get(f"{name}.bias")
    if not (isinstance(weight, Tensor) and isinstance(bias, Tensor)):
        raise UserError(f"{path}: no tensors {name}.weight and {name}.bias in policy.pth, expected SB3's SAC actor")
    if (
        weight.ndim != 2
        or not weight.numel()
        or bias.shape != weight.shape[:1]
        or {weight.dtype, bias.dtype} != {torch.float32}
    ):
        raise UserError(
            f"{path}: {name} is {weight.dtype} {list(weight.shape)} with bias {bias.dtype} {list(bias.shape)}, "
            "expected float32 [out, in] and [out]"
        )
    if not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
        raise UserError(f"{path}: {name} holds NaN or infinite weights: the training diverged")
    return weight.detach(), bias.detach()
