"""The methods under test behind one interface, and snapshots of them that are evaluated as one batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import kbt_rl  # noqa: F401  registers the environments
from kbt_rl.agents.behaviour_cloning import PretrainConfig
from kbt_rl.agents.kbt import KBT
from kbt_rl.agents.lqr import LQRExpert
from kbt_rl.agents.online import OnlineAlgorithm
from kbt_rl.agents.transformer_policy import TransformerPolicy
from kbt_rl.agents.warm_start import WarmStart
from kbt_rl.envs.plant import LABEL_BOX, SHIFTED
from kbt_rl.experiments.config import Method, Trial, digest
from kbt_rl.experiments.one_token import StackedTransformers
from kbt_rl.experiments.printed import PrintedKBT
from kbt_rl.experiments.simulation import Force, expert_force
from kbt_rl.inference.acting import stack_views, view_mean
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.head import BayesianHead

FloatArray = npt.NDArray[np.float64]
NOMINAL_ID = "kbt_rl/InvertedPendulum-v0"


def clone(seed: int, config: PretrainConfig, path: Path | None = None) -> WarmStart:
    """The nominal expert cloned into a policy; kept in ``path`` and read back from there if it exists.

    It has no head, whose machine code would have to be compiled before the first trial.
    """
    if path is not None and path.exists():
        return WarmStart.load(path)
    env = gym.make(NOMINAL_ID)
    cloner = WarmStart(env=env, seed=seed)
    cloner.pretrain(LQRExpert.for_env(env), config, progress_bar=False)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        cloner.save(path)
    return cloner


def pretrain(seed: int, config: PretrainConfig, path: Path | None = None) -> KBT:
    """A KBT model with what ``clone`` returns for the same arguments."""
    model = KBT(env=gym.make(NOMINAL_ID), seed=seed)
    model.start_from(clone(seed, config, path))
    return model


def pretrained_path(seed: int, config: PretrainConfig, models: Path | None) -> Path | None:
    """Where a policy that ``clone`` makes is kept under a folder; nowhere if that is None."""
    return None if models is None else models / f"cloned-{seed}-{digest(config)}.zip"


def head_config(method: Method) -> HeadConfig | None:
    """Depth, prior and rule of a method's Bayesian head; None for a method without one."""
    if method.kind == "printed":
        return HeadConfig.paper(method.settings["epsilon"], rule="replace")
    if method.kind in ("kbt", "pretrained"):
        return replace(HeadConfig(), **method.settings)
    return None


def prepare_heads(methods: Iterable[Method]) -> None:
    """Compile the machine code of the methods' heads, if this machine does not have it yet."""
    for config in {head_config(method) for method in methods} - {None}:
        BayesianHead(1, 1, config)


def build(
    method: Method, pretrained: OnlineAlgorithm, noise_variance: float = 0.0, warm_start: type[WarmStart] = WarmStart
) -> OnlineAlgorithm:
    """A learner of this method that starts as the pre-trained policy.

    Args:
        method: Kind and settings.
        pretrained: Whose transformer to take over.
        noise_variance: Variance of the labels that the method is told, N^2.
        warm_start: Class of a learner of that kind.
    """
    spaces: dict[str, Any] = {"env": gym.make(NOMINAL_ID), "seed": pretrained.seed}
    head = head_config(method)
    if method.kind == "warm_start":
        learner: OnlineAlgorithm = warm_start(**spaces, **method.settings)
    elif head is not None:
        learner = (PrintedKBT if method.kind == "printed" else KBT)(**spaces, policy_kwargs={"head": head})
    else:
        raise ValueError(f"method kind {method.kind!r} does not learn")
    learner.start_from(pretrained)
    if isinstance(learner, KBT) and noise_variance:
        learner.policy.head.set_noise(noise_variance / SHIFTED.max_force**2)
    return learner


class LabelStream:
    """I.i.d. states of the label box with the shifted expert's force, noisy if asked for."""

    def __init__(self, trial: Trial) -> None:
        self.rng = np.random.default_rng([trial.stream_seed, 3])
        self.noise_sd = trial.noise_variance**0.5
        self.box = np.asarray(LABEL_BOX)
        self._expert = expert_force(SHIFTED)

    def states(self, count: int) -> npt.NDArray[np.float32]:
        """``(count, 4)``."""
        return self.rng.uniform(-self.box, self.box, (count, 4)).astype(np.float32)

    def label(self, states: npt.NDArray[Any]) -> FloatArray:
        """Actions ``(n, 1)``: force over the force limit."""
        force = self._expert(states) + self.noise_sd * self.rng.standard_normal(len(states))
        actions: FloatArray = force[:, None] / SHIFTED.max_force
        return actions


# ---------------------------------------------------------------------- snapshots


def batch_force(learner: OnlineAlgorithm, snapshots: Sequence[Any]) -> Force:
    """Forces of all snapshots at once: states ``(snapshots, starts, 4)`` to ``(snapshots, starts)`` newtons."""
    if isinstance(learner, KBT):
        return _head_force(learner, snapshots)
    return _transformer_force(learner.policy, snapshots)


def snapshot(learner: OnlineAlgorithm) -> Any:
    """What ``batch_force`` needs of the learner as it is now."""
    if isinstance(learner, KBT):
        return learner.policy.head.view()
    return {name: value.clone() for name, value in learner.policy.transformer.state_dict().items()}


def _head_force(learner: KBT, views: Sequence[Any]) -> Force:
    stacked = stack_views(views)
    head, policy = learner.policy.head, learner.policy

    def force(states: npt.NDArray[Any]) -> FloatArray:
        features = features_of(policy, states.reshape(-1, 4)).view(*states.shape[:-1], -1)
        with torch.inference_mode():
            mean = view_mean(stacked, head.standardise(features)) * head.target_scale
        result: FloatArray = mean[..., 0].numpy() * SHIFTED.max_force
        return result

    return force


def _transformer_force(policy: TransformerPolicy, snapshots: Sequence[dict[str, Tensor]]) -> Force:
    stacked = StackedTransformers(list(snapshots), policy.transformer_config)

    def force(states: npt.NDArray[Any]) -> FloatArray:
        with torch.inference_mode():
            actions = stacked(torch.from_numpy(states.astype(np.float32)))
        result: FloatArray = actions[..., 0].double().numpy() * SHIFTED.max_force
        return result

    return force


def features_of(policy: TransformerPolicy, states: npt.NDArray[Any]) -> Tensor:
    """Features of states ``(n, 4)`` without the checks of a single step, ``(n, width)``."""
    observations = torch.from_numpy(np.asarray(states, dtype=np.float32)).unsqueeze(1)
    rows = len(observations)
    with torch.inference_mode():
        return policy.transformer.encode(observations, torch.zeros(rows, 1, 1), torch.zeros(rows, dtype=torch.long))[
            :, 0
        ]


def best_linear_force(policy: TransformerPolicy, samples: int = 20_000) -> Force:
    """The best linear head on the frozen features by least squares: the floor that the encoder sets."""
    box = np.asarray(LABEL_BOX)
    states = np.random.default_rng(0).uniform(-box, box, (samples, 4)).astype(np.float32)
    design: FloatArray = np.column_stack([features_of(policy, states).double().numpy(), np.ones(samples)])
    weights = np.linalg.lstsq(design, expert_force(SHIFTED)(states), rcond=None)[0]

    def force(states: npt.NDArray[Any]) -> FloatArray:
        flat = features_of(policy, states.reshape(-1, 4)).double().numpy()
        result: FloatArray = (np.column_stack([flat, np.ones(len(flat))]) @ weights).reshape(states.shape[:-1])
        return result

    return force
