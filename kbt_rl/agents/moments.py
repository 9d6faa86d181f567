"""What a policy with a posterior expects of a teacher."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy.typing as npt

Array = npt.NDArray[Any]


class ActionMoments(NamedTuple):
    """Distribution of the expert's action for each observation, in action units.

    Attributes:
        mean: ``(n, action size)``; the probability of each action if they are discrete.
        epistemic: Covariance from what the weights do not know, ``(n, action size, action size)``.
        aleatoric: Covariance of the label noise, or of the choice of a discrete action (one-hot) with these
            probabilities, of the same shape.
    """

    mean: Array
    epistemic: Array
    aleatoric: Array
