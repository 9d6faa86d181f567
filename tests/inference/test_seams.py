"""The five seams: a structure and a likelihood from outside the package, and how few files an update passes through."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import randn

from kbt_rl.inference.config import HeadConfig
from kbt_rl.inference.covariance.registry import STRUCTURES
from kbt_rl.inference.head import BayesianHead
from kbt_rl.inference.likelihoods.registry import LIKELIHOODS

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
FEATURES = 3


@pytest.fixture(scope="module")
def examples() -> Iterator[list[str]]:
    """The code of the page, run once; what it registers is taken out again."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), {"__name__": "example"})
    yield blocks
    del STRUCTURES["isotropic"], LIKELIHOODS["poisson"]


def test_each_example_is_under_forty_lines(examples: list[str]) -> None:
    assert len(examples) == 2
    assert max(len(block.splitlines()) for block in examples) < 40


@pytest.mark.parametrize("layers", [1, 2])
def test_a_structure_from_outside_learns_forgets_saves_and_rolls_back(examples: list[str], layers: int) -> None:
    settings: dict[str, Any] = {"structure": "isotropic", "layers": layers, "hidden_variance": 0.1, "rho": 0.0}
    head = BayesianHead(FEATURES, 2, HeadConfig(history=2, noise_variance=0.1, **settings))
    assert len(head.state.cov[0]) == layers
    features, target = randn(4, FEATURES, seed=1), randn(4, 2, seed=2)
    before = {name: value.clone() for name, value in head.state_dict().items()}
    spread = head.predict(features).epistemic_variance.sum()
    head.update(features, target)
    assert float(head.predict(features).epistemic_variance.sum()) < float(spread)
    back = BayesianHead(FEATURES, 2, head.config)
    back.load_state_dict(head.state_dict())
    assert torch.equal(back.predict(features).mean, head.predict(features).mean)
    head.rollback(1)
    for name, value in head.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-12, atol=1e-14)
    head.reopen(0.5)
    head.forget(0.9)


def test_a_likelihood_from_outside_learns_a_rate(examples: list[str]) -> None:
    config = HeadConfig(rule="poisson", structure="joint")  # type: ignore[arg-type]
    head, rate = BayesianHead(1, 1, config), 1.5
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        head.update(
            torch.zeros(1, 1), torch.poisson(torch.full((1, 1), rate, dtype=torch.float64), generator=generator)
        )
    mean, epistemic, _ = head.predict(torch.zeros(1, 1))
    deviation = (rate / 300) ** 0.5
    assert abs(float(mean.exp()) - rate) < 6.0 * deviation
    assert float(epistemic) == pytest.approx(1.0 / (300 * rate), rel=0.05)


# ---------------------------------------------------------------------- how many files one step passes through

TRACE = """
    import sys, warnings
    sys.modules["numba"] = None
    warnings.simplefilter("ignore")
    entered = set()
    def note(frame, event, argument):
        if event == "call":
            entered.add(frame.f_code.co_filename)
    {work}
    sys.setprofile(None)
    print(*sorted(name.split("kbt_rl/")[-1] for name in entered if "/kbt_rl/" in name))
"""
UPDATE = """
    import torch
    from kbt_rl.inference.config import HeadConfig
    from kbt_rl.inference.head import BayesianHead
    head = BayesianHead(4, 1, HeadConfig(layers={layers}))
    row, label = torch.ones(1, 4), torch.ones(1, 1)
    head.update(row, label)
    sys.setprofile(note)
    head.update(row, label)
"""
# From the callback of one step to that of the next: the environment's own files are not the learner's.
LEARN = """
    import gymnasium as gym
    from stable_baselines3.common.callbacks import BaseCallback
    from kbt_rl import KBT, HeadConfig, KalmanAdapter
    class Step(BaseCallback):
        def _on_step(self):
            sys.setprofile(note if self.num_timesteps == 3 else None)
            return True
    model = KBT(env=gym.make("Pendulum-v1"), seed=0, policy_kwargs={"head": HeadConfig(layers=2)})
    model.learn(5, callback=[Step(), KalmanAdapter(lambda states: states[:, :1], "visited")])
"""


def entered_by(work: str) -> list[str]:
    """Files of the package that ``work`` enters while it is traced, in a process of its own without numba."""
    script = textwrap.dedent(TRACE).replace("{work}", textwrap.dedent(work).strip())
    command, environment = [sys.executable, "-c", script], {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.split()


@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, 2])
def test_one_update_passes_through_at_most_seven_files(layers: int) -> None:
    entered = entered_by(UPDATE.replace("{layers}", str(layers)))
    assert 3 <= len(entered) <= 7, entered


@pytest.mark.slow
def test_one_step_of_learn_with_an_adapter_passes_through_few_files() -> None:
    """From observation to action, and from label to posterior; four fewer where machine code learns the label."""
    entered = entered_by(LEARN)
    assert {"callbacks/adapters.py", "agents/bayesian.py", "inference/head.py"} <= set(entered)
    assert len(entered) <= 22, entered
