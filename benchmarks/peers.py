"""Public and plain rivals of one update, all with ``update(x, y)`` and ``predict(X) -> mean, variance``.

What cannot be imported is reported by name and reason, never replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from kbt_rl.inference.config import HeadConfig, StructureName
from kbt_rl.inference.head import BayesianHead

Array = npt.NDArray[np.float64]


class Peer(Protocol):
    """A learner of one output from rows of features, one labelled row at a time."""

    def update(self, x: Array, y: float) -> None:
        """Learn from features ``(d,)`` and their label."""

    def predict(self, rows: Array) -> tuple[Array, Array]:
        """Mean and variance of a new noisy label for each row ``(n, d)``; variance NaN if the method has none."""


class Head:
    """The head of this library."""

    def __init__(self, features: int, noise: float, config: HeadConfig) -> None:
        self.head = BayesianHead(features, 1, config)
        self.head.reset(torch.zeros(1, features), torch.zeros(1))
        self.head.set_noise(noise)

    def update(self, x: Array, y: float) -> None:
        """See ``Peer``."""
        self.head.update(x[None], np.array([[y]]))

    def predict(self, rows: Array) -> tuple[Array, Array]:
        """See ``Peer``."""
        found = self.head.predict(torch.from_numpy(rows))
        return found.mean[:, 0].numpy(), (found.epistemic + found.aleatoric)[:, 0, 0].numpy()


class RankOne:
    """Exact Bayesian linear regression on the features by rank-one updates in NumPy."""

    def __init__(self, features: int, noise: float, variance: float = 1.0) -> None:
        self.mean, self.cov = np.zeros(features + 1), variance * np.eye(features + 1)
        self.noise = noise

    def update(self, x: Array, y: float) -> None:
        """See ``Peer``."""
        inputs = np.append(x, 1.0)
        projected = self.cov @ inputs
        predictive = inputs @ projected + self.noise
        self.mean += projected * ((y - inputs @ self.mean) / predictive)
        self.cov -= np.outer(projected, projected / predictive)

    def predict(self, rows: Array) -> tuple[Array, Array]:
        """See ``Peer``."""
        inputs = np.column_stack([rows, np.ones(len(rows))])
        return inputs @ self.mean, np.einsum("np,pq,nq->n", inputs, self.cov, inputs) + self.noise


class River:
    """River's Bayesian linear regression with the same prior and noise."""

    def __init__(self, features: int, noise: float) -> None:
        from river.linear_model import BayesianLinearRegression

        self.model = BayesianLinearRegression(alpha=1.0, beta=1.0 / noise)
        self.names = [*range(features), "bias"]

    def _row(self, x: Array) -> dict[Any, float]:
        return dict(zip(self.names, [*x.tolist(), 1.0], strict=True))

    def update(self, x: Array, y: float) -> None:
        """See ``Peer``."""
        self.model.learn_one(self._row(x), y)

    def predict(self, rows: Array) -> tuple[Array, Array]:
        """See ``Peer``."""
        found = [self.model.predict_one(self._row(row), with_dist=True) for row in rows]
        return np.array([each.mu for each in found]), np.array([each.sigma**2 for each in found])


class JaxEKF:
    """Extended Kalman filter on all weights of a ReLU network, jitted, in float64; from a random start or a given one.

    Args:
        features: Inputs.
        noise: Variance of the labels.
        variance: Prior variance of a weight, relative to the usual ``1 / inputs`` of its layer.
        width: Hidden units.
        seed: Of the random start.
        start: Weight means ``(hidden (k), output)`` and prior covariance instead.
    """

    def __init__(
        self, features: int, noise: float, variance: float = 1.0, width: int = 32, seed: int = 0,
        start: tuple[Array, Array] | None = None,
    ) -> None:  # fmt: skip
        import jax
        import jax.numpy as jnp

        jax.config.update("jax_enable_x64", True)
        self._jax, hidden = jax, width * (features + 1)
        if start is None:
            rng = np.random.default_rng(seed)
            first = rng.standard_normal((width, features + 1)) / np.sqrt(features + 1)
            last = rng.standard_normal(width + 1) / np.sqrt(width + 1)
            mean = np.concatenate([first.ravel(), last])
            spread = np.r_[np.full(hidden, 1.0 / (features + 1)), np.full(width + 1, 1.0 / (width + 1))]
            start = mean, variance * np.diag(spread)
        self.mean, self.cov, self.noise = jnp.asarray(start[0]), jnp.asarray(start[1]), noise

        def network(weights: Any, x: Any) -> Any:
            first = weights[:hidden].reshape(width, features + 1)
            units = jax.nn.relu(first @ jnp.append(x, 1.0))
            return weights[hidden:] @ jnp.append(units, 1.0)

        def step(mean: Any, cov: Any, x: Any, y: Any) -> Any:
            output, slope = jax.value_and_grad(network)(mean, x)
            projected = cov @ slope
            predictive = slope @ projected + noise
            return mean + projected * ((y - output) / predictive), cov - jnp.outer(projected, projected / predictive)

        def predict(mean: Any, cov: Any, rows: Any) -> Any:
            output, slope = jax.vmap(jax.value_and_grad(network), (None, 0))(mean, rows)
            return output, jnp.einsum("np,pq,nq->n", slope, cov, slope) + noise

        self._step, self._predict = jax.jit(step, donate_argnums=(0, 1)), jax.jit(predict)

    def update(self, x: Array, y: float) -> None:
        """See ``Peer``."""
        self.mean, self.cov = self._step(self.mean, self.cov, x, y)
        self._jax.block_until_ready(self.cov)

    def predict(self, rows: Array) -> tuple[Array, Array]:
        """See ``Peer``."""
        mean, variance = self._predict(self.mean, self.cov, rows)
        return np.asarray(mean), np.asarray(variance)


class AdamStep:
    """One step of Adam a sample on a ReLU network of the head's size; it has no variance."""

    def __init__(self, features: int, width: int = 32, seed: int = 0, learning_rate: float = 3e-3) -> None:
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(features, width), nn.ReLU(), nn.Linear(width, 1)).double()
        self.optimiser = torch.optim.Adam(self.net.parameters(), learning_rate, fused=True)

    def update(self, x: Array, y: float) -> None:
        """See ``Peer``."""
        loss = (self.net(torch.from_numpy(x)) - y).square().sum()
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()

    def predict(self, rows: Array) -> tuple[Array, Array]:
        """See ``Peer``."""
        with torch.inference_mode():
            mean = self.net(torch.from_numpy(rows))[:, 0].numpy()
        return mean, np.full(len(rows), np.nan)


class Tagi:
    """TAGI by pytagi's C++ code: diagonal covariance, float32; from its own random start or a given one.

    Its wheel needs shared libraries that pip does not bring along, those of Open MPI 4 and of NCCL.

    Args:
        features: Inputs.
        noise: Variance of the labels.
        width: Hidden units.
        seed: Of the random start.
        start: Weight means ``(hidden (k), output)`` and their prior variances instead.
    """

    def __init__(
        self, features: int, noise: float, width: int = 32, seed: int = 0, start: tuple[Array, Array] | None = None
    ) -> None:
        from pytagi import manual_seed
        from pytagi.nn import Linear, OutputUpdater, ReLU, Sequential

        manual_seed(seed)
        self.net = Sequential(Linear(features, width), ReLU(), Linear(width, 1))
        self.net.set_threads(1)
        self.updater = OutputUpdater(self.net.device)
        self.noise = noise
        if start is not None:
            hidden = width * (features + 1)
            first = [each[:hidden].reshape(width, features + 1) for each in start]
            last = [each[hidden:].reshape(1, width + 1) for each in start]
            # In pytagi's order: means and variances of the weights, then those of the biases.
            self.net.load_state_dict(
                {
                    name: (
                        *(each[:, :-1].ravel().tolist() for each in layer),
                        *(each[:, -1].tolist() for each in layer),
                    )
                    for name, layer in (("Linear.0", first), ("Linear.2", last))
                }
            )

    def update(self, x: Array, y: float) -> None:
        """See ``Peer``."""
        self.net(x.astype(np.float32))
        label, variance = np.array([y], dtype=np.float32), np.array([self.noise], dtype=np.float32)
        self.updater.update(self.net.output_z_buffer, label, variance, self.net.input_delta_z_buffer)
        self.net.backward()
        self.net.step()

    def predict(self, rows: Array) -> tuple[Array, Array]:
        """See ``Peer``."""
        found = [self.net(row.astype(np.float32)) for row in rows]
        mean, variance = (np.array([float(np.ravel(each[i])[0]) for each in found]) for i in (0, 1))
        return mean, variance + self.noise


def peers(features: int, noise: float, chosen: HeadConfig) -> dict[str, Callable[[], Peer]]:
    """Makers of the learners under test, by name.

    Args:
        features: Inputs.
        noise: Variance of the labels, known to all.
        chosen: The head's configuration, however it was chosen.
    """
    ekf = replace(chosen, structure="joint")

    def jax_same_start() -> Peer:
        head = Head(features, noise, ekf).head
        return JaxEKF(features, noise, start=(head.mean.numpy().copy(), head.covariance().numpy()))

    def tagi_same_start() -> Peer:
        head = _head(features, noise, replace(chosen, structure="diagonal"))().head
        return Tagi(features, noise, start=(head.mean.numpy(), head.covariance().diagonal().numpy()))

    return {
        **{f"KBT {each}": _head(features, noise, replace(chosen, structure=each)) for each in STRUCTURES},
        "KBT L = 1": _head(features, noise, replace(chosen, layers=1)),
        "exact linear regression (NumPy)": lambda: RankOne(features, noise),
        "Bayesian linear regression (river)": lambda: River(features, noise),
        "KBT joint, linearised": lambda: Head(features, noise, replace(ekf, propagation="linearised")),
        "EKF, same start (JAX)": jax_same_start,
        "EKF, random start (JAX)": lambda: JaxEKF(features, noise),
        "TAGI, same start (pytagi)": tagi_same_start,
        "TAGI, random start (pytagi)": lambda: Tagi(features, noise),
        "one Adam step": lambda: AdamStep(features),
    }


STRUCTURES: tuple[StructureName, ...] = ("joint", "layer", "neuron", "diagonal")


def _head(features: int, noise: float, config: HeadConfig) -> Callable[[], Head]:
    if config.structure == "diagonal":
        config = replace(config, rho=0.0)
    return lambda: Head(features, noise, config)
