"""Learners on this library's own transformer: they pre-train, learn from labels, and move between environments.

A subclass adds one method, ``_update``, which learns from labelled rows. What an action means in newtons, where an
environment states it, is known here and nowhere more general.
"""

from __future__ import annotations

import copy
import sys
from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.utils import check_for_correct_spaces
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize
from torch import Tensor

from kbt_rl.agents import behaviour_cloning as cloning
from kbt_rl.agents.behaviour_cloning import PretrainConfig, PretrainInfo
from kbt_rl.agents.experts import Expert, as_labeller, force_levels, label_space, max_force, plants
from kbt_rl.agents.learner_arguments import check_env
from kbt_rl.agents.online import OnlineAlgorithm
from kbt_rl.agents.online_policy import Labeller
from kbt_rl.agents.policies import DecisionTransformerPolicy
from kbt_rl.agents.sample import LearnerInfo, Sample, labelled
from kbt_rl.agents.transformer_policy import TransformerPolicy
from kbt_rl.arguments import flag, instance, shown
from kbt_rl.envs.plant import InvertedPendulumParams
from kbt_rl.inference.transactions import signals_deferred
from kbt_rl.models.context import ContextWindow
from kbt_rl.models.decision_transformer import DecisionTransformer


class TransformerLearner(OnlineAlgorithm):
    """Base of the learners that adapt a pre-trained transformer policy while it runs.

    Args:
        policy: Policy class or its name.
        env: Environment to learn in; a Gymnasium env, a ``VecEnv`` or an id.
        n_steps: Environment steps between two writes of the log.
        policy_kwargs: Passed to the policy, for example ``dict(transformer=DecisionTransformerConfig(...))``.
        stats_window_size: Episodes that rollout statistics average over.
        tensorboard_log: Folder of the TensorBoard logs; None for none.
        verbose: 0 silent, 1 training output.
        seed: Seed of the initial weights, the label stream and the environment.
        device: The CPU by default: one update is bound by latency.
    """

    policy: TransformerPolicy
    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "DecisionTransformerPolicy": DecisionTransformerPolicy,
        "TransformerPolicy": TransformerPolicy,
    }

    def __init__(
        self,
        policy: str | type[BasePolicy],
        env: GymEnv | str | None,
        n_steps: int = 10,
        policy_kwargs: dict[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: str = "cpu",
        _init_setup_model: bool = True,
    ) -> None:
        self._check_policy(policy)
        super().__init__(
            policy,
            env,
            n_steps,
            seed,
            policy_kwargs=policy_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            device=device,
            supported_action_spaces=(spaces.Box, spaces.Discrete),
        )
        self.max_force = float("nan")
        self.forces: list[float] | None = None  # a list, as it comes back from a file
        self.pretrain_info: PretrainInfo | None = None
        if self.env is not None:
            self.max_force, self.forces = max_force(self.env), force_levels(self.env)
        if _init_setup_model:
            self._setup_model()

    @classmethod
    def _check_policy(cls, policy: str | type[BasePolicy]) -> None:
        if not isinstance(policy, (str, type)):
            raise TypeError(f"policy is {shown(policy)}; expected the name of a policy or its class")
        if isinstance(policy, str) and policy not in cls.policy_aliases:
            raise ValueError(f"{cls.__name__} has no policy {policy!r}; choose one of {', '.join(cls.policy_aliases)}")
        if isinstance(policy, type) and not issubclass(policy, TransformerPolicy):
            raise TypeError(f"{cls.__name__} needs a TransformerPolicy; {policy.__name__} is not one")

    def _setup_model(self) -> None:
        if not hasattr(self, "observation_space"):
            raise ValueError(f"{type(self).__name__} takes its spaces from an environment; pass env")
        if self.env is not None:  # a loaded model may come with another one
            self._check_env(self.env)
        self._setup_lr_schedule()
        self.set_random_seed(self.seed)
        arguments = self._policy_arguments()
        if "observation_scale" not in arguments and self.label_space is not None:
            largest = np.maximum(np.abs(self.label_space.low), np.abs(self.label_space.high))
            arguments["observation_scale"] = np.where(largest > 0.0, largest, 1.0)  # an entry may always be 0
        policy = self.policy_class(self.observation_space, self.action_space, self.lr_schedule, **arguments)
        assert isinstance(policy, TransformerPolicy)
        self.policy = policy.to(self.device)

    def _policy_arguments(self) -> dict[str, Any]:
        """Keyword arguments of the policy."""
        return dict(self.policy_kwargs)

    # ------------------------------------------------------------------ learning

    def update(self, sample: Sample) -> LearnerInfo:
        """See ``OnlineAlgorithm``."""
        self.taught = True
        given = labelled(self.policy, sample)
        self._check_rows(given.of)
        if len(given.rows) == 0:
            return self.info_type(labels=0, innovation=float("nan"))
        return self._update(given.context, given.target, given.features, given.rows)

    @property
    def lesson(self) -> object:
        """See ``OnlineAlgorithm``; the pre-training."""
        return self.pretrain_info

    def labeller(self, expert: Expert) -> Labeller:
        """See ``OnlineAlgorithm``."""
        return Labeller(as_labeller(expert, self.observation_space, self.action_space))

    def check_expert(self, expert: Expert) -> None:
        """See ``OnlineAlgorithm``; of another plant, or of another force limit, is almost always a mistake."""
        assert self.env is not None
        here = plants(self.env)
        limit = getattr(expert, "max_force", None)
        params = None if getattr(expert, "tracking", False) is True else getattr(expert, "params", None)
        found: list[tuple[str, Any, Any]] = []
        if isinstance(limit, float):
            found += [("max_force", limit, plant.max_force) for plant in here[:1]]
        if isinstance(params, InvertedPendulumParams):
            found += [("params", params, plant) for plant in here]
        for name, own, plant in found:
            if own != plant:
                raise ValueError(
                    f"the expert was made for {name}={own} and the training environment has {plant}; use "
                    "for_env(env) of this environment, or pass check_expert=False if you mean it"
                )

    def _check_rows(self, rows: int) -> None:
        """Hook: raise ValueError if this learner cannot learn from a sample of so many rows, labelled or not."""

    @abstractmethod
    def _update(
        self, context: ContextWindow, target: cloning.Array, features: Tensor | None, rows: cloning.Array
    ) -> LearnerInfo:
        """Learn from rows that all have a label: all of an update or, with an error or an interrupt, nothing.

        Args:
            context: Of these rows.
            target: ``(n, action size)``.
            features: ``(n, width)`` where the caller has encoded the context already.
            rows: Which rows of the sample they are, ``(n,)``, ascending.
        """

    def pretrain(
        self, expert: Expert, config: PretrainConfig | None = None, progress_bar: bool | None = None
    ) -> PretrainInfo:
        """Clone an expert: on i.i.d. states of the label box, or on its episodes if the context is longer than one.

        Args:
            expert: An SB3 policy or algorithm, or a callable from observations ``(n, o)`` to actions ``(n, a)``; with
                discrete actions to actions ``(n,)`` or to distributions over them.
            config: Sizes and learning rate. Episodes that do not end cost at most ten times its samples in steps (or
                10,000 in each environment), and a warning.
            progress_bar: Draw a progress bar; None if the terminal can.

        Returns:
            Error on held-out contexts, in action units and in newtons.
        """
        if config is not None:
            instance("config", config, PretrainConfig)
        config = PretrainConfig() if config is None else config
        progress_bar = None if progress_bar is None else flag("progress_bar", progress_bar)
        labeller = as_labeller(expert, self.observation_space, self.action_space)
        rng = np.random.default_rng(self.seed)
        length, form = self.policy.transformer_config.context_length, self.policy.actions
        shown = sys.stdout.isatty() if progress_bar is None else progress_bar
        with cloning.progress_bar(shown) as bar:
            if length == 1 and self.policy.transformer_config.target_return is None:
                box = self._require_label_space()
                data = cloning.box_demonstrations(labeller, box, config.samples, rng, length, form.size)
            else:
                if self.env is None:
                    raise ValueError("pre-training with a longer context drives episodes; pass an env or call set_env")
                task = bar.add_task("expert episodes", total=config.samples)
                self._last_obs = self._context = None  # the expert moves the environment on
                data = cloning.rollout_demonstrations(
                    labeller, self.env, config.samples, length, lambda n: bar.advance(task, n),
                    self.policy.transformer_config.target_return is not None,
                )  # fmt: skip
            steps = bar.add_task("behaviour cloning", total=config.steps)
            trained = copy.deepcopy(
                self.policy.transformer
            )  # an interrupt leaves the features that the posterior knows
            info = cloning.clone_behaviour(
                trained, data, form, config, rng, self.max_force, lambda n: bar.advance(steps, n)
            )
        self._start_anew(trained, info)
        return info

    def start_from(self, other: TransformerLearner) -> None:
        """Take over the pre-trained transformer of another learner; what this one had learned is forgotten.

        Raises:
            ValueError: The transformers differ in size or context, or the learners in spaces or action scale.
        """
        instance("other", other, TransformerLearner)
        mine, theirs = self.policy.transformer_config, other.policy.transformer_config
        if mine != theirs:
            raise ValueError(f"the transformers differ: this learner has {mine}, the other {theirs}")
        for name in ("observation_space", "action_space"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(f"this learner's {name} is {getattr(self, name)}, the other's {getattr(other, name)}")
        if self.env is not None:
            other._check_action_scale(self.env)
        with signals_deferred():
            self._start_anew(other.policy.transformer, other.pretrain_info)
            self.label_space, self.max_force, self.forces = other.label_space, other.max_force, other.forces

    def _start_anew(self, transformer: DecisionTransformer, info: PretrainInfo | None) -> None:
        """Take over pre-trained weights; what was learned is forgotten. All or nothing."""
        state = self.policy.start_state(transformer)
        with signals_deferred():
            self.policy.load_state_dict(state)
            self.policy.set_training_mode(False)
            self.pretrain_info = info
            self.strategy_state.clear()
            self.adapter_state.clear()
            self._forget_samples()

    def _forget_samples(self) -> None:
        """Hook for what a subclass remembers of samples besides the policy; cannot fail."""

    def _require_label_space(self) -> spaces.Box:
        if self.label_space is None:
            raise ValueError("the model knows no label space: construct it with an env, or set model.label_space")
        return self.label_space

    # ------------------------------------------------------------------ plumbing

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """Move to another environment with the same spaces; the number of sub-environments may differ.

        The context of the running episodes is dropped.

        Raises:
            ValueError: Other spaces, or an action stands for another force than the policy was trained with.
        """
        check_env(env)
        wrapped = self._wrap_env(env, self.verbose)
        check_for_correct_spaces(wrapped, self.observation_space, self.action_space)
        self._check_env(wrapped)
        self.n_envs = wrapped.num_envs
        super().set_env(wrapped, force_reset)
        if force_reset and self.seed is not None:
            wrapped.seed(self.seed)
        self._last_obs = None if force_reset else self._last_obs
        self._context = self._features = None
        if self.label_space is None:
            self.label_space = label_space(wrapped)
        if not np.isfinite(self.max_force):
            self.max_force = max_force(wrapped)
        self.forces = force_levels(wrapped) if self.forces is None else self.forces

    def _check_env(self, env: VecEnv) -> None:
        """Raise ValueError if this model cannot act in ``env``, whose spaces fit."""
        normalised = unwrap_vec_normalize(env)
        if normalised is not None and normalised.norm_obs:
            raise ValueError(
                "the environment normalises its observations (VecNormalize), and experts know states in their own "
                "units; the policy scales observations itself (observation_scale), so pass VecNormalize(..., "
                "norm_obs=False) or no VecNormalize"
            )
        self._check_action_scale(env)

    def _check_action_scale(self, env: VecEnv) -> None:
        """Raise ValueError if an action stands for another force in ``env`` than the policy was trained with."""
        levels = force_levels(env)
        if self.forces is not None and levels is not None and levels != self.forces:
            raise ValueError(
                f"the actions are the forces {levels} N in the new environment and {self.forces} N in the one the "
                f"policy was trained in; make the environment with forces={self.forces}"
            )
        found = max_force(env)
        if np.isfinite(self.max_force) and np.isfinite(found) and found != self.max_force:
            raise ValueError(
                f"an action of 1 is {found} N in the new environment and {self.max_force} N in the one the policy "
                f"was trained in; make the environment with max_force={self.max_force}"
            )

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy"], []
