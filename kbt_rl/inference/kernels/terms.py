"""Types and limits that the machine code shares."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
# Neurons, inputs with bias, and neurons a block row (see ``triangle``) of each layer.
Shapes: TypeAlias = tuple[tuple[int, int, int], ...]
# Mean (o,) and covariance (o, o) of the output, Cov(w, u) transposed (o, P), and the variance of each weight (P,).
RowPass: TypeAlias = tuple[Array, Array, Array, Array]
# Mean and variance of the output before the update, the smallest variance of a weight after it, and 1 if it was done.
ScalarRecord: TypeAlias = tuple[float, float, float, float]
# As ``RowPass`` for B rows, row after row: (B o,), (B o, B o), (B o, P), (P,).
RowsPass: TypeAlias = tuple[Array, Array, Array, Array]
# The sums of the step of the weights and of the squared errors, the NIS, the log determinant, the smallest variance.
MeasureRecord: TypeAlias = tuple[float, float, float, float, float]
# Of each hidden unit in each row, (n, B): mean and variance of z, the slope Phi, the density over the sd.
UnitMoments: TypeAlias = tuple[Array, Array, Array, Array]

# As in ``moments``: beyond it the square of a ratio leaves float64.
FAR = 0.5 * math.sqrt(np.finfo(np.float64).max)
INFINITY_BITS = 0x7FF0000000000000
# As in ``record``: what is beyond goes the general way, which refuses it.
LARGEST, FARTHEST = 1e25, 1e6
# The moves of a neuron that is all but switched off are smaller; their products would be subnormal numbers.
SMALLEST_MOVE = 1e-150
