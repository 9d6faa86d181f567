"""Errors of the inference: what came, what was expected, what to do."""

from __future__ import annotations


class UpdateError(ValueError):
    """An update was refused before anything changed; the old posterior stands."""


class NegativeVarianceError(UpdateError):
    """The update would make a weight variance negative."""


class NotPositiveDefiniteError(UpdateError):
    """A matrix that has to be positive definite is not.

    Args:
        name: Which matrix.
        smallest: Its smallest eigenvalue, NaN if the matrix is not finite.
    """

    def __init__(self, name: str, smallest: float) -> None:
        super().__init__(
            f"{name} is not positive definite: its smallest eigenvalue is {smallest:.3g}. The posterior is unchanged. "
            "Raise the noise variance (repeated rows without noise are singular), or check the features for NaN."
        )
        self.name, self.smallest = name, smallest
