"""What the suite compares: this library, the rivals, and not learning."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from kbt_rl.agents.adapt import Skip, adapt
from kbt_rl.agents.sample import Sample
from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.errors import UpdateError
from studies.rivals.base import Start
from studies.rivals.registry import CANDIDATES, RIVALS
from studies.suite.setting import Setting
from studies.trial import Fixed, Learner, Method


class Adapted:
    """``adapt(policy)``, and how many labels its intervals held.

    Args:
        setting: Where to start.
        noise: Label noise over the prior variance of the output; found out if None.
        skip: See ``adapt``.
        head: Further fields of a ``HeadConfig``.

    Attributes:
        inside: Of each label so far, the share of its entries that were in the 95 % interval; NaN if it had none.
        failed: Labels that were refused.
    """

    def __init__(
        self, setting: Setting, noise: float | None = None, skip: Skip = "hidden", head: dict[str, Any] | None = None
    ) -> None:
        given = {} if noise is None else {"structure": "shared", "rho": 0.0, "noise_variance": noise}
        config = None if noise is None and head is None else HeadConfig(**{**given, **(head or {})})
        stored = setting.nominal
        self.policy = adapt(
            stored.policy, states=setting.states, head=config, skip=skip, vec_normalize=stored.statistics
        )
        self.inside: list[float] = []
        self.failed = 0

    def update(self, sample: Sample) -> None:
        """Learn from a label; one that is refused is counted, and the posterior stays."""
        self.inside.append(self._inside(sample))
        try:
            self.policy.update(sample.context, sample.target, sample.kind)
        except UpdateError:
            self.failed += 1

    def _inside(self, sample: Sample) -> float:
        policy, head = self.policy, self.policy.head
        features = policy.encode(policy.start(sample.context))
        target = policy.targets(features, sample.target, sample.kind)[0]
        known = ~np.isnan(target)
        if not known.any():
            return float("nan")
        mean, epistemic, aleatoric = (part.cpu().numpy()[0] for part in head.predict(features))
        variance = (epistemic + aleatoric).diagonal()
        half = stats.t.ppf(0.975, head.predictive_dof) * np.sqrt(variance)
        return float((np.abs(target - mean) <= half)[known].mean())


def build(method: Method, setting: Setting) -> Learner:
    """A learner of this method that starts as the nominal policy.

    Raises:
        ValueError: There is no such kind.
    """
    kinds: dict[str, Callable[..., Learner]] = {
        "adapt": Adapted,
        "not learning": lambda given: Fixed(given.nominal.acting),
        "teacher": lambda given: Fixed(given.taught),
    }
    if method.kind in kinds:
        return kinds[method.kind](setting, **method.settings)
    if method.kind not in RIVALS:
        known = ", ".join([*kinds, *RIVALS])
        raise ValueError(f"method {method.name!r} is of the kind {method.kind!r}; there are {known}")
    stored = setting.nominal
    return RIVALS[method.kind](Start(stored.policy, stored.normaliser, setting.states), **method.settings)


def tuned(task: str) -> list[Method]:
    """The rivals at their best for a task, by ``python -m studies tune_rivals``; untuned ones are left out."""
    best = json.loads(Path(__file__).with_name("tuned.json").read_text(encoding="utf-8"))[task]
    return [Method(name, methods[0].kind, best[name]) for name, methods in CANDIDATES.items() if name in best]


NONE, TEACHER = Method("not learning", "not learning"), Method("teacher", "teacher")
KBT = Method("kbt_rl", "adapt")
#: What one would have to choose without ``ModelAverage``.
FIXED = tuple(Method(f"noise {noise:g}", "adapt", {"noise": noise}) for noise in (1e-3, 1e-2, 1e-1))
