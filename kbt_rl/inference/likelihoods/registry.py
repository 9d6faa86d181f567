"""The rules by name. A new one is a file and a line here."""

from __future__ import annotations

from kbt_rl.inference.likelihoods.base import Likelihood
from kbt_rl.inference.likelihoods.identity import Measure, Replace
from kbt_rl.inference.likelihoods.softmax import Fisher, Laplace, ReplaceSoftmax, Taylor

LIKELIHOODS: dict[str, Likelihood] = {
    "measure": Measure(),
    "replace": Replace(),
    "laplace": Laplace(),
    "fisher": Fisher(),
    "taylor": Taylor(),
    "replace_softmax": ReplaceSoftmax(),
}
