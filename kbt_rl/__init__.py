"""Closed-form online adaptation of trained policies, for Gymnasium and Stable-Baselines3.

Importing the package registers the environments ``kbt_rl/InvertedPendulum-v0`` and
``kbt_rl/ShiftedInvertedPendulum-v0`` with their discrete forms, ``kbt_rl/DiscreteInvertedPendulum-v0`` and
``kbt_rl/ShiftedDiscreteInvertedPendulum-v0``, and nothing else: the public names below are imported when they are
first used, so that a worker process that only steps environments loads neither torch nor matplotlib.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import gymnasium as gym

if TYPE_CHECKING:
    from kbt_rl.agents.adapt import adapt
    from kbt_rl.agents.adapted_policy import AdaptedPolicy
    from kbt_rl.agents.fallback import Fallback
    from kbt_rl.agents.identification import SelfTuningLQR
    from kbt_rl.agents.kbt import KBT
    from kbt_rl.agents.lqr import LQRExpert
    from kbt_rl.agents.policies import DecisionTransformerPolicy
    from kbt_rl.agents.prior_choice import choose_prior
    from kbt_rl.agents.sample import Sample
    from kbt_rl.agents.teachers import Teacher
    from kbt_rl.agents.warm_start import WarmStart
    from kbt_rl.callbacks import KalmanAdapter, OnlineAdapter
    from kbt_rl.envs import DynamicsShift, InvertedPendulumParams
    from kbt_rl.inference.batch import HeadBatch
    from kbt_rl.inference.config import HeadConfig
    from kbt_rl.inference.head import BayesianHead
    from kbt_rl.inference.linearised import LinearisedHead
    from kbt_rl.models.decision_transformer import DecisionTransformerConfig
    from kbt_rl.networks.hugging_face import HuggingFaceTransformer

__version__ = "0.2.0"

__all__ = [
    "KBT",
    "AdaptedPolicy",
    "BayesianHead",
    "DecisionTransformerConfig",
    "DecisionTransformerPolicy",
    "DynamicsShift",
    "Fallback",
    "HeadBatch",
    "HeadConfig",
    "HuggingFaceTransformer",
    "InvertedPendulumParams",
    "KalmanAdapter",
    "LQRExpert",
    "LinearisedHead",
    "OnlineAdapter",
    "Sample",
    "SelfTuningLQR",
    "Teacher",
    "WarmStart",
    "adapt",
    "choose_prior",
]

_MODULE_OF = {
    "KBT": "kbt_rl.agents.kbt",
    "AdaptedPolicy": "kbt_rl.agents.adapted_policy",
    "BayesianHead": "kbt_rl.inference.head",
    "DecisionTransformerConfig": "kbt_rl.models.decision_transformer",
    "DecisionTransformerPolicy": "kbt_rl.agents.policies",
    "DynamicsShift": "kbt_rl.envs",
    "Fallback": "kbt_rl.agents.fallback",
    "HeadBatch": "kbt_rl.inference.batch",
    "HeadConfig": "kbt_rl.inference.config",
    "HuggingFaceTransformer": "kbt_rl.networks.hugging_face",
    "InvertedPendulumParams": "kbt_rl.envs",
    "KalmanAdapter": "kbt_rl.callbacks",
    "LQRExpert": "kbt_rl.agents.lqr",
    "LinearisedHead": "kbt_rl.inference.linearised",
    "OnlineAdapter": "kbt_rl.callbacks",
    "Sample": "kbt_rl.agents.sample",
    "SelfTuningLQR": "kbt_rl.agents.identification",
    "Teacher": "kbt_rl.agents.teachers",
    "WarmStart": "kbt_rl.agents.warm_start",
    "adapt": "kbt_rl.agents.adapt",
    "choose_prior": "kbt_rl.agents.prior_choice",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register_environments() -> None:
    plants = {
        "InvertedPendulum": {"cart_mass": 1.0, "pole_mass": 0.1, "pole_half_length": 0.5},
        "ShiftedInvertedPendulum": {"cart_mass": 1.0, "pole_mass": 1.0, "pole_half_length": 5.0},
    }
    forms = {"": ("inverted_pendulum", "vector"), "Discrete": ("discrete", "discrete")}
    for plant, kwargs in plants.items():
        for form, (module, vector_module) in forms.items():
            env_id = f"kbt_rl/{plant.replace('Inverted', f'{form}Inverted')}-v0"
            if env_id not in gym.registry:  # a module reload must not warn
                gym.register(
                    env_id,
                    entry_point=f"kbt_rl.envs.{module}:{form}InvertedPendulumEnv",
                    vector_entry_point=f"kbt_rl.envs.{vector_module}:{form}InvertedPendulumVectorEnv",
                    max_episode_steps=500,
                    kwargs=kwargs,
                )


_register_environments()
