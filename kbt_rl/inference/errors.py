"""Errors of the inference: what came, what was expected, what to do."""

from __future__ import annotations


class UpdateError(ValueError):
    """An update was refused before anything changed; the old posterior stands."""


class NotPositiveDefiniteError(UpdateError):
    """A covariance that has to be positive definite is not, or not by more than its rounding.

    Args:
        name: Which matrix.
        smallest: Its smallest eigenvalue, NaN if the matrix is not finite.
        largest: Its largest eigenvalue.
    """

    def __init__(self, name: str, smallest: float, largest: float = float("nan")) -> None:
        if smallest != smallest:
            found = "holds NaN or infinity; check features and target for huge values"
        elif smallest > 0.0:
            found = (
                f"has eigenvalues from {smallest:.3g} to {largest:.3g}, too far apart for float64; raise the noise "
                "variance, or scale the features"
            )
        else:
            found = (
                f"has the eigenvalue {smallest:.3g}; raise the noise variance, as repeated rows without noise do this"
            )
        super().__init__(f"{name} {found}. The posterior is unchanged.")
        self.name, self.smallest = name, smallest
