"""Many copies of one learner, each with an episode and a posterior of its own, stepped side by side.

A way to learn is judged over many starts. Each start has its own learner, but all of them are asked, labelled and moved
at the same steps, so that features, actions and dynamics are computed as one batch.
"""

from __future__ import annotations

import copy
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from kbt_rl.agents.kbt import KBT
from kbt_rl.agents.sample import Sample
from kbt_rl.agents.warm_start import WarmStart
from kbt_rl.envs.plant import InvertedPendulumParams
from kbt_rl.experiments.config import Method
from kbt_rl.experiments.ekf import EKFHead
from kbt_rl.experiments.learners import batch_force, build, features_of, snapshot
from kbt_rl.experiments.simulation import Force, expert_force
from kbt_rl.inference.acting import ActingView, stack_views, view_mean
from kbt_rl.inference.head import BayesianHead

FloatArray = npt.NDArray[np.float64]


class Fleet(Protocol):
    """``n`` learners of one kind."""

    def force(self, states: npt.NDArray[Any]) -> FloatArray:
        """What each does in states of its own, ``(n, 4)`` to ``(n,)`` N or ``(n, m, 4)`` to ``(n, m)``."""

    def learn(self, states: npt.NDArray[Any], forces: FloatArray) -> None:
        """One label each: the expert's forces ``(n,)`` N in the states ``(n, 4)``; NaN where there is none."""

    def uncertainty(self, states: npt.NDArray[Any]) -> FloatArray:
        """Standard deviation of each mean, ``(n,)`` N, for states ``(n, 4)``; NaN where there is none."""


class HeadFleet:
    """Posteriors over the last layers on one shared encoder."""

    def __init__(self, model: KBT, count: int, ekf: bool = False) -> None:
        self._policy = model.policy
        head = _as_ekf(model.policy.head) if ekf else model.policy.head
        self._heads = [copy.deepcopy(head) for _ in range(count)]
        self._newton = model.max_force * float(head.target_scale[0])
        self._max_force = model.max_force
        self._stacked: ActingView | None = None

    def force(self, states: npt.NDArray[Any]) -> FloatArray:
        """See ``Fleet``."""
        if self._stacked is None:
            self._stacked = stack_views([head.view() for head in self._heads])
        features = features_of(self._policy, states.reshape(-1, 4)).view(len(states), -1, self._heads[0].in_features)
        with torch.inference_mode():
            mean: FloatArray = view_mean(self._stacked, self._heads[0].standardise(features))[..., 0].numpy()
        return mean.reshape(states.shape[:-1]) * self._newton

    def keep(self, count: int) -> None:
        """Go on with the first ``count`` learners only."""
        self._heads = self._heads[:count]
        self._stacked = None

    def learn(self, states: npt.NDArray[Any], forces: FloatArray) -> None:
        """See ``Fleet``."""
        features = features_of(self._policy, np.nan_to_num(states)).numpy()
        labels = np.asarray(forces)[:, None] / self._max_force
        for i in np.flatnonzero(np.isfinite(forces)):
            self._heads[i].update(features[i : i + 1], labels[i : i + 1])
        self._stacked = None

    def uncertainty(self, states: npt.NDArray[Any]) -> FloatArray:
        """See ``Fleet``."""
        features = features_of(self._policy, states)
        variances = [float(head.predict_logits(row[None]).cov) for head, row in zip(self._heads, features, strict=True)]
        return np.sqrt(variances) * self._newton

    @property
    def noise_variance(self) -> float:
        """Of the labels, in the head's own units."""
        return float(self._heads[0].noise_cov[0, 0])

    def pool_variances(self, states: npt.NDArray[Any]) -> FloatArray:
        """Epistemic variance of each learner at a pool of states of its own, ``(n, pool, 4)`` to ``(n, pool)``."""
        features = features_of(self._policy, states.reshape(-1, 4)).view(*states.shape[:-1], -1)
        own = [head.predict_logits(rows).cov[:, 0, 0].numpy() for head, rows in zip(self._heads, features, strict=True)]
        return np.stack(own)


def _as_ekf(head: BayesianHead) -> EKFHead:
    """The same prior, learning by the extended Kalman filter."""
    rival = EKFHead(head.in_features, head.out_features, head.config)
    rival.load_state_dict(head.state_dict())
    return rival


class WarmFleet:
    """Transformers that are trained on full memories, each on its own."""

    def __init__(self, model: WarmStart, count: int) -> None:
        self._models = [copy.deepcopy(model) for _ in range(count)]
        self._force: Force | None = None

    def force(self, states: npt.NDArray[Any]) -> FloatArray:
        """See ``Fleet``."""
        if self._force is None:
            self._force = batch_force(self._models[0], [snapshot(model) for model in self._models])
        return self._force(states.reshape(len(states), -1, 4)).reshape(states.shape[:-1])

    def learn(self, states: npt.NDArray[Any], forces: FloatArray) -> None:
        """See ``Fleet``."""
        rows = np.asarray(states, dtype=np.float32)
        for i in np.flatnonzero(np.isfinite(forces)):
            model = self._models[i]
            info: Any = model.update(Sample(rows[i], np.asarray([forces[i] / model.max_force])))
            if info.trainings:
                self._force = None

    def uncertainty(self, states: npt.NDArray[Any]) -> FloatArray:
        """See ``Fleet``."""
        return np.full(len(states), np.nan)


class HoldLabel:
    """No learning: act with the pre-trained policy until a label comes, then with the newest label."""

    def __init__(self, pretrained: Force, count: int) -> None:
        self._pretrained = pretrained
        self._held = np.full(count, np.nan)  # NaN until the first label

    def force(self, states: npt.NDArray[Any]) -> FloatArray:
        """See ``Fleet``."""
        held = self._held.reshape(-1, *[1] * (states.ndim - 2))
        if np.isfinite(held).all():
            return np.broadcast_to(held, states.shape[:-1])
        return np.where(np.isfinite(held), held, self._pretrained(states))

    def learn(self, states: npt.NDArray[Any], forces: FloatArray) -> None:
        """See ``Fleet``."""
        self._held = np.where(np.isfinite(forces), forces, self._held)

    def uncertainty(self, states: npt.NDArray[Any]) -> FloatArray:
        """See ``Fleet``."""
        return np.full(len(states), np.nan)


class Fixed:
    """A policy that does not learn."""

    def __init__(self, force: Force) -> None:
        self._force = force

    def force(self, states: npt.NDArray[Any]) -> FloatArray:
        """See ``Fleet``."""
        return self._force(states)

    def learn(self, states: npt.NDArray[Any], forces: FloatArray) -> None:
        """See ``Fleet``."""

    def uncertainty(self, states: npt.NDArray[Any]) -> FloatArray:
        """See ``Fleet``."""
        return np.full(len(states), np.nan)


def make_fleet(method: Method, pretrained: KBT, count: int, params: InvertedPendulumParams) -> Fleet:
    """``count`` learners of a method, each starting as the pre-trained policy; ``params`` is the plant they are on."""
    if method.kind == "expert":
        return Fixed(expert_force(params))
    if method.kind == "pretrained":
        return Fixed(_shared(pretrained))
    if method.kind == "hold":
        return HoldLabel(_shared(pretrained), count)
    if method.kind == "ekf":
        settings = Method(method.name, "kbt", method.settings)
        return HeadFleet(_kbt(settings, pretrained), count, ekf=True)
    if method.kind == "warm_start":
        model = build(method, pretrained)
        assert isinstance(model, WarmStart)
        return WarmFleet(model, count)
    return HeadFleet(_kbt(method, pretrained), count)


def _kbt(method: Method, pretrained: KBT) -> KBT:
    model = build(method, pretrained)
    assert isinstance(model, KBT)
    return model


def _shared(model: KBT) -> Force:
    """The pre-trained policy as one force law for any number of states."""
    force = batch_force(model, [snapshot(model)])
    return lambda states: force(states[None])[0]
