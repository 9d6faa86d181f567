"""A trained policy that learns while it runs: what ``adapt`` returns."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback
from torch import Tensor

from kbt_rl.agents import adapted_file
from kbt_rl.agents.adaptation import Adaptation
from kbt_rl.agents.tapped_policy import Head, TappedPolicy

Self = TypeVar("Self", bound="AdaptedPolicy")


class AdaptedPolicy(TappedPolicy):
    """A frozen policy whose last linear layer is a Gaussian posterior; made by ``adapt``.

    Attributes:
        model: The user's object.
        head: The posterior over the last layer.

    Example:
        >>> policy = adapt(PPO.load("trained.zip"), states=nominal_env)
        >>> action, _ = policy.predict(observation, deterministic=True)
        >>> policy.update(None, correction)
        >>> policy.learn(env, 500, callback=KalmanAdapter(teacher))
    """

    def learn(
        self: Self,
        env: GymEnv | str,
        total_timesteps: int,
        callback: MaybeCallback = None,
        *,
        tensorboard_log: str | None = None,
        tb_log_name: str = "adapt",
        n_steps: int = 10,
        seed: int | None = None,
        verbose: int = 0,
        progress_bar: bool = False,
    ) -> Self:
        """Act in an environment while a ``KalmanAdapter`` asks a teacher and updates; SB3's callbacks work as usual.

        Args:
            env: A Gymnasium env, a ``VecEnv`` or an id; its observations are not normalised.
            total_timesteps: Steps of all sub-environments together.
            callback: Usually ``KalmanAdapter(teacher)``.
            tensorboard_log: Folder of the TensorBoard logs; None for none.
            tb_log_name: Name of the run in it.
            n_steps: Steps between two writes of the log.
            seed: Of the environment and of a random label stream.
            verbose: 0 silent, 1 training output.
            progress_bar: Draw a progress bar.
        """
        settings = {"n_steps": n_steps, "tensorboard_log": tensorboard_log, "verbose": verbose, "seed": seed}
        learner = Adaptation(self, env, **settings)  # type: ignore[arg-type]
        learner.learn(total_timesteps, callback, tb_log_name=tb_log_name, progress_bar=progress_bar)
        return self

    def save(self, path: str | Path) -> Path:
        """Write posterior, units and statistics to a safetensors file; the network stays in its own. See ``load``."""
        return adapted_file.save(self, path)

    @classmethod
    def load(cls: type[Self], path: str | Path, model: Any) -> Self:
        """Read what ``save`` wrote, for the model that it was saved of.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is damaged or something else, or it is of another model.
        """
        return adapted_file.load(path, model, cls)

    def bake(self) -> Any:
        """A copy of the user's model with the posterior's mean as its last layer; saves and loads anywhere.

        Raises:
            ValueError: The head sees more than the last hidden layer, which no last layer can.
        """
        if self._attached().skipped:
            raise ValueError(
                "the head sees more than the last hidden layer does, which no ordinary layer can; adapt with "
                "skip='none' for a model that can be baked"
            )
        return self.network.baked(self.model, *_linear(self.head))

    def detach(self) -> Any:
        """Take the tap off and return the user's model, as it was to the bit; this object is of no more use."""
        self._attached().remove()
        self._tap = None
        return self.model


def _linear(head: Head) -> tuple[Tensor, Tensor]:
    """Weight ``(o, d)`` and bias ``(o,)`` of a head's mean, for features in their own units."""
    origin = torch.zeros(1, head.in_features, dtype=torch.float64)
    bias = head.mean_outputs(origin)[0]
    return (head.mean_outputs(torch.eye(head.in_features, dtype=torch.float64)) - bias).mT, bias
