"""Small learners for the tests of policies, agents and callbacks; the pre-training is done once a process."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, TypeVar

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kbt_rl import KBT, DecisionTransformerConfig, DecisionTransformerPolicy, LQRExpert, Sample, WarmStart
from kbt_rl.agents.behaviour_cloning import PretrainConfig
from kbt_rl.agents.online import OnlineAlgorithm
from kbt_rl.agents.transformer_policy import TransformerPolicy

NOMINAL = "kbt_rl/InvertedPendulum-v0"
SHIFTED = "kbt_rl/ShiftedInvertedPendulum-v0"
TINY = PretrainConfig(samples=1_000, steps=150, batch_size=128)
LONGER = DecisionTransformerConfig(context_length=3)
LABEL_HIGH = np.array([2.0, 2.0, 0.5, 1.0])

Array = npt.NDArray[Any]
Learner = TypeVar("Learner", bound=OnlineAlgorithm)
Policy = TypeVar("Policy", bound=TransformerPolicy)


@functools.cache
def expert(env_id: str = SHIFTED) -> LQRExpert:
    return LQRExpert.for_env(gym.make(env_id))


@functools.cache
def pretrained() -> KBT:
    """Cloned from the nominal expert, not adapted; shared, so leave it alone."""
    model = KBT(env=gym.make(NOMINAL), seed=0)
    model.pretrain(expert(NOMINAL), TINY, progress_bar=False)
    return model


def learner(
    kind: type[Learner], env_id: str = SHIFTED, n_envs: int = 1, seed: int | None = 0, **settings: Any
) -> Learner:
    """A new learner with the pre-trained transformer."""
    model = kind(env=make_vec_env(env_id, n_envs=n_envs), seed=seed, **settings)
    model.start_from(pretrained())
    return model


def kbt(env_id: str = SHIFTED, **settings: Any) -> KBT:
    return learner(KBT, env_id, **settings)


def warm_start(memory: int = 5, epochs: int = 3, **settings: Any) -> WarmStart:
    return learner(WarmStart, memory=memory, epochs=epochs, **settings)


def longer_kbt(env: VecEnv | gym.Env[Any, Any] | None = None, **settings: Any) -> KBT:
    """A learner with a context of three steps; its transformer has random weights."""
    return KBT(env=env or gym.make(SHIFTED), seed=0, policy_kwargs={"transformer": LONGER}, **settings)


def policy(
    kind: type[Policy] = DecisionTransformerPolicy,  # type: ignore[assignment]
    *,
    observation_size: int = 4,
    action_size: int = 2,
    seed: int = 0,
    **settings: Any,
) -> Policy:
    """A policy of two actions with random weights, on boxes wide enough that nothing is clipped."""
    torch.manual_seed(seed)
    observations = spaces.Box(-10.0, 10.0, (observation_size,), dtype=np.float32)
    return kind(observations, spaces.Box(-100.0, 100.0, (action_size,), dtype=np.float32), **settings)


def states(count: int, seed: int = 0) -> Array:
    """Observations of the label box."""
    return np.random.default_rng(seed).uniform(-LABEL_HIGH, LABEL_HIGH, (count, 4)).astype(np.float32)


def weights(subject: OnlineAlgorithm | TransformerPolicy) -> dict[str, torch.Tensor]:
    """A copy of all weights and buffers, the posterior's included."""
    policy = subject.policy if isinstance(subject, OnlineAlgorithm) else subject
    return {name: value.detach().clone() for name, value in policy.state_dict().items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names whose dtype or bits differ."""
    assert before.keys() == after.keys()
    return {
        name
        for name, value in before.items()
        if value.dtype != after[name].dtype or not torch.equal(value, after[name])
    }


def events(folder: Path) -> EventAccumulator:
    """What was written to the only TensorBoard run in ``folder``."""
    (run,) = folder.iterdir()
    accumulator = EventAccumulator(str(run))
    accumulator.Reload()
    return accumulator


def curve(accumulator: EventAccumulator, tag: str) -> dict[int, float]:
    return {event.step: event.value for event in accumulator.Scalars(tag)}


class Recorder(BaseCallback):
    """Keeps the named locals of every step."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names, self.steps = names, []  # type: ignore[var-annotated]

    def _on_step(self) -> bool:
        self.steps.append({name: self.locals[name] for name in self.names})
        return True


class Updates:
    """Keeps the samples that a model is taught, and what it tells of each update."""

    def __init__(self, model: OnlineAlgorithm) -> None:
        self.samples: list[Sample] = []
        self.infos: list[Any] = []
        self._update = model.update
        model.update = self._note  # type: ignore[method-assign]

    def _note(self, sample: Sample) -> Any:
        self.samples.append(sample)
        self.infos.append(self._update(sample))
        return self.infos[-1]

    def means(self, name: str, per_write: int) -> list[float]:
        """The means of one figure of the updates between two writes of the log."""
        values = [getattr(info, name) for info in self.infos]
        return [float(np.mean(values[i : i + per_write])) for i in range(0, len(values), per_write)]

    @property
    def observations(self) -> Array:
        return np.concatenate([sample.context.newest for sample in self.samples])  # type: ignore[union-attr]

    @property
    def targets(self) -> Array:
        return np.concatenate([sample.target for sample in self.samples])
