"""Every layer by the library's own low-rank extended Kalman filter."""

from __future__ import annotations

from torch import Tensor

from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.errors import UpdateError
from kbt_rl.inference.linearised import LinearisedHead
from studies.rivals.base import DivergedError, Rival, Start


class LowRankEKF(Rival):
    """``LinearisedHead`` with the structure ``low_rank`` over all weights; acts by the posterior mean.

    The filter is that of Chang et al. (2023, LoFi, arXiv:2305.19535), see ``inference.covariance``.

    Args:
        start: Where it starts.
        rank: Of the precision beside its diagonal.
        noise_variance: Of the labels, in squared units.
        hidden_variance: Prior variance of the weights of hidden layers.
        last_variance: Prior variance of the last layer's weights, in the network's own units.
    """

    def __init__(
        self, start: Start, rank: int, noise_variance: float, hidden_variance: float, last_variance: float
    ) -> None:
        super().__init__(start)
        last = f"{len(self.body) - 1}.*"
        self.head = LinearisedHead(
            self.body, self.last.out_features,
            HeadConfig(structure="low_rank", rank=rank, noise_variance=noise_variance),
            prior_variance={last: last_variance, "*": hidden_variance}, target_scale=self.units[0].double(),
        )  # fmt: skip

    def learn(self, inputs: Tensor, target: Tensor) -> None:
        """See ``Rival``."""
        try:
            self.head.update(inputs, target)
        except UpdateError as error:
            raise DivergedError from error
        self.put(self.head.mean.float())
