"""Policies as safetensors files: the same bits back, and every wrong file named and refused."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from learners import LONGER, SHIFTED, changed, expert, kbt, learner, longer_kbt, states, warm_start, weights
from safetensors.torch import load_file, save_file

from kbt_rl import KBT, HeadConfig, Sample
from kbt_rl.agents.export import FORMAT_VERSION, load_safetensors, save_safetensors
from kbt_rl.agents.policies import DecisionTransformerPolicy
from kbt_rl.agents.transformer_policy import TransformerPolicy
from kbt_rl.inference import triangle


def learned() -> KBT:
    model = kbt()
    model.update(Sample(states(3), expert().label(states(3))))
    return model


def header_of(path: Path) -> dict[str, str]:
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header: dict[str, str] = json.loads(content[8 : 8 + size])["__metadata__"]
    return header


def rewritten(
    path: Path, *, header: dict[str, str] | None = None, tensors: dict[str, torch.Tensor] | None = None
) -> Path:
    """The file with other header entries or tensors, under another name."""
    other = path.with_name("rewritten.safetensors")
    save_file({**load_file(path), **(tensors or {})}, other, {**header_of(path), **(header or {})})
    return other


MODELS: dict[str, Any] = {
    "KBT": learned,
    "warm start": warm_start,
    "context": longer_kbt,
    "learned noise": lambda: kbt(policy_kwargs={"head": HeadConfig(noise="learned", structure="neuron")}),
    "deep": lambda: kbt(policy_kwargs={"head": HeadConfig(layers=3, structure="layer", robust_dof=4.0)}),
    "one for each environment": lambda: learner(KBT, n_envs=9, per_env=True),
    "discrete": lambda: KBT(env=gym.make("kbt_rl/DiscreteInvertedPendulum-v0"), seed=0),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_policy_comes_back_bit_for_bit_and_acts_the_same(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    path = save_safetensors(model, tmp_path / "policy")
    assert path == tmp_path / "policy.safetensors"
    assert [file.name for file in tmp_path.iterdir()] == ["policy.safetensors"]
    policy = load_safetensors(tmp_path / "policy")
    assert type(policy) is type(model.policy)
    assert not changed(weights(model), weights(policy))
    assert (policy.observation_space, policy.action_space) == (model.observation_space, model.action_space)
    for ours, theirs in zip(
        policy.predict(states(9), deterministic=True), model.predict(states(9), deterministic=True), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(ours[0]), np.asarray(theirs[0]))


def test_a_loaded_posterior_goes_on_learning_as_the_saved_one(tmp_path: Path) -> None:
    model, other = learned(), kbt()
    load_safetensors(save_safetensors(model, tmp_path / "policy"), into=other)
    assert not changed(weights(model), weights(other))
    sample = Sample(states(2, seed=5), expert().label(states(2, seed=5)))
    assert model.update(sample) == other.update(sample)
    assert not changed(weights(model), weights(other))


def test_a_policy_alone_is_saved_and_filled(tmp_path: Path) -> None:
    model, other = learned(), kbt()
    path = save_safetensors(model.policy, str(tmp_path / "policy.safetensors"))
    assert load_safetensors(str(path), into=other.policy) is other.policy
    assert not changed(weights(model), weights(other))


def test_the_file_holds_no_pickle_and_states_its_version(tmp_path: Path) -> None:
    path = save_safetensors(learned(), tmp_path / "policy")
    header = header_of(path)
    assert header["format_version"] == str(FORMAT_VERSION) == "1"
    assert len(header["fingerprint"]) == 64
    assert json.loads(header["forces"])["max_force"] == 120.0
    assert json.loads(header["settings"])["head"]["rule"] == "measure"
    assert load_file(path)["policy.head.mean"].dtype == torch.float64


def test_fingerprints_tell_architectures_apart(tmp_path: Path) -> None:
    prints = {header_of(save_safetensors(make(), tmp_path / "policy"))["fingerprint"] for make in MODELS.values()}
    assert len(prints) == len(MODELS)
    assert header_of(save_safetensors(kbt(), tmp_path / "policy"))["fingerprint"] in prints


# ---------------------------------------------------------------------- wrong files


def assert_refused(path: Path, message: str, error: type[Exception] = ValueError) -> None:
    """By a fresh start, and by a model that stays as it was."""
    model = learned()
    before = weights(model)
    for into in (None, model, model.policy):
        with pytest.raises(error, match=message):
            load_safetensors(path, into=into)
    assert not changed(before, weights(model))


@pytest.mark.parametrize("kept", [0, 5, 8, 100, 0.3, 0.9, -1])
def test_a_truncated_file_is_refused(kept: float, tmp_path: Path) -> None:
    path = save_safetensors(learned(), tmp_path / "policy")
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    assert_refused(path, "truncated or no safetensors file")


def test_other_files_are_refused(tmp_path: Path) -> None:
    kbt().save(tmp_path / "model.zip")
    assert_refused(tmp_path / "model.zip", "truncated or no safetensors file")
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    assert_refused(tmp_path / "a.safetensors", r"no policy of kbt_rl: its header lacks \['fingerprint'")
    assert_refused(
        tmp_path / "missing", r"there is no file \S*/missing or \S*/missing\.safetensors;", FileNotFoundError
    )
    assert_refused(tmp_path / "missing.safetensors", r"there is no file \S*/missing\.safetensors;", FileNotFoundError)


def other_version(path: Path) -> Path:
    return rewritten(path, header={"format_version": "2"})


def other_settings(path: Path) -> Path:
    settings = json.loads(header_of(path)["settings"])
    settings["head"]["noise_variance"] = 7.0
    return rewritten(path, header={"settings": json.dumps(settings)})


def changed_shape(path: Path) -> Path:
    return rewritten(path, tensors={"policy.head.mean": torch.zeros(3, dtype=torch.float64)})


def cast(path: Path) -> Path:
    return rewritten(path, tensors={"policy.head.mean": load_file(path)["policy.head.mean"].float()})


def extra_tensor(path: Path) -> Path:
    return rewritten(path, tensors={"policy.more": torch.zeros(3)})


def not_a_number(path: Path) -> Path:
    mean = load_file(path)["policy.head.mean"]
    mean[-1] = float("nan")
    return rewritten(path, tensors={"policy.head.mean": mean})


def negative_variance(path: Path) -> Path:
    return rewritten(path, tensors={"policy.head.cov_0": -load_file(path)["policy.head.cov_0"]})


def with_covariance(path: Path, change: Any) -> Path:
    """The file with another covariance of the hidden layer's weights."""
    shape = learned().policy.head.spec.shapes[0]
    cov = triangle.unpack(load_file(path)["policy.head.cov_0"], shape)
    change(cov)
    return rewritten(path, tensors={"policy.head.cov_0": triangle.pack(cov, shape)})


def indefinite(path: Path) -> Path:
    def change(cov: torch.Tensor) -> None:
        """Correlations of 1 with one weight and of -1 between the two."""
        for one, other, sign in [(0, 1, 1.0), (0, 2, 1.0), (1, 2, -1.0)]:
            cov[one, other] = cov[other, one] = sign * (cov[one, one] * cov[other, other]).sqrt()

    return with_covariance(path, change)


def asymmetric(path: Path) -> Path:
    def change(cov: torch.Tensor) -> None:
        cov[0, 1] += 1e-6 * cov[0, 0]

    return with_covariance(path, change)


def negative_noise(path: Path) -> Path:
    return rewritten(path, tensors={"policy.head.noise_cov": torch.full((1, 1), -1e-3, dtype=torch.float64)})


def zero_scale(path: Path) -> Path:
    return rewritten(path, tensors={"policy.head.target_scale": torch.zeros(1, dtype=torch.float64)})


def broken_settings(path: Path) -> Path:
    return rewritten(path, header={"settings": "{"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_version, "format version 2; this version of kbt_rl reads 1"),
        (other_settings, "the file was altered"),
        (changed_shape, "the file was altered"),
        (cast, "the file was altered"),
        (extra_tensor, "the file was altered"),
        (not_a_number, "policy.head.mean holds NaN or infinity"),
        (negative_variance, "negative variance"),
        (indefinite, "not positive semi-definite"),
        (asymmetric, "not symmetric"),
        (negative_noise, "negative eigenvalue"),
        (zero_scale, "target_scale is not positive"),
        (broken_settings, "is not loaded, and nothing has changed"),
    ],
)
def test_an_altered_file_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    assert_refused(change(save_safetensors(learned(), tmp_path / "policy")), message)


def forged(path: Path, settings: dict[str, Any]) -> Path:
    """Other settings with the fingerprint that belongs to them: it protects against mistakes, not against forgers."""
    from kbt_rl.agents.export import fingerprint

    header = {"settings": json.dumps(settings), "fingerprint": fingerprint(settings, load_file(path))}
    return rewritten(path, header=header)


@pytest.mark.parametrize(
    ("where", "name", "value", "message"),
    [
        ("", "policy", "os.system", "holds a os.system; this version of kbt_rl knows TransformerPolicy, Decision"),
        ("", "observation_space", {"kind": "Box"}, "is not loaded, and nothing has changed"),
        ("transformer", "width", 32, "width|another architecture"),
        ("head", "structure", "neuron", "structure|another architecture"),
        ("head", "unheard_of", 1, "unheard_of"),
        ("head", "rule", "fisher", "rule"),
    ],
)
def test_forged_settings_are_refused(where: str, name: str, value: Any, message: str, tmp_path: Path) -> None:
    path = save_safetensors(learned(), tmp_path / "policy")
    settings = json.loads(header_of(path)["settings"])
    (settings[where] if where else settings)[name] = value
    assert_refused(forged(path, settings), message)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (warm_start, "'TransformerPolicy' in the file"),
        (longer_kbt, r"transformer\.context_length is 3 in the file and 1 here"),
        (
            lambda: kbt(policy_kwargs={"head": HeadConfig(structure="neuron")}),
            r"head\.structure is 'neuron' in the file",
        ),
        (
            lambda: kbt(policy_kwargs={"head": HeadConfig(noise_variance=0.5)}),
            r"head\.noise_variance is 0\.5 in the fil",
        ),
        (lambda: KBT(env=gym.make("kbt_rl/DiscreteInvertedPendulum-v0")), r"action_space\.\w+ is"),
        (lambda: KBT(env=gym.make(SHIFTED, max_force=60.0)), r"max_force is 60\.0 in the file and 120\.0 here"),
    ],
    ids=["class", "context", "structure", "noise", "actions", "force"],
)
def test_a_file_of_another_architecture_changes_nothing(make: Any, message: str, tmp_path: Path) -> None:
    path = save_safetensors(make(), tmp_path / "policy")
    model = learned()
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        load_safetensors(path, into=model)
    assert not changed(before, weights(model))


def test_a_class_of_ones_own_is_not_saved(tmp_path: Path) -> None:
    class Mine(DecisionTransformerPolicy):
        pass

    policy = Mine(kbt().observation_space, kbt().action_space)
    with pytest.raises(TypeError, match="Mine is not one of TransformerPolicy, DecisionTransformerPolicy"):
        save_safetensors(policy, tmp_path / "policy")
    assert list(tmp_path.iterdir()) == []


def test_the_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_safetensors(learned(), tmp_path / "policy")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (lambda: save_safetensors(kbt(), path), lambda: load_safetensors(path)):
        with pytest.raises(ImportError, match=r'pip install "kbt_rl\[export\]"'):
            call()


def test_an_old_file_survives_a_failed_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_safetensors(learned(), tmp_path / "policy")
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("no space left on device")))
    with pytest.raises(OSError, match="no space"):
        save_safetensors(kbt(), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["policy.safetensors"]


def test_unbounded_observations_keep_their_infinite_bounds(tmp_path: Path) -> None:
    space = gym.spaces.Box(-np.inf, np.inf, (4,), dtype=np.float32)
    policy = TransformerPolicy(space, kbt().action_space, transformer=LONGER)
    loaded = load_safetensors(save_safetensors(policy, tmp_path / "policy"))
    assert loaded.observation_space == space
