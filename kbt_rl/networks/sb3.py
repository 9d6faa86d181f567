"""Policies of Stable-Baselines3 and sb3-contrib, by the layers that their classes have in common."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.policies import BasePolicy
from torch import nn

from kbt_rl.networks.base import Array, Call, Network, State, linears
from kbt_rl.networks.links import link_for


class SB3Network(Network):
    """An SB3 policy, alone or in an algorithm.

    Of PPO, A2C, SAC, TD3, DDPG, DQN, TQC, TRPO, ARS, RecurrentPPO, MaskablePPO or QR-DQN.

    Args:
        policy: In evaluation mode from now on, as ``predict`` puts it.

    Raises:
        TypeError: Its class has none of the layers that are known.
    """

    def __init__(self, policy: BasePolicy) -> None:
        policy.set_training_mode(False)
        self.policy: Any = policy
        self.observation_space, self.action_space = policy.observation_space, policy.action_space
        trunk = self._trunk()
        last = list(getattr(getattr(policy, "actor", None), "mu", nn.Identity()).children())[-1:]
        limit = float(last[0].max_val) if last and isinstance(last[0], nn.Hardtanh) else None  # SAC and TQC with gSDE
        *self.before, self.layer = [layer for _, layer in trunk]
        self.link = link_for(self.action_space, bool(policy.squash_output), limit)
        self.recurrent = hasattr(policy, "lstm_actor")
        self.takes_masks = "action_masks" in inspect.signature(policy.predict).parameters

    def _trunk(self) -> list[tuple[str, nn.Linear]]:
        """The linear layers after the features extractor, of which the last one decides."""
        policy = self.policy
        if hasattr(policy, "actor"):  # SAC, TQC, TD3, DDPG
            self.module = policy.actor
            return [*linears(getattr(policy.actor, "latent_pi", nn.Sequential())), *linears(policy.actor.mu)]
        if hasattr(policy, "q_net"):  # DQN
            self.module = policy.q_net
            return linears(policy.q_net.q_net)
        if hasattr(policy, "quantile_net"):  # QR-DQN
            self.module, self.pooled = policy.quantile_net, policy.quantile_net.n_quantiles
            return linears(policy.quantile_net.quantile_net)
        if hasattr(policy, "action_net"):  # PPO, A2C, TRPO, ARS, RecurrentPPO, MaskablePPO
            self.module = policy
            hidden = getattr(getattr(policy, "mlp_extractor", None), "policy_net", nn.Sequential())
            return [*linears(hidden), *linears(policy.action_net)]
        raise TypeError(
            f"{type(policy).__name__} has none of the layers actor.mu, action_net, q_net, quantile_net; pass its "
            "network to adapt() as a module"
        )

    def copied(self, model: Any) -> tuple[Any, nn.Module]:
        """See ``Network``; optimisers are shared."""
        if not isinstance(model, BaseAlgorithm):
            policy = copy.deepcopy(self.policy)
            return policy, SB3Network(policy).module
        copied = copy.copy(model)
        copied.policy = copy.deepcopy(self.policy)
        if hasattr(copied, "_create_aliases"):  # model.actor, model.q_net, ...
            copied._create_aliases()
        return copied, SB3Network(copied.policy).module

    def run(self, call: Call) -> tuple[Array, State]:
        """See ``Network``."""
        if type(self.policy).predict is BasePolicy.predict and call.action_masks is None:
            return self._acted(call), call.state
        more: dict[str, Any] = {}
        if call.action_masks is not None:
            if not self.takes_masks:
                raise TypeError(f"{type(self.policy).__name__} takes no action_masks; MaskablePPO does")
            more["action_masks"] = call.action_masks
        actions, state = self.policy.predict(
            call.observation, call.state, call.episode_start, call.deterministic, **more
        )
        return np.asarray(actions), state

    def _acted(self, call: Call) -> Array:
        """``BasePolicy.predict`` of a policy that stays in evaluation mode.

        SB3 sets the mode of all modules anew for each action, which is a fifth of its time.
        """
        policy, space = self.policy, self.action_space
        if policy.training or self.module.training:  # as SB3's own training leaves it
            policy.set_training_mode(False)
        rows, several = policy.obs_to_tensor(call.observation)
        with torch.no_grad():
            found = policy._predict(rows, deterministic=call.deterministic)
        actions: Array = found.cpu().numpy().reshape(-1, *(space.shape or ()))
        if isinstance(space, spaces.Box):
            bounds = space.low, space.high
            actions = policy.unscale_action(actions) if policy.squash_output else np.clip(actions, *bounds)
        return actions if several else actions.squeeze(axis=0)


def policy_of(model: Any) -> BasePolicy | None:
    """The policy of an SB3 algorithm, or an SB3 policy itself; None for anything else."""
    if isinstance(model, BaseAlgorithm):
        return model.policy
    return model if isinstance(model, BasePolicy) else None
