"""``kbt-rl``: the experiments and the everyday jobs from a terminal.

Each subcommand is a dataclass; its fields are the options and its docstring is the help.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from tyro.conf import subcommand

from kbt_rl.commands.change import Change
from kbt_rl.commands.discrete import Discrete
from kbt_rl.commands.no_oracle import NoOracle
from kbt_rl.commands.noise import Noise
from kbt_rl.commands.prior import Prior
from kbt_rl.commands.rescue import Rescue
from kbt_rl.commands.trust import Trust

if TYPE_CHECKING:
    from stable_baselines3.common.monitor import Monitor

    from kbt_rl.agents.kbt import KBT

Plant = Literal["nominal", "shifted"]
_IDS = {"nominal": "kbt_rl/InvertedPendulum-v0", "shifted": "kbt_rl/ShiftedInvertedPendulum-v0"}


@dataclass
class Reproduce:
    """Repeat the paper's experiment: pre-train, shift, adapt, compare, draw.

    Writes trials, tables (CSV, JSON), figures (PNG) and TensorBoard runs to --out. Interrupt it when you like: the same
    command continues where it stopped.
    """

    out: Path = Path("results")
    """Folder of the results."""
    quick: bool = False
    """A small version for a look, in under 90 s."""
    full: bool = False
    """30 streams times 3 pre-trained policies instead of 5 times 2; no time limit."""
    jobs: int = field(default_factory=lambda: os.cpu_count() or 1)
    """Processes; one thread each."""
    seed: int = 1000
    """First stream and pre-training seed. Seeds below 100 were used for tuning."""

    def run(self, console: Console) -> None:
        """See the class."""
        if self.quick and self.full:
            raise ValueError("--quick and --full exclude each other")
        from kbt_rl.experiments.config import reproduction_plan, timing_plan
        from kbt_rl.experiments.reproduce import draw
        from kbt_rl.experiments.runner import run_all

        plan = reproduction_plan(full=self.full, quick=self.quick, seed=self.seed)
        timing = timing_plan(plan, self.quick)
        run_all(plan, self.out, self.jobs, console, alone=timing)
        draw([*plan, *timing], self.out, console)


@dataclass
class Tune:
    """Find the baselines' learning rates and the printed method's epsilon on seeds 0 to 99.

    The result kept in the package (kbt_rl/experiments/tuned.json) came from this command.
    """

    out: Path = Path("results/tune")
    """Folder of the trials."""
    target: Path = Path("results/tuned.json")
    """File of the best settings and all scores."""
    streams: int = 2
    """Streams for each policy."""
    policies: int = 2
    """Pre-trained policies."""
    jobs: int = field(default_factory=lambda: os.cpu_count() or 1)
    """Processes; one thread each."""
    seed: int = 0
    """First seed."""

    def run(self, console: Console) -> None:
        """See the class."""
        from kbt_rl.experiments.tune import tune, tuning_plan

        best = tune(tuning_plan(self.streams, self.policies, self.seed), self.out, self.jobs, console, self.target)
        console.print({name: best[name] for name in ("learning_rate", "epsilon")})
        console.print(f"written to {self.target}")


@dataclass
class Pretrain:
    """Clone the nominal plant's LQR expert into a decision transformer and save the model."""

    model: Path = Path("pretrained.zip")
    """File to write."""
    seed: int = 1000
    """Seed of the initial weights and the data."""
    steps: int | None = None
    """Gradient steps; the package's default if left out."""

    def run(self, console: Console) -> None:
        """See the class."""
        import gymnasium as gym

        from kbt_rl import KBT, LQRExpert
        from kbt_rl.agents.behaviour_cloning import PretrainConfig

        env = gym.make(_IDS["nominal"])
        model = KBT(env=env, seed=self.seed)
        config = PretrainConfig() if self.steps is None else PretrainConfig(steps=self.steps)
        info = model.pretrain(LQRExpert.for_env(env), config, progress_bar=True)
        model.save(self.model)
        console.print(
            f"held-out error {info.validation_rmse_newton:.3f} N (rms of the labels "
            f"{info.label_rms * model.max_force:.1f} N), saved to {self.model}"
        )


@dataclass
class Adapt:
    """Adapt a pre-trained model to the shifted plant while it runs, with TensorBoard logs."""

    model: Path = Path("pretrained.zip")
    """Model to start from (see `kbt-rl pretrain`)."""
    out: Path = Path("adapted.zip")
    """File to write."""
    labels: int = 100
    """Labels to learn from, one per environment step."""
    stream: Literal["iid", "visited"] = "iid"
    """Where labels are asked: i.i.d. in the label box, or at the states the policy visits."""
    tensorboard: Path = Path("runs")
    """Folder of the TensorBoard logs; look at them with `tensorboard --logdir runs`."""
    eval_every: int = 25
    """Steps between two evaluations of 20 episodes."""
    seed: int = 0
    """Seed of the label stream and the environment."""

    def run(self, console: Console) -> None:
        """See the class."""
        import gymnasium as gym
        import numpy as np
        from stable_baselines3.common.callbacks import EvalCallback

        from kbt_rl import KalmanAdapter, LQRExpert

        env, evaluation = gym.make(_IDS["shifted"]), _evaluation_env()
        model = _load_kbt(self.model)
        model.set_env(env)
        model.set_random_seed(self.seed)
        model.stream_rng = np.random.default_rng([self.seed, 1])
        model.tensorboard_log = str(self.tensorboard)
        adapter = KalmanAdapter(LQRExpert.for_env(env), self.stream)
        watch = EvalCallback(evaluation, eval_freq=self.eval_every, n_eval_episodes=20, verbose=0)
        model.learn(self.labels, callback=[adapter, watch], progress_bar=True)
        model.save(self.out)
        console.print(f"{model.labels_used} labels used, saved to {self.out}; `kbt-rl evaluate --model {self.out}`")


@dataclass
class Evaluate:
    """Success rate and mean reward of a saved model, or of the expert, on a plant."""

    model: Path | None = None
    """Model to load; the plant's own LQR expert if left out."""
    plant: Plant = "shifted"
    """Which plant."""
    episodes: int = 100
    """Episodes of 10 s."""
    seed: int = 1000
    """Seed of the starts."""

    def run(self, console: Console) -> None:
        """See the class."""
        import numpy as np

        from kbt_rl.envs.plant import NOMINAL, SHIFTED
        from kbt_rl.experiments.learners import batch_force, snapshot
        from kbt_rl.experiments.simulation import expert_force, regret, simulate, starts

        params = NOMINAL if self.plant == "nominal" else SHIFTED
        initial = starts(self.seed, self.episodes)
        expert = simulate(expert_force(params), initial, params)
        if self.model is None:
            outcome, name = expert, "expert"
        else:
            model = _load_kbt(self.model)
            force = batch_force(model, [snapshot(model)])
            outcome, name = simulate(force, initial[None], params), str(self.model)
        success, falls = float(outcome.success.mean()), int(np.isinf(outcome.cost).sum())
        lost = float(np.ravel(regret(outcome.cost, expert.cost))[0])
        console.print(
            f"{name} on the {self.plant} plant, {self.episodes} episodes: success {success:.2f}, {falls} falls, "
            f"regret {lost:.3f}"
        )


@dataclass
class Render:
    """A gif or mp4 of a saved model, or of the expert, on a plant."""

    out: Path = Path("pendulum.gif")
    """File to write; the ending chooses gif or mp4."""
    model: Path | None = None
    """Model to load; the plant's own LQR expert if left out."""
    plant: Plant = "shifted"
    """Which plant."""
    seconds: float = 10.0
    """Length."""
    seed: int = 0
    """Seed of the start."""

    def run(self, console: Console) -> None:
        """See the class."""
        from kbt_rl.envs.plant import NOMINAL, SHIFTED
        from kbt_rl.experiments.learners import batch_force, snapshot
        from kbt_rl.experiments.simulation import expert_force, starts
        from kbt_rl.experiments.video import render_policies

        params = NOMINAL if self.plant == "nominal" else SHIFTED
        if self.model is None:
            policies = {"expert": expert_force(params)}
        else:
            model = _load_kbt(self.model)
            force = batch_force(model, [snapshot(model)])
            policies = {self.model.stem: lambda state: force(state.reshape(1, 1, 4))[0, 0]}
        render_policies(policies, params, starts(self.seed, 1)[0], self.out, seconds=self.seconds)
        console.print(f"written to {self.out}")


def _load_kbt(path: Path) -> KBT:
    """A saved KBT model, or an error that says what to do."""
    from kbt_rl import KBT

    if not path.exists() and not path.with_suffix(".zip").exists():
        raise FileNotFoundError(f"there is no model at {path}; `kbt-rl pretrain --model {path}` makes one")
    return KBT.load(path)


def _evaluation_env() -> Monitor:
    """A monitored copy of the shifted plant."""
    import gymnasium as gym
    from stable_baselines3.common.monitor import Monitor

    return Monitor(gym.make(_IDS["shifted"]))


Command = (
    Annotated[Reproduce, subcommand("reproduce")]
    | Annotated[Tune, subcommand("tune")]
    | Annotated[Pretrain, subcommand("pretrain")]
    | Annotated[Adapt, subcommand("adapt")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[Render, subcommand("render")]
    | Annotated[Rescue, subcommand("rescue")]
    | Annotated[Change, subcommand("change")]
    | Annotated[Noise, subcommand("noise")]
    | Annotated[NoOracle, subcommand("no-oracle")]
    | Annotated[Discrete, subcommand("discrete")]
    | Annotated[Trust, subcommand("trust")]
    | Annotated[Prior, subcommand("prior")]
)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    console = Console(soft_wrap=True)
    command = tyro.cli(Command, args=arguments, prog="kbt-rl", description=__doc__)
    # A fresh torch takes all cores for networks that are too small for two.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    import kbt_rl  # noqa: F401  registers the environments

    torch.set_num_threads(1)
    try:
        command.run(console)
    except KeyboardInterrupt:
        console.print("interrupted; the same command continues where this one stopped")
        return 130
    except (ValueError, OSError, ImportError) as error:
        console.print(f"[red]error:[/red] {error}", highlight=False)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
