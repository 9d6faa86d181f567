"""The statistics of a ``VecNormalize``, frozen: a policy that was trained behind one takes raw observations again."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor

Array = npt.NDArray[Any]
# The name of an observation that has none.
_ALONE = ""


class Normaliser(NamedTuple):
    """Means and variances of observations, by name where they are a dict.

    Attributes:
        mean: Of each entry that is normalised.
        variance: Of the same.
        clip: Largest normalised magnitude.
        epsilon: Added to variances.
    """

    mean: dict[str, Array]
    variance: dict[str, Array]
    clip: float
    epsilon: float

    @classmethod
    def of(cls, source: VecNormalize | str | Path) -> Normaliser | None:
        """The statistics as they are now; None if observations are not normalised.

        Args:
            source: The wrapper, or the file that its ``save`` wrote, which is a pickle: load only files you trust.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged, or no pickle.
            TypeError: It is something else than a ``VecNormalize``.
        """
        if isinstance(source, (str, Path)):
            source = _read(Path(source))
        if not isinstance(source, VecNormalize):
            raise TypeError(f"vec_normalize is a {type(source).__name__}; expected a VecNormalize or its file")
        if not source.norm_obs:
            return None
        stats = source.obs_rms if isinstance(source.obs_rms, dict) else {_ALONE: source.obs_rms}
        return cls(
            {name: np.array(one.mean) for name, one in stats.items()},
            {name: np.array(one.var) for name, one in stats.items()},
            float(source.clip_obs),
            float(source.epsilon),
        )

    def __call__(self, observation: Any) -> Any:
        """Observations as the policy was trained on them."""
        if isinstance(observation, dict):
            return {name: self._one(name, np.asarray(value)) for name, value in observation.items()}
        return self._one(_ALONE, np.asarray(observation))

    def _one(self, name: str, values: Array) -> Array:
        if name not in self.mean:
            return values
        scaled = (values - self.mean[name]) / np.sqrt(self.variance[name] + self.epsilon)
        return np.clip(scaled, -self.clip, self.clip).astype(np.float32)

    def tensors(self) -> dict[str, Tensor]:
        """For a file."""
        found = {f"mean.{name}": torch.from_numpy(np.asarray(value)) for name, value in self.mean.items()}
        found |= {f"variance.{name}": torch.from_numpy(np.asarray(value)) for name, value in self.variance.items()}
        return found | {"limits": torch.tensor([self.clip, self.epsilon], dtype=torch.float64)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Normaliser:
        """What ``tensors`` has written."""
        parts: dict[str, dict[str, Array]] = {"mean": {}, "variance": {}}
        for name, value in tensors.items():
            kind, _, entry = name.partition(".")
            if kind in parts:
                parts[kind][entry] = value.numpy()
        clip, epsilon = tensors["limits"].tolist()
        return cls(parts["mean"], parts["variance"], clip, epsilon)


def _read(path: Path) -> Any:
    """What a pickle holds."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; VecNormalize.save({str(path)!r}) writes one")
    try:
        return pickle.loads(path.read_bytes())
    except Exception as error:  # whatever reading something else ends in
        raise ValueError(
            f"{path} is not what VecNormalize.save writes ({type(error).__name__}: {error}); pass its file, or the "
            "wrapper itself"
        ) from error
