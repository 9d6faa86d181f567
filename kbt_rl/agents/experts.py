"""Where labels come from: any SB3 policy or a plain function, called in one way and checked once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.vec_env import VecEnv

from kbt_rl.agents.actions import action_format
from kbt_rl.envs.plant import InvertedPendulumParams
from kbt_rl.inference.checks import as_array
from kbt_rl.networks.normaliser import Normaliser

# A bound that stands for none, as the largest float does.
_ENDLESS = 1e9
Array = npt.NDArray[Any]
Expert = BasePolicy | BaseAlgorithm | Callable[[Array], Array]


def as_labeller(
    expert: Expert, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]
) -> Callable[[Array], Array]:
    """A function from observations ``(n, o)`` to labels ``(n, a)``, float64, unclipped where the expert offers that.

    With discrete actions a label is a distribution over them; an expert may answer with actions ``(n,)`` instead.

    An expert with a method ``label`` (as ``LQRExpert``) is asked through it; other SB3 policies and algorithms through
    ``predict(deterministic=True)``; anything else is called.

    One that was trained in ``VecNormalize`` sees observations as there.

    Raises:
        TypeError: The expert is neither a policy nor callable, or it is recurrent.
        ValueError: The expert was made for other spaces.
    """
    check_spaces(expert, observation_space, action_space)
    label = getattr(expert, "label", None)
    if callable(label):
        ask: Callable[[Array], Any] = label
    elif isinstance(expert, (BasePolicy, BaseAlgorithm)):
        if is_recurrent(expert):
            raise TypeError(
                "a recurrent expert has to see every observation of an episode, not only those to be labelled; adapt() "
                "can be taught by one where it goes, or run it yourself and pass its actions to update()"
            )
        policy, normaliser = expert, normaliser_of(expert)

        def ask(observations: Array) -> Any:
            seen = observations if normaliser is None else normaliser(observations)
            return policy.predict(seen, deterministic=True)[0]

    else:
        check_kind(expert)
        ask = expert
    form = action_format(action_space)

    def labeller(observations: Array) -> Array:
        answer = as_array(ask(observations), "the expert's labels")
        if isinstance(action_space, spaces.Box) and answer.shape != (len(observations), form.size):
            raise ValueError(
                f"the expert answered {len(observations)} observations with shape {answer.shape}; expected "
                f"{(len(observations), form.size)}"
            )
        labels = form.targets(answer)
        if len(answer) != len(observations) or labels.shape != (len(observations), form.size):
            raise ValueError(
                f"the expert answered {len(observations)} observations with shape {answer.shape}; expected "
                f"{(len(observations), form.size)}"
            )
        return labels

    return labeller


def check_kind(expert: object) -> None:
    """Raise TypeError unless somebody can be asked for labels."""
    asked = callable(expert) or callable(getattr(expert, "label", None))
    if not (asked or isinstance(expert, (BasePolicy, BaseAlgorithm))):
        raise TypeError(f"an expert is an SB3 policy or a function of observations; got {type(expert).__name__}")


def check_spaces(expert: object, observation_space: spaces.Space[Any], action_space: spaces.Space[Any]) -> None:
    """Raise ValueError if an expert says that it was made for other spaces."""
    for name, space in (("observation_space", observation_space), ("action_space", action_space)):
        own = getattr(expert, name, None)
        if own is not None and own != space:
            raise ValueError(f"the expert's {name} is {own}, the model's is {space}; it is an expert of another env")


def is_recurrent(expert: object) -> bool:
    """Whether an expert is a policy with a state, which has to see every observation of an episode."""
    return hasattr(expert.policy if isinstance(expert, BaseAlgorithm) else expert, "lstm_actor")


def normaliser_of(expert: BasePolicy | BaseAlgorithm) -> Normaliser | None:
    """What an expert's observations go through, as far as its environment tells."""
    envs = expert.get_vec_normalize_env() if isinstance(expert, BaseAlgorithm) else None
    return None if envs is None else Normaliser.of(envs)


def env_attribute(env: VecEnv, name: str, default: Any) -> Any:
    """An attribute of the first sub-environment, through its wrappers; ``default`` where there is none."""
    return env.get_attr(name, 0)[0] if env.has_attr(name) else default  # asking in vain kills a SubprocVecEnv's worker


def plants(env: VecEnv) -> list[InvertedPendulumParams]:
    """The plant of each sub-environment of an inverted pendulum of this library; none for any other environment.

    Others have attributes of the same names, which mean something else there, or cannot even be sent by a worker.
    """
    if not (env.has_attr("is_inverted_pendulum") and env.has_attr("params")):
        return []
    found = env.get_attr("params")
    return found if all(isinstance(params, InvertedPendulumParams) for params in found) else []


def force_levels(env: VecEnv) -> list[float] | None:
    """Newtons that each discrete action of a pendulum stands for; None for any other environment."""
    if not isinstance(env.action_space, spaces.Discrete) or not plants(env):
        return None
    stated = env_attribute(env, "forces", None)
    return None if stated is None else [float(force) for force in stated]


def max_force(env: VecEnv) -> float:
    """Newtons that an action of 1 stands for in a pendulum; NaN for any other environment."""
    found = plants(env)
    return found[0].max_force if found else float("nan")


def label_space(env: VecEnv) -> spaces.Box | None:
    """The box that labels are asked in: the environment's ``label_space``, else a finite observation space.

    A ``label_space`` that is no finite box of observations is something else, and not taken.
    """
    space, observation_space = env_attribute(env, "label_space", None), env.observation_space
    if isinstance(space, spaces.Box) and space.shape == observation_space.shape and _is_finite(space):
        return space
    if isinstance(observation_space, spaces.Box) and _is_finite(observation_space):
        return observation_space
    return None


def _is_finite(box: spaces.Box) -> bool:
    return box.is_bounded("both") and max(float(np.abs(bound).max()) for bound in (box.low, box.high)) < _ENDLESS
