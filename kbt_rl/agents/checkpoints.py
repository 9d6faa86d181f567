"""SB3's ``save`` and ``load`` for learners whose files must be whole, whatever happens to the process."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.type_aliases import GymEnv

from kbt_rl.files import replacing

Self = TypeVar("Self", bound="CheckpointedAlgorithm")


class CheckpointedAlgorithm(BaseAlgorithm):
    """An SB3 algorithm that replaces its files as a whole, and is loaded on the CPU unless told otherwise."""

    def save(
        self,
        path: str | Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """SB3's ``save``, by which a file is replaced as a whole: killed at any moment, it is the old one or the new.

        Save in the thread that updates, or while no other does.

        Args:
            path: With or without ``.zip``; or a file that is open for writing, which is written as it is.
            exclude: Attributes that are not saved, besides SB3's own choice.
            include: Attributes that are saved although they are excluded.
        """
        self._before_saving()
        if not isinstance(path, (str, Path)):
            super().save(path, exclude, include)
            return
        target = Path(path)
        if target.suffix == "":
            target = Path(f"{target}.zip")
        while target.is_dir():
            warnings.warn(f"{target} is a folder; saving to {target}_2 instead", stacklevel=2)
            target = Path(f"{target}_2")
        with replacing(target) as file:
            super().save(file, exclude, include)

    def _before_saving(self) -> None:
        """Hook for what a subclass writes down of itself for the file."""

    @classmethod
    def load(
        cls: type[Self],
        path: str | Path | io.BufferedIOBase,
        env: GymEnv | None = None,
        device: torch.device | str = "cpu",
        custom_objects: dict[str, Any] | None = None,
        print_system_info: bool = False,
        force_reset: bool = True,
        **kwargs: Any,
    ) -> Self:
        """SB3's ``load``, on the CPU by default like the constructor.

        Raises:
            FileNotFoundError: There is no such file, with or without ``.zip``.
        """
        if isinstance(path, (str, Path)):
            path = _existing(path)
        model = super().load(path, env, device, custom_objects, print_system_info, force_reset, **kwargs)
        model._after_loading()
        return model

    def _after_loading(self) -> None:
        """Hook for what a subclass has to say of a model that was loaded."""


def _existing(path: str | Path) -> Path:
    """The file that a path means, with or without ``.zip``; a folder of that name is none."""
    for candidate in (Path(path), Path(f"{path}.zip")):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"there is no model at {path} or {path}.zip; model.save({str(path)!r}) writes one")
