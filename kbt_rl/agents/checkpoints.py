"""SB3's ``save`` and ``load`` for learners whose files must be whole, whatever happens to the process."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.type_aliases import GymEnv

from kbt_rl.agents.learner_arguments import is_path
from kbt_rl.files import sealed, unsealed, write_bytes
from kbt_rl.inference.loading import check_fits
from kbt_rl.inference.transactions import with_writers_held

Self = TypeVar("Self", bound="CheckpointedAlgorithm")


class CheckpointedAlgorithm(BaseAlgorithm):
    """An SB3 algorithm that replaces its files as a whole, and is loaded on the CPU unless told otherwise."""

    def save(
        self,
        path: str | Path | io.BufferedIOBase,
        exclude: Iterable[str] | None = None,
        include: Iterable[str] | None = None,
    ) -> None:
        """SB3's ``save``, but a file is replaced as a whole and ends in the SHA-256 of its content.

        Killed at any moment, the process leaves the old file or the new one. SB3 reads it as any other. Posteriors are
        those of one moment also while another thread updates them; of a ``WarmStart`` save in the thread that updates.

        Args:
            path: With or without ``.zip``; or a file that is open for writing, which is written as it is.
            exclude: Attributes that are not saved, besides SB3's own choice.
            include: Attributes that are saved although they are excluded.

        Raises:
            RuntimeError: ``load`` would refuse the file; an old one is still there.
        """
        is_path(path, "write")
        self._before_saving()
        content = with_writers_held(self.policy, lambda: self._content(exclude, include))
        if not isinstance(path, (str, Path)):
            path.write(content)
            return
        target = Path(path)
        if target.suffix == "":
            target = Path(f"{target}.zip")
        while target.is_dir():
            warnings.warn(f"{target} is a folder; saving to {target}_2 instead", stacklevel=2)
            target = Path(f"{target}_2")
        write_bytes(target, content)

    def _content(self, exclude: Iterable[str] | None, include: Iterable[str] | None) -> bytes:
        """The file that ``save`` writes."""
        buffer = io.BytesIO()
        super().save(buffer, exclude, include)
        content = sealed(buffer.getvalue())
        _, saved, _ = load_from_zip_file(io.BytesIO(content), load_data=False, device="cpu")
        check_fits(self.policy, cast(dict[str, Any], saved["policy"]))
        return content

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
            ValueError: The file is damaged, or was written by another program or an older version.
        """
        model = super().load(_whole(path), env, device, custom_objects, print_system_info, force_reset, **kwargs)
        model._after_loading()
        return model

    def _after_loading(self) -> None:
        """Hook for what a subclass has to say of a model that was loaded."""

    def set_parameters(
        self, load_path_or_dict: Any, exact_match: bool = True, device: torch.device | str = "auto"
    ) -> None:
        """SB3's ``set_parameters``, all or nothing; a file must be what was saved."""
        source: Any = load_path_or_dict if isinstance(load_path_or_dict, dict) else _whole(load_path_or_dict)
        super().set_parameters(source, exact_match, device)


def _whole(path: str | Path | io.BufferedIOBase) -> io.BytesIO:
    """The content of a file, if it is what was saved."""
    named = is_path(path, "read")
    content = _existing(path).read_bytes() if named else path.read()  # type: ignore[arg-type, union-attr]
    return unsealed(content, path)


def _existing(path: str | Path) -> Path:
    """The file that a path means, with or without ``.zip``; a folder of that name is none."""
    for candidate in (Path(path), Path(f"{path}.zip")):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"there is no model at {path} or {path}.zip; model.save({str(path)!r}) writes one")
