"""Behaviour cloning of an expert: how every policy here is pre-trained, before anything is learned online."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from rich.progress import Progress
from stable_baselines3.common.vec_env import VecEnv

from kbt_rl.agents.actions import ActionFormat, ContinuousActions, action_format
from kbt_rl.arguments import between, whole
from kbt_rl.models.context import ContextWindow, advance_window, start_window, with_action
from kbt_rl.models.decision_transformer import DecisionTransformer

Array = npt.NDArray[Any]
Labeller = Callable[[Array], Array]

# Contexts that the mean of the features is taken over.
_CENTRING_SAMPLES = 4_096
# Half a range from which on an action counts as unbounded, and labels of so small a share of it as rounding.
_ENDLESS, _UNUSED = 1e9, 1e-7
# What float32 holds, with room for products.
_SMALLEST, _LARGEST = 1e-30, 1e30
# Steps that the expert drives before an environment counts as one whose episodes do not end: times the samples, and
# more.
_PATIENCE, _PATIENCE_AT_LEAST = 10, 10_000


@dataclass(frozen=True)
class PretrainConfig:
    """How behaviour cloning is run.

    Attributes:
        samples: Labelled contexts, a tenth of them held out.
        steps: Gradient steps.
        batch_size: Samples a step.
        learning_rate: Peak of the one-cycle schedule of Adam.
        weight_decay: Decoupled weight decay of the encoder's blocks. Embeddings and the last layer are free of it, so
            that the features keep every direction of the state while what the task does not need fades.
    """

    samples: int = 20_000
    steps: int = 4_000
    batch_size: int = 128
    learning_rate: float = 5e-3
    weight_decay: float = 0.3

    def __post_init__(self) -> None:
        for name in ("samples", "steps", "batch_size"):
            object.__setattr__(self, name, whole(name, getattr(self, name), 1))
        rates = (("learning_rate", "a finite number above 0", True), ("weight_decay", "finite and not negative", False))
        for name, expected, open_low in rates:
            value = between(name, getattr(self, name), 0.0, expected=expected, open_low=open_low)
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class PretrainInfo:
    """What behaviour cloning reached, in action units (and in newtons where the environment states its force limit).

    Attributes:
        validation_rmse: Root mean square error on held-out contexts; of the probabilities of discrete actions.
        validation_rmse_newton: The same times the environment's ``max_force``; NaN where it has none, or for discrete
            actions.
        label_rms: Root mean square of the labels, the unit of the head's variances; 1 for discrete actions.
        samples: Contexts trained on.
        validation_accuracy: Share of held-out contexts in which the most probable action is the expert's; None for
            continuous actions.
    """

    validation_rmse: float
    validation_rmse_newton: float
    label_rms: float
    samples: int
    validation_accuracy: float | None = None


class Demonstrations:
    """Contexts and the expert's actions in them, with returns-to-go where they come from episodes."""

    def __init__(self, context: ContextWindow, target: Array, returns: Array) -> None:
        self.context, self.target, self.returns = context, target, returns

    def __len__(self) -> int:
        return len(self.target)


def box_demonstrations(
    expert: Labeller, box: spaces.Box, samples: int, rng: np.random.Generator, context_length: int, action_size: int
) -> Demonstrations:
    """I.i.d. states of a box with the expert's actions, the paper's training data."""
    states = rng.uniform(box.low, box.high, (samples, *box.shape)).astype(np.float32)
    target = np.asarray(expert(states), dtype=np.float64)
    returns = np.zeros((samples, context_length), dtype=np.float32)
    return Demonstrations(start_window(states, context_length, action_size), target, returns)


def rollout_demonstrations(
    expert: Labeller,
    env: VecEnv,
    samples: int,
    context_length: int,
    progress: Callable[[int], None],
    needs_returns: bool = True,
) -> Demonstrations:
    """Windows of episodes that the expert drives; for policies whose context is longer than one step.

    They are of episodes that have ended. Where too few do within ten times the samples, those of episodes that have
    not are used as well, with a warning, unless their returns are needed.

    Raises:
        ValueError: Too few episodes have ended for the returns that are needed.
    """
    longest = max(_PATIENCE * samples, _PATIENCE_AT_LEAST * env.num_envs)
    form = action_format(env.action_space)
    windows: list[ContextWindow] = []
    targets: list[Array] = []
    episodes = _ReturnsToGo(env.num_envs, context_length)
    observations = env.reset()
    assert isinstance(observations, np.ndarray)
    context = start_window(observations, context_length, form.size)
    while episodes.finished < samples and len(windows) * env.num_envs < longest:
        labels = np.asarray(expert(context.newest), dtype=np.float64)
        actions = form.decide(labels)
        context = with_action(context, form.remember(actions))
        windows.append(context)
        targets.append(labels)
        observations, rewards, dones, _ = env.step(actions)
        assert isinstance(observations, np.ndarray)
        episodes.add(rewards, dones)
        context = advance_window(context, observations, dones)
        progress(env.num_envs)
    returns = episodes.windows()
    merged = ContextWindow(*(np.concatenate(parts) for parts in zip(*windows, strict=True)))
    finished: Array = np.isfinite(returns.sum(axis=1))
    if episodes.finished < samples:
        _tell_of_endless(episodes.finished, len(finished), samples, needs_returns)
        finished[:] = True
    picked = np.flatnonzero(finished)[:samples]
    return Demonstrations(
        merged.rows(picked), np.concatenate(targets)[picked], np.where(np.isnan(returns), 0.0, returns)[picked]
    )


def _tell_of_endless(finished: int, steps: int, samples: int, needs_returns: bool) -> None:
    """Say that episodes do not end, as an error where that cannot be helped."""
    found = (
        f"of the {steps} steps that the expert drove, {finished} are of episodes that ended, and {samples} samples "
        "were asked for"
    )
    if needs_returns:
        raise ValueError(
            f"{found}; with target_return the policy learns from returns, which an episode has at its end. Give the "
            "environment a time limit (gymnasium.wrappers.TimeLimit), or ask for fewer samples"
        )
    warnings.warn(
        f"{found}; windows of episodes that did not end are used as well. If the environment should have a time limit, "
        "wrap it in gymnasium.wrappers.TimeLimit",
        stacklevel=4,
    )


class _ReturnsToGo:
    """Sum of rewards from each step to the end of its episode, seen through context windows."""

    def __init__(self, n_envs: int, context_length: int) -> None:
        self._rewards: list[Array] = []
        self._dones: list[Array] = []
        self._n_envs, self._length = n_envs, context_length
        self._running = np.zeros(n_envs, dtype=np.int64)
        self.finished = 0  # steps of episodes that have ended

    def add(self, rewards: Array, dones: Array) -> None:
        self._rewards.append(rewards)
        self._dones.append(dones)
        self._running += 1
        self.finished += int(self._running[dones].sum())
        self._running[dones] = 0

    def windows(self) -> Array:
        """``(steps * n_envs, K)`` float32; NaN where the episode did not end, 0 where the window is padding."""
        steps = len(self._rewards)
        to_go = np.full((steps + 1, self._n_envs), np.nan, dtype=np.float32)
        age = np.zeros((steps, self._n_envs), dtype=np.int64)
        for t in range(1, steps):
            age[t] = np.where(self._dones[t - 1], 0, age[t - 1] + 1)
        for t in reversed(range(steps)):
            to_go[t] = self._rewards[t] + np.where(self._dones[t], 0.0, to_go[t + 1])
        out = np.zeros((steps, self._n_envs, self._length), dtype=np.float32)
        for back in range(self._length):
            source = np.maximum(np.arange(steps) - back, 0)
            out[:, :, self._length - 1 - back] = np.where(age >= back, to_go[source], 0.0)
        return out.reshape(-1, self._length)


def clone_behaviour(
    transformer: DecisionTransformer,
    demonstrations: Demonstrations,
    form: ActionFormat,
    config: PretrainConfig,
    rng: np.random.Generator,
    max_force: float,
    progress: Callable[[int], None],
) -> PretrainInfo:
    """Train all weights on the squared error in units of the labels' rms, or on the cross-entropy of discrete actions.

    Sets the transformer's buffers.

    Args:
        transformer: Trained in place.
        demonstrations: What to imitate.
        form: What the outputs stand for.
        config: Sizes and learning rate.
        rng: Splits and shuffles.
        max_force: Newtons of an action of 1, NaN if unknown.
        progress: Called with the number of steps done since the last call.
    """
    order = rng.permutation(len(demonstrations))
    held_out = order[: max(1, len(order) // 10)]
    training = order[len(held_out) :] if len(order) > 1 else order
    label_rms = np.ones(form.size)
    if isinstance(form, ContinuousActions):
        label_rms = np.sqrt(np.mean(np.square(demonstrations.target[training]), axis=0))
    transformer.action_scale.copy_(torch.from_numpy(action_units(label_rms, form)))
    returns = demonstrations.returns
    if transformer.config.target_return is not None:
        transformer.return_scale.fill_(max(float(np.abs(returns).max()), 1.0))
    device = transformer.action_scale.device
    inputs = [torch.from_numpy(array).to(device) for array in (*demonstrations.context, returns)]
    target = torch.from_numpy(demonstrations.target).float().to(device)
    blocks = list(transformer.encoder.parameters())
    decayed = {id(parameter) for parameter in blocks}
    free = [parameter for parameter in transformer.parameters() if id(parameter) not in decayed]
    groups = [{"params": blocks, "weight_decay": config.weight_decay}, {"params": free, "weight_decay": 0.0}]
    fused = device.type in ("cpu", "cuda")
    optimiser = torch.optim.AdamW(groups, config.learning_rate, fused=fused)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.learning_rate, total_steps=config.steps)
    transformer.train()
    for _ in range(config.steps):
        batch = torch.from_numpy(rng.choice(training, config.batch_size))
        outputs = transformer(*(tensor[batch] for tensor in inputs))[:, -1]
        loss = form.loss(outputs, target[batch], transformer.action_scale)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        progress(1)
    transformer.eval()
    with torch.no_grad():
        some = training[:_CENTRING_SAMPLES]
        transformer.feature_mean.copy_(transformer.encode(*(tensor[some] for tensor in inputs))[:, -1].mean(0))
        guess = form.mean(transformer(*(tensor[held_out] for tensor in inputs))[:, -1])
    rmse = float((guess - target[held_out]).square().mean().sqrt())
    in_newtons: float = rmse * max_force
    accuracy: float | None = None
    if not isinstance(form, ContinuousActions):
        accuracy = float((guess.argmax(-1) == target[held_out].argmax(-1)).double().mean())
        in_newtons = float("nan")
    return PretrainInfo(rmse, in_newtons, float(np.sqrt(np.mean(label_rms**2))), len(training), accuracy)


def action_units(label_rms: Array, form: ActionFormat) -> Array:
    """The unit of each action, ``(a,)``: the rms of its labels, or half its range where the expert does not use it.

    Where such an action has no bounds either, its unit is that of the actions which are used.

    Raises:
        ValueError: A label is not finite, or the expert uses no action at all.
    """
    used = label_rms > _SMALLEST
    if not (label_rms < _LARGEST).all() or not used.any():
        raise ValueError(
            f"the expert's actions have the rms {label_rms}; they must be finite and not all zero, in float32"
        )
    if not isinstance(form, ContinuousActions):
        return label_rms
    half = 0.5 * form.space.high.astype(np.float64) - 0.5 * form.space.low.astype(np.float64)
    bounded = (half > 0.0) & (half < _ENDLESS)
    used &= ~bounded | (label_rms > _UNUSED * half)
    usual = np.sqrt(np.mean(np.square(label_rms[used]))) if used.any() else 1.0
    return np.where(used, label_rms, np.where(bounded, half, usual))


def progress_bar(enabled: bool) -> Progress:
    """A progress bar that draws nothing when it is not wanted."""
    return Progress(disable=not enabled, transient=True)
