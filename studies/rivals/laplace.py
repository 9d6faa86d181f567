"""Last-layer Laplace, label by label: the posterior of one label is the prior of the next."""

from __future__ import annotations

from studies.rivals.base import Start
from studies.rivals.last_layer import FloatArray, LastLayer, measured


class LastLayerLaplace(LastLayer):
    """Mode, then ``precision <- precision + J' H J`` (Daxberger et al. 2021, arXiv:2106.14806, as in laplace-torch).

    With a linear layer and Gaussian labels ``J`` is the features and ``H = 1 / noise``: the posterior is exact, and one
    Newton step finds its mode. Kept is the inverse of the precision. The prior is
    isotropic, around the trained layer.

    Note:
        The actions are those of recursive least squares without forgetting and with ``delta = prior / noise``.

    Args:
        start: Where it starts.
        prior_variance: Of the weights.
        noise_variance: Of the labels; both in squared units, and only their ratio counts for the actions.
    """

    def __init__(self, start: Start, prior_variance: float, noise_variance: float) -> None:
        super().__init__(start, prior_variance)
        self.noise_variance = noise_variance

    def conditioned(
        self, mean: FloatArray, spread: FloatArray, features: FloatArray, label: float
    ) -> tuple[FloatArray, FloatArray]:
        """See ``LastLayer``."""
        return measured(mean, spread, features, label, self.noise_variance)
