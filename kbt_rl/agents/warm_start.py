"""Warm-started retraining, the paper's baseline: collect a memory of samples, train on it, drop it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv
from torch import Tensor

from kbt_rl.agents.behaviour_cloning import Array
from kbt_rl.agents.online import OnlineAlgorithm
from kbt_rl.agents.policies import DecisionTransformerPolicy
from kbt_rl.agents.sample import LearnerInfo
from kbt_rl.models.context import ContextWindow


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


class WarmStart(OnlineAlgorithm):
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
        if memory < 1 or epochs < 1 or not learning_rate > 0:
            raise ValueError(
                f"memory {memory} and epochs {epochs} must be at least 1 and the learning rate {learning_rate} positive"
            )
        self.memory, self.epochs, self.step_size = memory, epochs, learning_rate
        self._stored: list[tuple[ContextWindow, Array]] = []
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

    def _after_pretraining(self) -> None:
        """Forget samples that waited for a training."""
        self._stored = []

    def _update(self, context: ContextWindow, target: Array, features: Tensor | None, rows: Array) -> WarmStartInfo:
        if features is None:
            features = self.policy.encode(context)
        error = target - self.policy.act(features)
        trainings, loss = 0, float("nan")
        for row in range(len(target)):
            self._stored.append((context.rows(slice(row, row + 1)), target[row : row + 1]))
            if len(self._stored) >= self.memory:
                loss = self._train_on_memory()
                trainings += 1
        return WarmStartInfo(
            labels=len(target),
            innovation=float(np.sqrt(np.mean(np.square(error)))),
            memory=len(self._stored),
            trainings=trainings,
            loss=loss,
        )

    def _train_on_memory(self) -> float:
        """``epochs`` full-batch steps of a fresh Adam on all weights; empties the memory."""
        inputs, target = self._memory_tensors()
        transformer = self.policy.transformer
        fused = self.device.type in ("cpu", "cuda")  # a quarter less time for a network of this size
        optimiser = torch.optim.Adam(transformer.parameters(), lr=self.step_size, fused=fused)
        transformer.train()
        for _ in range(self.epochs):
            loss = self.policy.actions.loss(transformer(*inputs)[:, -1], target, transformer.action_scale)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        transformer.eval()
        self._forget_memory()
        return float(loss.detach())

    def _memory_tensors(self) -> tuple[list[Tensor], Tensor]:
        """The memory as inputs of the transformer and their targets."""
        contexts, targets = zip(*self._stored, strict=True)
        inputs = [torch.from_numpy(np.concatenate(parts)).to(self.device) for parts in zip(*contexts, strict=True)]
        return inputs, torch.from_numpy(np.concatenate(targets)).to(self.device, torch.float32)

    def _forget_memory(self) -> None:
        """Start a new memory after a training."""
        self._stored = []
        if self._context is not None:  # the features of the running episode belong to the old weights
            self._features = self.policy.encode(self._context)
