"""Checks of what the learners' constructors and ``learn`` are given, before SB3 sees it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv

from kbt_rl.arguments import shown, whole


def check_env(env: Any) -> None:
    """Raise TypeError or ValueError unless this is an environment for SB3, or the id of one."""
    if isinstance(env, str):
        try:
            gym.spec(env)
        except (gym.error.Error, ImportError) as error:
            raise ValueError(f"env is {env!r}, which is no id of an environment: {error}") from error
    elif not isinstance(env, (gym.Env, VecEnv)):
        raise TypeError(
            f"env is {shown(env)}; expected a gymnasium.Env, a VecEnv of Stable-Baselines3 or the id of an environment"
        )


def checked_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of SB3's ``BaseAlgorithm`` as it takes them.

    Raises:
        TypeError: One is of another kind.
        ValueError: One is out of range.
    """
    found = dict(settings)
    for name, least in (("stats_window_size", 1), ("verbose", 0)):
        if name in found:
            found[name] = whole(name, found[name], least)
    log, arguments = found.get("tensorboard_log"), found.get("policy_kwargs")
    if log is not None and not isinstance(log, (str, Path)):
        raise TypeError(f"tensorboard_log is {shown(log)}; expected a folder, or None for no log")
    if arguments is not None and not (isinstance(arguments, dict) and all(isinstance(name, str) for name in arguments)):
        raise TypeError(f"policy_kwargs is {shown(arguments)}; expected a dict of arguments of the policy")
    if "device" in found:
        found["device"] = _checked_device(found["device"])
    return found


def _checked_device(device: Any) -> Any:
    if device == "auto" if isinstance(device, str) else isinstance(device, torch.device):
        return device
    if not isinstance(device, str):
        raise TypeError(f"device is {shown(device)}; expected a name such as 'cpu', or a torch.device")
    try:
        torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}, which PyTorch does not know: {error}") from error
    return device


def check_callback(callback: Any) -> None:
    """Raise TypeError unless this is what SB3 takes for a callback."""
    if isinstance(callback, list):
        good = all(isinstance(one, BaseCallback) for one in callback)
    else:
        good = callback is None or isinstance(callback, BaseCallback) or callable(callback)
        good = good and not isinstance(callback, type)
    if not good:
        raise TypeError(
            f"callback is {shown(callback)}; expected a callback such as KalmanAdapter(expert), or a list of them"
        )


def is_path(path: Any, method: str) -> bool:
    """Whether this is a path rather than an open file.

    Raises:
        TypeError: It is neither.
    """
    if isinstance(path, (str, Path)):
        return True
    if not (isinstance(path, io.IOBase) or hasattr(path, method)):
        raise TypeError(f"path is {shown(path)}; expected a path or a file that is open in binary mode")
    return False
