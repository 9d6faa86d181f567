"""``kbt-rl``: pre-train a policy, adapt it while it runs, evaluate it, film it.

The studies behind the figures are not part of the package; they run from a clone by ``python -m studies``.
``kbt-rl --version`` tells the version.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro
from rich.console import Console
from rich.text import Text
from tyro.conf import subcommand

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from stable_baselines3.common.policies import BasePolicy

    from kbt_rl.agents.kbt import KBT
    from kbt_rl.envs.sb3_vec_env import InvertedPendulumSB3VecEnv

_IDS = {"nominal": "InvertedPendulum-v0", "shifted": "ShiftedInvertedPendulum-v0"}
_COST_CAP = 100.0  # times the expert's cost of the same episode, which a fall always reaches
_STEPS_PER_FRAME = 2  # 25 pictures a second look smooth, and many viewers show no gif faster


@dataclass
class Pretrain:
    """Clone the nominal plant's LQR expert into a decision transformer and save the model."""

    model: Path = Path("pretrained.zip")
    """File to write: a zip, or with the ending .safetensors the policy alone, in a format that holds no code."""
    seed: int = 1000
    """Seed of the initial weights and the data."""
    steps: int | None = None
    """Gradient steps; the package's default if left out."""
    layers: int | None = None
    """Layers of the Bayesian head; the package's default if left out."""
    structure: Literal["auto", "joint", "layer", "neuron", "diagonal", "shared"] = "auto"
    """How the head's covariance is stored; see HeadConfig."""

    def run(self, console: Console) -> None:
        """See the class."""
        _check_at_least(1, steps=self.steps, layers=self.layers)
        import gymnasium as gym

        from kbt_rl import KBT, LQRExpert
        from kbt_rl.agents.behaviour_cloning import PretrainConfig
        from kbt_rl.saved import check_output, save_model

        check_output(self.model)
        env = gym.make(f"kbt_rl/{_IDS['nominal']}")
        head = KBT(env=env).policy.head_config
        head = replace(head, structure=self.structure, layers=head.layers if self.layers is None else self.layers)
        model = KBT(env=env, seed=self.seed, policy_kwargs={"head": head})
        config = PretrainConfig() if self.steps is None else PretrainConfig(steps=self.steps)
        info = model.pretrain(LQRExpert.for_env(env), config, progress_bar=True)
        save_model(model, self.model)
        console.print(
            f"held-out error {info.validation_rmse_newton:.3f} N (rms of the labels "
            f"{info.label_rms * model.max_force:.1f} N), saved to {self.model}"
        )


@dataclass
class OnPlant:
    """The plant of an environment."""

    plant: Literal["nominal", "shifted"] = "shifted"
    """Which plant."""
    cart_mass: float | None = None
    """kg, if it is not that of the plant."""
    pole_mass: float | None = None
    """kg, if it is not that of the plant."""
    pole_half_length: float | None = None
    """m, if it is not that of the plant."""

    def env_arguments(self) -> dict[str, Any]:
        """What ``gymnasium.make`` takes."""
        names = ("cart_mass", "pole_mass", "pole_half_length")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def envs(self, count: int, like: BasePolicy | None = None, forces: Any = None) -> InvertedPendulumSB3VecEnv:
        """Environments of the plant for a policy, with force levels if its actions are discrete."""
        from kbt_rl.envs.sb3_vec_env import InvertedPendulumSB3VecEnv

        env_id, options = self.env_id(like, forces)
        return InvertedPendulumSB3VecEnv(env_id, count, **options)

    def env_id(self, like: BasePolicy | None, forces: Any) -> tuple[str, dict[str, Any]]:
        """Id and arguments of an environment for a policy."""
        from gymnasium import spaces

        from kbt_rl.envs import FIVE_FORCES, TWO_FORCES

        options = self.env_arguments()
        if like is None or not isinstance(like.action_space, spaces.Discrete):
            return f"kbt_rl/{_IDS[self.plant]}", options
        known = {len(levels): levels for levels in (TWO_FORCES, FIVE_FORCES)}
        options["forces"] = forces or known.get(int(like.action_space.n), FIVE_FORCES)
        return f"kbt_rl/{_IDS[self.plant].replace('Inverted', 'DiscreteInverted')}", options


@dataclass
class Adapt(OnPlant):
    """Adapt a pre-trained model to another plant while it runs, with TensorBoard logs."""

    model: Path = Path("pretrained.zip")
    """Model to start from (see `kbt-rl pretrain`): a zip, which is to be trusted since it holds pickles, or a
    safetensors file."""
    out: Path = Path("adapted.zip")
    """File to write: a zip, or with the ending .safetensors the policy alone, in a format that holds no code."""
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
        _check_at_least(1, labels=self.labels, eval_every=self.eval_every)
        _check_at_least(0, seed=self.seed)
        import numpy as np
        from stable_baselines3.common.callbacks import EvalCallback

        from kbt_rl import KalmanAdapter, LQRExpert
        from kbt_rl.saved import check_output, save_model

        check_output(self.out)
        check_output(self.tensorboard / "events")
        model = _load_kbt(self.model, console)
        env = self.envs(1, model.policy, model.forces)
        model.set_env(env)
        model.set_random_seed(self.seed)
        model.stream_rng = np.random.default_rng([self.seed, 1])
        model.tensorboard_log = str(self.tensorboard)
        before = evaluate(model.policy, self.envs(20, model.policy, model.forces), self.seed)
        adapter = KalmanAdapter(LQRExpert.for_env(env), self.stream)
        watched = self.envs(20, model.policy, model.forces)
        watch = EvalCallback(watched, eval_freq=self.eval_every, n_eval_episodes=20, verbose=0)
        model.learn(self.labels, callback=[adapter, watch], progress_bar=True)
        after = evaluate(model.policy, self.envs(20, model.policy, model.forces), self.seed)
        replaced = " (in place of an older file)" if self.out.exists() else ""
        save_model(model, self.out)
        console.print(
            f"{model.labels_used} labels used; success of 20 episodes {before.success:.2f} before and "
            f"{after.success:.2f} after; saved to {self.out}{replaced}"
        )


@dataclass
class Evaluate(OnPlant):
    """Success, falls, regret and mean reward of a saved policy, or of the expert, on a plant.

    The policy acts by `predict` with the context of its own episodes, whatever it is: of KBT, WarmStart or another SB3
    algorithm with the pendulum's spaces. Regret is the summed cost over the expert's from the same starts, minus 1.
    """

    model: Path | None = None
    """Model to load, a zip (which is to be trusted since it holds pickles) or a safetensors file; the plant's own LQR
    expert if left out."""
    episodes: int = 100
    """Episodes of 10 s."""
    seed: int = 1000
    """Seed of the starts."""

    def run(self, console: Console) -> None:
        """See the class."""
        _check_at_least(1, episodes=self.episodes)
        _check_at_least(0, seed=self.seed)
        import numpy as np

        from kbt_rl import LQRExpert

        policy, forces = (None, None) if self.model is None else _load_policy(self.model, console)
        expert = LQRExpert.for_env(self.envs(1, policy, forces))
        best = evaluate(expert, self.envs(self.episodes, policy, forces), self.seed)
        found = best if policy is None else evaluate(policy, self.envs(self.episodes, policy, forces), self.seed)
        regret = np.minimum(found.cost, _COST_CAP * best.cost).sum() / best.cost.sum() - 1.0
        console.print(
            f"{'expert' if self.model is None else self.model} on the {self.plant} plant, {self.episodes} episodes: "
            f"success {found.success:.2f}, {found.falls} falls, regret {regret:.3f}, mean reward {found.reward:.1f}"
        )


@dataclass
class Render(OnPlant):
    """A gif or mp4 of a saved policy, or of the expert, on a plant. Needs the extra `render`."""

    out: Path = Path("pendulum.gif")
    """File to write; the ending chooses gif or mp4."""
    model: Path | None = None
    """Model to load, a zip (which is to be trusted since it holds pickles) or a safetensors file; the plant's own LQR
    expert if left out."""
    seconds: float = 10.0
    """Length."""
    seed: int = 0
    """Seed of the start."""

    def run(self, console: Console) -> None:
        """See the class."""
        if not 0.04 <= self.seconds < float("inf"):
            raise ValueError(f"--seconds is {self.seconds}; a film takes at least 0.04 s, and an end")
        _check_at_least(0, seed=self.seed)
        from kbt_rl import LQRExpert
        from kbt_rl.envs import DT
        from kbt_rl.envs.video import check_video, write_video
        from kbt_rl.saved import check_output

        check_video(self.out)
        check_output(self.out)
        policy, forces = (None, None) if self.model is None else _load_policy(self.model, console)
        name = "expert" if self.model is None else self.model.stem
        acting = LQRExpert.for_env(self.envs(1)) if policy is None else policy
        frames = self._frames(acting, forces, name, round(self.seconds / DT))
        write_video(frames, self.out, DT * _STEPS_PER_FRAME)
        console.print(f"written to {self.out}")

    def _frames(self, policy: BasePolicy, forces: Any, name: str, steps: int) -> Iterator[npt.NDArray[np.uint8]]:
        """Pictures of one episode; after its end the last one stays."""
        import gymnasium as gym
        import numpy as np
        from rich.progress import Progress

        from kbt_rl.envs.video import caption

        env_id, options = self.env_id(policy, forces)
        env = gym.make(env_id, render_mode="rgb_array", max_episode_steps=steps + 1, **options)
        _check_spaces(policy, env.observation_space, env.action_space)
        observation, _ = env.reset(seed=self.seed)
        state, begins, ended = None, np.ones(1, dtype=bool), False
        picture: Any = env.render()
        with Progress(transient=True) as bar:
            for step in bar.track(range(steps), description="rendering"):
                if step % _STEPS_PER_FRAME == 0:
                    picture = picture if ended else env.render()
                    yield np.concatenate([caption(name, picture.shape[1]), picture])
                if not ended:
                    actions, state = policy.predict(observation[np.newaxis], state, begins, deterministic=True)
                    observation, _, ended, _, _ = env.step(actions[0])
                    begins = np.zeros(1, dtype=bool)
                    picture = env.render() if ended else picture


class Evaluation(NamedTuple):
    """Of one episode from each start: share that succeeds, falls, mean reward, and costs, infinite after a fall."""

    success: float
    falls: int
    reward: float
    cost: npt.NDArray[np.float64]


def evaluate(policy: BasePolicy, envs: InvertedPendulumSB3VecEnv, seed: int) -> Evaluation:
    """Run one episode in each environment, in which the policy acts by ``predict``."""
    import numpy as np
    from stable_baselines3.common.evaluation import evaluate_policy

    _check_spaces(policy, envs.observation_space, envs.action_space)
    envs.seed(seed)
    success, cost = np.zeros(envs.num_envs, dtype=bool), np.zeros(envs.num_envs)

    def watch(step: dict[str, Any], _: dict[str, Any]) -> None:
        row, info = step["i"], step["info"]
        cost[row] += info["cost"]
        if step["done"]:
            success[row] = info["is_success"]
            if not info["TimeLimit.truncated"]:
                cost[row] = np.inf

    reward, _ = evaluate_policy(policy, envs, envs.num_envs, callback=watch)
    assert isinstance(reward, float)
    return Evaluation(float(success.mean()), int(np.isinf(cost).sum()), reward, cost)


def _check_spaces(policy: BasePolicy, observations: Any, actions: Any) -> None:
    for name, own, space in (
        ("observations", policy.observation_space, observations),
        ("actions", policy.action_space, actions),
    ):
        if own != space:
            raise ValueError(f"the policy is for other {name}: {own}; the pendulum's are {space}")


def _check_at_least(least: int, **options: int | None) -> None:
    for name, value in options.items():
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")


def _warn_of_pickles(path: Path, console: Console) -> Path:
    from kbt_rl.saved import existing, is_safetensors

    found = existing(path)
    if not is_safetensors(found):
        console.print(Text(f"{found} may hold pickles, which can run code: load only files that you trust", "dim"))
    return found


def _load_policy(path: Path, console: Console) -> tuple[BasePolicy, tuple[float, ...] | None]:
    from kbt_rl.saved import load_policy

    found = load_policy(_warn_of_pickles(path, console))
    return found.policy, found.forces


def _load_kbt(path: Path, console: Console) -> KBT:
    """A saved KBT model, or the learner of a policy from a safetensors file."""
    from kbt_rl import KBT
    from kbt_rl.saved import is_safetensors, understood

    found = _warn_of_pickles(path, console)
    if not is_safetensors(found):
        return understood(found, KBT.load)
    from kbt_rl.agents.export import load_safetensors
    from kbt_rl.agents.policies import DecisionTransformerPolicy

    policy = load_safetensors(found)
    if not isinstance(policy, DecisionTransformerPolicy):
        raise ValueError(f"{found} holds a {type(policy).__name__}, which has no posterior to adapt")
    kwargs = {"transformer": policy.transformer_config, "head": policy.head_config, "sampling": policy.sampling}
    learner = KBT(env=OnPlant("nominal").envs(1, policy), policy_kwargs=kwargs)
    load_safetensors(found, into=learner)
    return learner


Command = (
    Annotated[Pretrain, subcommand("pretrain")]
    | Annotated[Adapt, subcommand("adapt")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[Render, subcommand("render")]
)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    console = Console(soft_wrap=True, highlight=False)
    given = sys.argv[1:] if arguments is None else arguments
    if given == ["--version"]:
        from kbt_rl import __version__

        console.print(f"kbt_rl {__version__}")
        return 0
    command = tyro.cli(Command, args=given, prog="kbt-rl", description=__doc__)
    # A fresh torch takes all cores for networks that are too small for two.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    import kbt_rl  # noqa: F401  registers the environments

    torch.set_num_threads(1)
    try:
        command.run(console)
    except KeyboardInterrupt:
        console.print("interrupted; nothing was saved")
        return 130
    except (ValueError, OSError, ImportError) as error:
        console.print(Text.assemble(("error: ", "red"), str(error)))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
