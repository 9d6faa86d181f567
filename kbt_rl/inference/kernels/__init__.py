"""The forward pass and the update in machine code (numba): one row, several, or many heads.

A head's update takes a few tens of microseconds of arithmetic; calling a tensor library dozens of times for it takes
ten times as long. These functions restate what ``joint``, ``smoother``, ``structures``, ``triangle`` and ``moments``
define for any number of rows and layers; ``tests/test_compiled.py`` holds the two together.

Here is what ``compiled`` and ``stack`` call for heads of one or two layers; ``rows`` has joint updates of several rows,
``deep`` heads of more layers.

A number in the source is a type of its own to numba, for which callees are compiled once more: hence ``np.int64(0)``.

Sizes: ``n`` hidden units with ``k`` inputs (bias included), ``o`` outputs, ``P`` weights.
"""

from kbt_rl.inference.kernels.acting import act, acting_form
from kbt_rl.inference.kernels.many import commit_many, enter_records, learn_many, means_many, moments_many
from kbt_rl.inference.kernels.neurons_update import learn_neurons
from kbt_rl.inference.kernels.predicting import pair_form, predict
from kbt_rl.inference.kernels.row import learn, propagate
from kbt_rl.inference.kernels.step import commit, weight_step
from kbt_rl.inference.kernels.units import gradients, unit_moments

__all__ = [
    "act",
    "acting_form",
    "commit",
    "commit_many",
    "enter_records",
    "gradients",
    "learn",
    "learn_many",
    "learn_neurons",
    "means_many",
    "moments_many",
    "pair_form",
    "predict",
    "propagate",
    "unit_moments",
    "weight_step",
]
