"""Our own reading of SB3 checkpoints: weights only, never unpickling.

``SAC.load`` unpickles, and a crafted zip makes it run any command. Here only ``policy.pth`` is read, by
PyTorch's restricted loader, into a network whose shapes come from the weights themselves.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from omrl.core.errors import UserError

LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0  # as in stable_baselines3.sac.policies
_LIMIT = 1 << 30  # bytes of weights that are believed


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
            damaged = archive.testzip()
            if damaged is not None:
                raise UserError(f"{path}: damaged checkpoint, entry '{damaged}' fails its checksum; {hint}")
            info = archive.getinfo("policy.pth")
            if info.file_size > _LIMIT:
                raise UserError(f"{path}: policy.pth claims {info.file_size} bytes, expected a policy's weights")
            weights = torch.load(io.BytesIO(archive.read(info)), map_location="cpu", weights_only=True)
            settings = json.loads(archive.read("data"))
    except FileNotFoundError:
        raise UserError(f"{path}: checkpoint is missing; {hint}") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path}: policy.pth holds more than plain weights; refused, nothing of it was run") from None
    except UserError:
        raise
    except Exception as error:  # whatever zipfile, zlib, json and PyTorch stumble over in a damaged file
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


def _linear(weights: dict[str, Tensor], name: str, path: str | Path) -> tuple[Tensor, Tensor]:
    """Return weight [out, in] and bias [out] of a layer, float32 and finite."""
    weight, bias = weights.get(f"{name}.weight"), weights.get(f"{name}.bias")
    if not (isinstance(weight, Tensor) and isinstance(bias, Tensor)):
        raise UserError(f"{path}: no tensors {name}.weight and {name}.bias in policy.pth, expected SB3's SAC actor")
    if weight.ndim != 2 or bias.shape != weight.shape[:1] or {weight.dtype, bias.dtype} != {torch.float32}:
        raise UserError(
            f"{path}: {name} is {weight.dtype} {list(weight.shape)} with bias {bias.dtype} {list(bias.shape)}, "
            "expected float32 [out, in] and [out]"
        )
    if not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
        raise UserError(f"{path}: {name} holds NaN or infinite weights: the training diverged")
    return weight.detach(), bias.detach()
