"""Warm-started retraining, the paper's baseline: collect a memory of samples, train on it, drop it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv
from torch import Tensor

from kbt_rl.agents.behaviour_cloning import Array
from kbt_rl.agents.policies import DecisionTransformerPolicy
from kbt_rl.agents.sample import LearnerInfo
from kbt_rl.agents.transformer_learner import TransformerLearner
from kbt_rl.arguments import between, whole
from kbt_rl.inference.errors import UpdateError
from kbt_rl.inference.loading import load_whole
from kbt_rl.inference.transactions import signals_deferred
from kbt_rl.models.context import ContextWindow
from kbt_rl.models.decision_transformer import DecisionTransformer

# Of a label's distance from its prediction, in units of the actions' scale: its square is well inside float32.
LARGEST = 1e15


@dataclass(frozen=True)
class WarmStartInfo(LearnerInfo):
    """What a labelled sample did to the baseline.

    Attributes:
        memory: Samples waiting for the next training.
        trainings: How often the network was retrained by this update.
        loss: Mean squared error of the last epoch in units of the label rms, or the cross-entropy of discrete actions;
            NaN without a training.
    """

    memory: int = 0
    trainings: int = 0
    loss: float = float("nan")


class WarmStart(TransformerLearner):
    """Retrain all weights from where they are, each time ``memory`` new samples have come; then forget the samples.

    Until the first block is full it is the pre-trained policy. Each training starts with a fresh optimiser, as in the
    paper (arXiv:2509.10695, Section V).

    Args:
        policy: ``"TransformerPolicy"`` or a subclass of it.
        env: Environment to learn in; a Gymnasium env, a ``VecEnv`` or an id.
        memory: Samples of a block; the paper tests 10, 20, 25, 50, 75 and 100.
        epochs: Full-batch Adam steps on a block.
        learning_rate: Step size of Adam.
        n_steps: Environment steps between two writes of the log.
        policy_kwargs: Passed to the policy.
        stats_window_size: Episodes that rollout statistics average over.
        tensorboard_log: Folder of the TensorBoard logs; None for none.
        verbose: 0 silent, 1 training output.
        seed: Seed of the initial weights, the label stream and the environment.
        device: The CPU by default.
    """

    info_type = WarmStartInfo

    def __init__(
        self,
        policy: str | type[BasePolicy] = "TransformerPolicy",
        env: GymEnv | str | None = None,
        memory: int = 50,
        epochs: int = 100,
        learning_rate: float = 1e-3,
        n_steps: int = 10,
        policy_kwargs: dict[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: str = "cpu",
        _init_setup_model: bool = True,
    ) -> None:
        self.memory, self.epochs = whole("memory", memory, 1), whole("epochs", epochs, 1)
        expected = "it must be positive and finite (memory and epochs must be at least 1)"
        self.step_size = between("learning_rate", learning_rate, 0.0, expected=expected, open_low=True)
        self._stored: list[tuple[ContextWindow, Array]] = []
        self._labels_used = 0
        super().__init__(
            policy, env, n_steps, policy_kwargs, stats_window_size, tensorboard_log, verbose, seed, device,
            _init_setup_model,
        )  # fmt: skip

    def _setup_model(self) -> None:
        super()._setup_model()
        if isinstance(self.policy, DecisionTransformerPolicy):
            raise TypeError(
                "WarmStart trains the transformer's own last layer, and a DecisionTransformerPolicy acts with its "
                "Bayesian head instead; use TransformerPolicy"
            )

    @property
    def labels_used(self) -> int:
        """Labelled rows that were trained on, or wait in the memory."""
        return self._labels_used

    def _forget_samples(self) -> None:
        """Forget samples that waited for a training."""
        self._stored, self._labels_used = [], 0

    def _update(self, context: ContextWindow, target: Array, features: Tensor | None, rows: Array) -> WarmStartInfo:
        if features is None:
            features = self.policy.encode(context)
        error = target - self.policy.act(features)
        self._check_size(error)
        transformer, stored, trainings, loss = self.policy.transformer, list(self._stored), 0, float("nan")
        for row in range(len(target)):
            stored.append((context.rows(slice(row, row + 1)), target[row : row + 1]))
            if len(stored) >= self.memory:
                transformer, loss = self._trained(transformer, stored)
                stored, trainings = [], trainings + 1
        state = transformer.state_dict()
        with signals_deferred():
            if trainings:
                load_whole(self.policy.transformer, state)
                self._features = None  # those of the running episode belong to the old weights
            self._stored, self._labels_used = stored, self._labels_used + len(target)
        return WarmStartInfo(
            labels=len(target),
            innovation=float(np.sqrt(np.mean(np.square(error)))),
            memory=len(stored),
            trainings=trainings,
            loss=loss,
        )

    def _check_size(self, error: Array) -> None:
        """Raise UpdateError for labels whose squares leave float32, by which every weight would become NaN."""
        largest = float(np.abs(error / self.policy.transformer.action_scale.cpu().numpy()).max())
        if not largest < LARGEST:
            raise UpdateError(
                f"a label is {largest:.3g} times the scale of the actions from its prediction, where at most "
                f"{LARGEST:.0e} are learned; nothing has changed. Check the target's units"
            )

    def _trained(
        self, transformer: DecisionTransformer, stored: list[tuple[ContextWindow, Array]]
    ) -> tuple[DecisionTransformer, float]:
        """A copy after ``epochs`` full-batch steps of a fresh Adam on all weights, and the loss of the last one."""
        trained = copy.deepcopy(transformer)
        contexts, targets = zip(*stored, strict=True)
        inputs = [torch.from_numpy(np.concatenate(parts)).to(self.device) for parts in zip(*contexts, strict=True)]
        target = torch.from_numpy(np.concatenate(targets)).to(self.device, torch.float32)
        fused = self.device.type in ("cpu", "cuda")  # a quarter less time for a network of this size
        optimiser = torch.optim.Adam(trained.parameters(), lr=self.step_size, fused=fused)
        trained.train()
        for _ in range(self.epochs):
            loss = self.policy.actions.loss(trained(*inputs)[:, -1], target, trained.action_scale)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        if not all(bool(torch.isfinite(weights).all()) for weights in trained.parameters()):
            raise UpdateError(
                f"training on {len(stored)} samples leaves weights that are not finite; nothing has changed. Lower the "
                "learning rate"
            )
        return trained.eval(), float(loss.detach())
