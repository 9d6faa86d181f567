"""A saved policy, whatever it is: of this library or of another SB3 algorithm, as SB3's zip or as safetensors."""

from __future__ import annotations

import io
import pickle
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from stable_baselines3.common.policies import ActorCriticPolicy, BasePolicy
from stable_baselines3.common.save_util import load_from_zip_file

from kbt_rl.agents.transformer_policy import TransformerPolicy
from kbt_rl.files import unsealed

if TYPE_CHECKING:
    from kbt_rl.agents.transformer_learner import TransformerLearner

# What reading a file that is something else ends in, here and in what SB3 calls.
_FOREIGN = (
    ValueError, KeyError, TypeError, AttributeError, AssertionError, RuntimeError, EOFError, ImportError,
    pickle.UnpicklingError, zipfile.BadZipFile,
)  # fmt: skip


Loaded = TypeVar("Loaded")


class SavedPolicy(NamedTuple):
    """A policy from a file, and the force levels (N) of its discrete actions where the file states them."""

    policy: BasePolicy
    forces: tuple[float, ...] | None = None


def existing(path: Path) -> Path:
    """The file that a path means, with or without its ending.

    Raises:
        FileNotFoundError: There is none.
    """
    for candidate in (path, Path(f"{path}.zip"), Path(f"{path}.safetensors")):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"there is no model at {path}; `kbt-rl pretrain --model {path}` makes one")


def is_safetensors(path: Path) -> bool:
    """Whether a file is, by its name, in the format that runs no code when it is read."""
    return path.suffix.lower() == ".safetensors"


def check_output(path: Path) -> None:
    """Make the folder of a file that is to be written later, and try it: an error comes before the work, not after it.

    Raises:
        OSError: No file can be written there.
    """
    if path.exists() and not path.is_file():
        raise IsADirectoryError(
            f"{path} is a folder or a device, and a file is to be written there; choose another name"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def save_model(model: TransformerLearner, path: Path) -> None:
    """Save a learner as the ending says: its policy alone as safetensors, or all of it as SB3's zip."""
    if is_safetensors(path):
        from kbt_rl.agents.export import save_safetensors

        save_safetensors(model, path)
    else:
        model.save(path)


def load_policy(path: Path) -> SavedPolicy:
    """Load the policy of any file that ``save`` of an SB3 algorithm or ``save_safetensors`` has written.

    A zip holds pickles, which can run any code; a safetensors file holds numbers and settings only.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is something else.
    """
    found = existing(path)
    if is_safetensors(found):
        from kbt_rl.agents.export import load_safetensors

        return SavedPolicy(load_safetensors(found))
    return understood(found, _from_zip)


def understood(path: Path, load: Callable[[Path], Loaded]) -> Loaded:
    """What ``load`` makes of a file.

    Raises:
        ValueError: It is no file of that kind; the message names it.
    """
    try:
        return load(path)
    except _FOREIGN as error:
        kind = type(error).__name__
        raise ValueError(f"{path} is not a saved model that can be used here ({kind}: {error})") from error


def _from_zip(path: Path) -> SavedPolicy:
    content = path.read_bytes()
    data, loaded, _ = load_from_zip_file(io.BytesIO(content), device="cpu")
    parameters: dict[str, Any] = loaded  # the state dict of each of the algorithm's modules
    if data is None or "policy_class" not in data or "policy" not in parameters:
        raise ValueError("the zip holds no SB3 model")
    if issubclass(data["policy_class"], TransformerPolicy):  # a file of this library, which states its digest
        unsealed(content, path)
    if data.get("posteriors", 1) > 1:
        raise ValueError(
            f"the model has {data['posteriors']} posteriors, one for each environment; take one of them out by "
            "model.policy.select(i) and save that by save_safetensors"
        )
    arguments: dict[str, Any] = dict(data.get("policy_kwargs") or {})
    if issubclass(data["policy_class"], ActorCriticPolicy):
        arguments["use_sde"] = data.get("use_sde", False)
    policy = data["policy_class"](data["observation_space"], data["action_space"], lambda _: 0.0, **arguments)
    assert isinstance(policy, BasePolicy)
    policy.load_state_dict(parameters["policy"])
    policy.set_training_mode(False)
    forces = data.get("forces")
    return SavedPolicy(policy, None if forces is None else tuple(forces))
