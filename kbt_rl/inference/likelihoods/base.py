"""What a target says about the output: the rules that condition the outputs of the last layer.

Every rule answers in the same form: the step ``dm = S^-1 (m+ - m)`` for the predicted mean ``m`` and covariance ``S``
of the outputs, all rows jointly, and a measurement of ``W' u`` with noise that leaves of ``S`` what the rule leaves.
The weights then move by ``Cov(w, u) dm``, and their covariance by the same measurement.

For the identity link there are ``measure`` (Bayes' rule with Gaussian noise) and ``replace`` (Algorithm 2, lines 23 and
24, as printed); for the softmax link ``laplace``, ``fisher``, ``taylor``, and ``replace_softmax`` (as printed). Where
the outputs are independent, ``each`` does the same in time and memory proportional to their number.

Beside the step every rule tells how probable the target was before it was seen. With the identity link that is the
Gaussian density of all target entries jointly. With the softmax link it is the probability of the labels at the mean
logits, ``sum y log softmax(m)``, which is what the head predicts to first order: rows count as independent, and the
spread of the logits is left out.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

from torch import Tensor

from kbt_rl.inference.types import Gaussian

Link = Literal["identity", "softmax"]


class Conditioning(NamedTuple):
    """The answer of a rule for all rows jointly, ``r`` outputs.

    Attributes:
        mean_step: ``dm``, ``(r,)``.
        directions: ``W``, what is measured of the outputs, ``(r, q)``.
        noise_cov: Of that measurement, ``(q, q)``.
        innovation: Target minus prediction, ``(r,)``.
        nis: Normalised innovation squared: chi-square with as many degrees of freedom as free target entries if the
            prediction is calibrated.
        log_density: Logarithm of the predictive density or probability of the target.
        log_ratio: See ``UpdateInfo``.
        change: ``F`` ``(r, q)`` and signs ``(q,)`` with ``S^-1 (S+ - S) S^-1 = F diag(signs) F'``, for a rule that is
            no measurement; ``directions`` and ``noise_cov`` are then not used.
    """

    mean_step: Tensor
    directions: Tensor
    noise_cov: Tensor
    innovation: Tensor
    nis: Tensor
    log_density: Tensor
    log_ratio: float = math.nan
    change: tuple[Tensor, Tensor] | None = None


class EachConditioning(NamedTuple):
    """As ``Conditioning`` for the independent outputs of one row: a measurement of each, with noise ``(o,)``.

    Infinite noise stands for none.
    """

    mean_step: Tensor
    noise: Tensor
    innovation: Tensor
    nis: Tensor
    log_density: Tensor
    log_ratio: float = math.nan


class Likelihood(ABC):
    """A link, and how a target conditions the outputs. Stateless.

    Attributes:
        link: What the outputs are.
        has_each: Whether ``each`` is there.
    """

    link: Link
    has_each = False

    @abstractmethod
    def condition(self, predicted: Gaussian, target: Tensor, noise_cov: Tensor) -> Conditioning:
        """Condition on the targets of rows.

        Args:
            predicted: Of all rows jointly, mean ``(B o,)`` and covariance ``(B o, B o)``.
            target: ``(B, o)``.
            noise_cov: Of all rows jointly, ``(B o, B o)``; for rules that have a noise.
        """

    def each(
        self, mean: Tensor, variance: Tensor, target: Tensor, noise: Tensor, active: float
    ) -> EachConditioning | None:
        """The same for one row with independent outputs, all ``(o,)``; None for a rule that has no such form.

        ``active`` is the probability up to which a class keeps its covariance, if it is not the label's.
        """
        return None
