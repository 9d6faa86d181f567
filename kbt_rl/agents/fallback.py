"""A controller that acts where the policy does not know enough: a limit on the epistemic standard deviation.

Before it has labels of the plant it stands on, a policy guesses. A posterior says so itself, and whoever runs a robot
can have something safer act meanwhile: a stiff position loop, a brake, the controller of the last release.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from kbt_rl.agents.experts import Expert, as_labeller
from kbt_rl.arguments import number

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Fallback:
    """Who acts instead of the policy, and from when on.

    There is no hysteresis: whether the controller acts depends on the current context and posterior alone, so that
    nothing of an episode is kept beside the ``state`` that ``predict`` hands around. Near the limit the two may
    alternate; choose a controller from whose actions the policy can take over at any step.

    Args:
        controller: An SB3 policy or algorithm, or a callable from observations ``(n, o)`` to actions ``(n, a)``; with
            discrete actions to actions ``(n,)`` or distributions ``(n, a)``, of which the most probable is taken.
        limit: Largest epistemic standard deviation with which the policy acts itself, in action units (1 is
            ``max_force`` newtons in the environments of this package), the largest over the entries of the action.
            With discrete actions it is that of the logits, which has no unit. At 0 the controller acts always, at
            infinity never.

    Raises:
        ValueError: The limit is negative or NaN.
    """

    controller: Expert
    limit: float

    def __post_init__(self) -> None:
        expected = "a standard deviation is not negative (infinity for no limit)"
        if not number("limit", self.limit, expected) >= 0.0:
            raise ValueError(f"limit is {self.limit}; {expected}")

    def exceeded(self, deviation: Array) -> npt.NDArray[np.bool_]:
        """Rows in which the controller acts, given the epistemic deviations ``(n,)``; NaN is over any limit."""
        over: npt.NDArray[np.bool_] = ~(deviation <= self.limit)
        # A deviation of 0 is one that no posterior with a prior has; "always" is meant to be always.
        return over if self.limit > 0.0 else np.ones_like(over)

    def check(self, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
        """Raise TypeError or ValueError if the controller cannot act in these spaces."""
        as_labeller(self.controller, observation_space, action_space)

    def means(
        self,
        observations: Array,
        taken_over: npt.NDArray[np.bool_],
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
    ) -> npt.NDArray[np.float64]:
        """What the controller does in the rows ``taken_over`` of ``observations`` ``(n, o)``, as a policy's means.

        It is asked about all rows, so that one with a plant for each environment knows which is which.

        Raises:
            ValueError: It answers with another shape, or in one of these rows with something that is not finite.
        """
        answer = as_labeller(self.controller, observation_space, action_space)(observations)
        wrong = np.flatnonzero(taken_over & ~np.isfinite(answer).all(axis=1))
        if len(wrong):
            raise ValueError(
                f"the fallback controller answered {answer[wrong[0]]} to the observation {observations[wrong[0]]}; "
                "one that acts must always have an action (an expert's NaN means that there is no label)"
            )
        return answer[taken_over]


def usable(
    fallback: Fallback | None, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]
) -> Fallback | None:
    """The same, if its controller can act in these spaces.

    Raises:
        TypeError: It is no ``Fallback``, or its controller neither a policy nor callable.
        ValueError: The controller was made for other spaces.
    """
    if fallback is not None:
        if not isinstance(fallback, Fallback):
            raise TypeError(f"a fallback is a Fallback(controller, limit); got {type(fallback).__name__}")
        fallback.check(observation_space, action_space)
    return fallback


class Choice(NamedTuple):
    """Actions of the environment, and the rows ``(n,)`` in which a fallback controller chose them."""

    actions: Array
    taken_over: npt.NDArray[np.bool_]
